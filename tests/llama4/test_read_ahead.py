"""What is read before it is asked for: the right bytes, in bounded memory, and errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch

from llama4.read_ahead import ReadAhead
from llama4_convert import load_reference
from tests.support import HANG_SECONDS, meta_model

SIZES = {name: size for size, name in enumerate("abcdef", 1)}


class Disk:
    def __init__(self) -> None:
        self.read: list[tuple[str, str]] = []

    def load(self, name: str) -> Any:
        self.read.append((name, threading.current_thread().name.split("_")[0]))
        if name == "broken":
            raise OSError("gone")
        return np.full(SIZES[name], ord(name), np.uint8)

    def names(self, count: int) -> list[str]:
        """What has been read, once that is `count` tensors."""
        deadline = time.monotonic() + HANG_SECONDS
        while len(self.read) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # and no more than that
        return [name for name, _ in self.read]


def ahead_of(disk: Disk, budget: int) -> ReadAhead:
    return ReadAhead(disk.load, lambda name: SIZES.get(name, 1), budget)


def test_it_reads_in_order_up_to_the_budget_and_goes_on_when_something_is_taken() -> None:
    disk = Disk()
    ahead = ahead_of(disk, 6)
    ahead.expect("abcde")
    assert disk.names(3) == ["a", "b", "c"]
    assert ahead.take("a").tolist() == [ord("a")]
    assert disk.names(3) == ["a", "b", "c"]  # d has 4 bytes, 1 is free
    ahead.take("b")
    ahead.take("c")
    assert disk.names(4) == ["a", "b", "c", "d"]
    assert [len(ahead.take(name)) for name in "de"] == [4, 5]
    assert disk.names(5) == list("abcde")
    assert {thread for _, thread in disk.read[:4]} == {"read-ahead"}


def test_what_was_not_expected_or_is_too_large_is_read_at_once() -> None:
    disk = Disk()
    ahead = ahead_of(disk, 3)
    ahead.expect("fab")
    assert disk.names(2) == ["a", "b"]  # there will never be room for f
    assert len(ahead.take("e")) == 5
    assert len(ahead.take("f")) == 6
    assert disk.names(4) == ["a", "b", "e", "f"]
    assert ahead_of(disk, 0).take("c").tolist() == [ord("c")] * 3


def test_what_is_no_longer_expected_gives_its_room_back() -> None:
    disk = Disk()
    ahead = ahead_of(disk, 4)
    ahead.expect("ac")
    assert disk.names(2) == ["a", "c"]
    ahead.expect("d")
    assert disk.names(3) == ["a", "c", "d"]
    ahead.expect("d")
    assert len(ahead.take("d")) == 4
    assert disk.names(3) == ["a", "c", "d"]


def test_an_error_is_raised_to_whom_asks() -> None:
    disk = Disk()
    ahead = ahead_of(disk, 10)
    ahead.expect(["broken", "b"])
    assert ahead.take("b").tolist() == [ord("b")] * 2
    with pytest.raises(OSError, match="gone"):
        ahead.take("broken")
    ahead.expect("fd")  # and its room is free again
    assert disk.names(3)[-1] == "d"


@pytest.mark.parametrize("geometry", ["scout", "maverick", "guard"])
def test_a_model_says_what_it_will_ask_for(meta_checkpoint: Callable[..., Any], geometry: str) -> None:
    """In this order, and all of it but embeddings, output head and vision tower; routed experts only where tokens go."""
    source = meta_checkpoint(geometry, ranks=2)
    model = load_reference(source.src, dtype=torch.float32, keep_bytes=0)
    weights: Any = model.weights
    expected: list[str] = []
    surprises: list[str] = []
    expect, take = weights._ahead.expect, weights._ahead.take

    def expecting(names: Iterable[str]) -> None:
        expected[:] = list(names)
        expect(expected)

    def taking(name: str) -> Any:
        if not expected or expected.pop(0) != name:
            surprises.append(name)
        return take(name)

    weights._ahead.expect, weights._ahead.take = expecting, taking
    model(meta_model.text_tokens(source.model, 3))
    assert surprises == ["output"]  # small enough to be read whole; a real one is read in slices
    assert not expected
