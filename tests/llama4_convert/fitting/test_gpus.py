"""The table of GPUs: what drivers report, with sources, and the names that find a row."""

from __future__ import annotations

import pytest

from llama4_convert.errors import UsageError
from llama4_convert.fitting.gpus import allowances, find_gpu, gpus

GIB = 1 << 30


def test_the_table_of_gpus() -> None:
    assert find_gpu("H100-80GB").nbytes / GIB == pytest.approx(79.6, abs=0.1)
    for key, gpu in gpus().items():
        boxed = int(key.rsplit("-", 1)[1].removesuffix("gb"))
        assert 0.9 * boxed * 1e9 < gpu.nbytes <= boxed * GIB
    assert list(gpus().values()) == sorted(gpus().values(), key=lambda gpu: gpu.nbytes)


def test_every_figure_has_its_source() -> None:
    every = allowances()
    sources = [gpu.source for gpu in gpus().values()]
    sources += [allowance.source for allowance in (every.overhead, every.activations, every.context)]
    assert all(len(source) > 10 for source in sources)


def test_of_an_h100_74_gib_are_left_after_the_overhead() -> None:
    assert (find_gpu("h100-80gb").nbytes - allowances().overhead.nbytes) / GIB == pytest.approx(74, abs=0.01)
    assert allowances().context.nbytes < allowances().overhead.nbytes


def test_a_gpu_that_is_sold_under_two_names() -> None:
    assert find_gpu("b200-180gb") is find_gpu("b200-192gb")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("h100", "h100-80gb or h100-94gb"),
        ("h100-80", "h100-80gb"),
        ("rtx-4090-24gb", "rtx4090-24gb"),
        ("tpu", "one of"),
    ],
)
def test_an_unknown_gpu_names_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        find_gpu(name)
