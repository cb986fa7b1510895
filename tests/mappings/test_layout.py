"""The algebra of the tables: what each pattern means in strides, and that a copy moves the elements that numpy would."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from mappings import Box, Copy, Layout, MappingError, Placement, copies

Array = NDArray[np.int64]
Axes = Mapping[str, tuple[str, ...]]

QKV: Axes = {"q": ("Q", "D"), "k": ("K", "D"), "v": ("K", "D")}
GATE_UP: Axes = {"gate": ("E", "D", "F"), "up": ("E", "D", "F")}
DOWN: Axes = {"down": ("E", "F", "D")}
ROUTER: Axes = {"router": ("D", "E")}
SIZES = {"E": 2, "D": 3, "F": 5, "Q": 4, "K": 2}


def sizes_of(axes: Axes) -> dict[str, dict[str, int]]:
    return {tensor: {axis: SIZES[axis] for axis in names} for tensor, names in axes.items()}


# pattern, logical tensors, stored shape, tensor -> (offset, stride a logical axis)
GOLDEN: list[tuple[str, Axes, tuple[int, ...], dict[str, Any]]] = [
    ("router", ROUTER, (3, 2), {"router": (0, (2, 1))}),
    ("D E", ROUTER, (3, 2), {"router": (0, (2, 1))}),
    ("E D", ROUTER, (2, 3), {"router": (0, (1, 3))}),
    ("router: E D", ROUTER, (2, 3), {"router": (0, (1, 3))}),
    ("(E F) D", DOWN, (10, 3), {"down": (0, (15, 3, 1))}),
    ("(F E) D", DOWN, (10, 3), {"down": (0, (3, 6, 1))}),
    ("D (E F)", DOWN, (3, 10), {"down": (0, (5, 1, 10))}),
    ("(E F D)", DOWN, (30,), {"down": (0, (15, 3, 1))}),
    ("gate: (E D) F", GATE_UP, (6, 5), {"gate": (0, (15, 5, 1))}),
    ("up", GATE_UP, (2, 3, 5), {"up": (0, (15, 5, 1))}),
    ("[q|k|v] D", QKV, (8, 3), {"q": (0, (3, 1)), "k": (12, (3, 1)), "v": (18, (3, 1))}),
    ("[ v | q | k ] D", QKV, (8, 3), {"v": (0, (3, 1)), "q": (6, (3, 1)), "k": (18, (3, 1))}),
    ("D [q|k|v]", QKV, (3, 8), {"q": (0, (1, 8)), "k": (4, (1, 8)), "v": (6, (1, 8))}),
    ("E D [gate|up]", GATE_UP, (2, 3, 10), {"gate": (0, (30, 10, 1)), "up": (5, (30, 10, 1))}),
    ("E [gate|up] D", GATE_UP, (2, 10, 3), {"gate": (0, (30, 1, 3)), "up": (15, (30, 1, 3))}),
]


@pytest.mark.parametrize(("pattern", "axes", "shape", "placed"), GOLDEN, ids=[g[0] for g in GOLDEN])
def test_a_pattern_gives_a_stored_shape_and_a_place_to_every_logical_tensor(
    pattern: str, axes: Axes, shape: tuple[int, ...], placed: dict[str, Any]
) -> None:
    layout = Layout.parse(pattern, axes)
    assert layout.shape(sizes_of(axes)) == shape
    assert layout.place(sizes_of(axes)) == placed


def test_strides_of_the_stored_tensor_carry_over() -> None:
    """A stored view (transposed, say): strides count elements of its storage, merged axes step inside their dimension."""
    assert Layout.parse("[q|k|v] D", QKV).place(sizes_of(QKV), (1, 8))["k"] == (4, (1, 8))
    assert Layout.parse("(E F) D", DOWN).place(sizes_of(DOWN), (7, 2)) == {"down": (0, (35, 7, 2))}


@pytest.mark.parametrize(
    ("pattern", "axes"),
    [
        ("Q", QKV),  # names no tensor
        ("w: Q D", QKV),
        ("w", QKV),
        ("q: Q", QKV),  # an axis short
        ("q: Q D D", QKV),
        ("q: Q Q", QKV),
        ("q: Q E", QKV),
        ("q: Q D E", QKV),
        ("q:", QKV),
        ("E", ROUTER),
        ("", ROUTER),
        ("[q|k|w] D", QKV),
        ("[q|k|v]", QKV),  # two axes left for one concatenation
        ("[q|k|v] D Q", QKV),
        ("[q|k|v] [q|k|v]", QKV),
        ("[] D", QKV),
        ("() D", ROUTER),
        ("(E F D", DOWN),
        ("E F) D", DOWN),
        ("E, F D", DOWN),
        ("((E F) D)", DOWN),
    ],
)
def test_a_pattern_that_is_no_bijection_is_refused_and_quoted(pattern: str, axes: Axes) -> None:
    with pytest.raises(MappingError, match="pattern") as refused:
        Layout.parse(pattern, axes)
    assert repr(pattern) in str(refused.value)


def test_a_tensor_cannot_be_concatenated_with_itself() -> None:
    with pytest.raises(MappingError):
        Layout.parse("[q|q] D", QKV)


# -- copies


def execute(copy: Copy, source: Array, target: Array) -> None:
    """The obvious executor: two strided views over flat storages."""

    def view(flat: Array, offset: int, strides: tuple[int, ...]) -> Array:
        return as_strided(flat[offset:], copy.shape, [s * flat.itemsize for s in strides])

    view(target, copy.target_offset, copy.target_strides)[...] = view(source, copy.source_offset, copy.source_strides)


Stored = tuple[Placement, Array]


@st.composite
def stored_boxes(draw: st.DrawFn, logical: Array) -> tuple[Placement, tuple[slice, ...], tuple[int, ...], int, int]:
    """A random box of a logical array, and a random dense-or-padded strided place for it: (..., storage size)."""
    rank = logical.ndim
    start = [draw(st.integers(0, n - 1)) for n in logical.shape]
    size = [draw(st.integers(1, n - a)) for a, n in zip(start, logical.shape, strict=True)]
    order = draw(st.permutations(range(rank)))  # stored order of the axes, outermost first: a transpose
    strides, step = [0] * rank, 1
    for axis in reversed(order):
        strides[axis] = step
        # A gap beside the axis is what a concatenated neighbour leaves.
        step *= size[axis] + draw(st.integers(0, 2)) * (axis != order[0])
    offset = draw(st.integers(0, 3))
    total = offset + step + 1
    box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
    return Placement("t", Box(tuple(start), tuple(size)), offset, tuple(strides)), box, tuple(size), offset, total


def store(logical: Array, placement: Placement, box: tuple[slice, ...], total: int) -> Array:
    flat = np.full(total, -1, np.int64)
    view = as_strided(flat[placement.offset :], placement.box.size, [s * flat.itemsize for s in placement.strides])
    view[...] = logical[box]
    return flat


@settings(max_examples=250, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_copy_moves_exactly_what_two_boxes_have_in_common(data: st.DataObject, shape: list[int]) -> None:
    logical = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    source, source_box, *_, source_total = data.draw(stored_boxes(logical))
    target, target_box, *_, target_total = data.draw(stored_boxes(logical))
    common = np.zeros(shape, bool)
    common[source_box] = True
    wanted = np.zeros(shape, bool)
    wanted[target_box] = True
    common &= wanted

    expected = store(np.where(common, logical, -1), target, target_box, target_total)
    copy = copies(target, source)
    if copy is None:
        assert not common.any()
        return
    result = np.full(target_total, -1, np.int64)
    execute(copy, store(logical, source, source_box, source_total), result)
    np.testing.assert_array_equal(result, expected)
    assert np.prod(copy.shape) == common.sum()


def addresses(shape: tuple[int, ...], offset: int, strides: tuple[int, ...]) -> list[int]:
    return [
        offset + sum(i * s for i, s in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, shape))
    ]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_merging_loop_axes_never_changes_which_element_goes_where(data: st.DataObject, shape: list[int]) -> None:
    size = tuple(shape)
    whole = Box((0,) * len(shape), size)
    order = data.draw(st.permutations(range(len(shape))))
    source_strides = tuple(int(np.prod([shape[a] for a in order[order.index(i) + 1 :]])) for i in range(len(shape)))
    target_strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    copy = copies(Placement("t", whole, 5, target_strides), Placement("t", whole, 7, source_strides))
    assert copy is not None
    plain = zip(addresses(size, 5, target_strides), addresses(size, 7, source_strides), strict=True)
    merged = zip(
        addresses(copy.shape, copy.target_offset, copy.target_strides),
        addresses(copy.shape, copy.source_offset, copy.source_strides),
        strict=True,
    )
    assert sorted(plain) == sorted(merged)
    assert len(copy.shape) <= len(shape) + 1
    assert copy.target_strides[-1] == 1
    assert list(copy.target_strides) == sorted(copy.target_strides, reverse=True)


def placement(size: tuple[int, ...], strides: tuple[int, ...], start: tuple[int, ...] | None = None) -> Placement:
    return Placement("t", Box(start or (0,) * len(size), size), 0, strides)


def test_a_whole_tensor_in_the_same_layout_is_one_run() -> None:
    same = placement((2, 3, 5), (15, 5, 1))
    assert copies(same, same) == Copy((30,), 0, (1,), 0, (1,))


def test_a_transpose_keeps_its_axes_in_the_order_of_the_target() -> None:
    assert copies(placement((3, 2), (1, 3)), placement((3, 2), (2, 1))) == Copy((2, 3), 0, (1, 2), 0, (3, 1))


def test_half_of_a_fused_tensor_is_runs_with_gaps() -> None:
    """gate of [gate|up]: rows of 5 that lie 10 apart."""
    assert copies(placement((3, 5), (10, 1)), placement((3, 5), (5, 1))) == Copy((3, 5), 0, (5, 1), 0, (10, 1))


def test_a_target_without_unit_stride_gets_a_loop_of_one() -> None:
    assert copies(placement((4,), (8,)), placement((4,), (1,))) == Copy((4, 1), 0, (1, 1), 0, (8, 1))


def test_boxes_that_only_touch_have_nothing_in_common() -> None:
    assert copies(placement((2, 3), (3, 1)), placement((2, 3), (3, 1), start=(2, 0))) is None


def test_different_tensors_cannot_be_copied_to_one_another() -> None:
    with pytest.raises(MappingError, match="q cannot be copied to k"):
        copies(Placement("k", Box((0,), (1,)), 0, (1,)), Placement("q", Box((0,), (1,)), 0, (1,)))
