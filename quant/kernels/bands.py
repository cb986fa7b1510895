"""Sharing the bands of a matrix among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor


def share(worker: Callable[[Iterator[int]], None], bands: int, threads: int, pool: Executor | None = None) -> None:
    """Runs `worker` in `threads` threads; all draw the numbers 0 .. bands-1 from one iterator, whoever is free the next.

    `pool` spares starting threads for each matrix. Workers write where their band's number says, so that nothing
    depends on who drew what.
    """
    drawn = iter(range(bands))  # next() of a built-in iterator is atomic
    threads = min(threads, bands)
    if threads <= 1:
        worker(drawn)
    elif pool is not None:
        for future in [pool.submit(worker, drawn) for _ in range(threads)]:
            future.result()
    else:
        with ThreadPoolExecutor(threads) as own:
            share(worker, bands, threads, own)
