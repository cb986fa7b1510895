"""Sharing the bands of a matrix among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor


def share(worker: Callable[[Iterator[int]], None], bands: int, threads: int, pool: Executor | None = None) -> None:
    """Runs `worker` in `threads` threads, which draw the numbers 0 .. bands-1 from one iterator as they become free.

    The threads are those of `pool`, if one is given, or are started for this call. A worker writes its results to the place of
    the band's number, so that they do not depend on which thread drew it.
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
