"""runtimes.toml: a runtime is a table, and nothing else knows its name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from llama4_convert import fitting
from llama4_convert.fitting.deployment import Deployment, largest_context, memory_use
from llama4_convert.fitting.gpus import find_gpu
from llama4_convert.fitting.memory import Weights
from llama4_convert.fitting.runtimes import Fact, Phrase, Runtime, runtimes
from llama4_convert.fitting.serving import command, facts, notes, placeholders
from quant.typed import InvalidField, decode
from tests.support.geometries import SCOUT

GIB = 1 << 30
ROW = """
loads = ["compressed-tensors-int4", "compressed-tensors-fp8", "compressed-tensors-mixed", "bitsandbytes-nf4"]
splits = "layers"
kv_dtypes = ["bf16", "fp8"]
prefill_tokens = 512
keeps_chunks = "never"
command = [{ text = "server {directory} -c {context}" }, { text = "-n {gpus}", when = ["several GPUs"] }]
notes = [{ text = "{requests} request at a time" }]
"""


def row(**changes: object) -> Runtime:
    return decode({**tomllib.loads(ROW), **changes}, Runtime, "runtimes.toml")


def test_a_runtime_is_a_row() -> None:
    deployment = Deployment(
        SCOUT, Weights(other=30 * GIB), None, find_gpu("l40s-48gb"), n_gpus=2, max_context=1 << 20, directory="my scout"
    )
    tokens = largest_context(deployment, row())
    assert command(deployment, row(), tokens) == f"server 'my scout' -c {tokens} -n 2"
    assert notes(deployment, row(), tokens) == ["1 request at a time", "every layer holds every token"]
    # Whole layers, each with all KV heads: a half of 48 and one more on the fullest GPU.
    assert memory_use(deployment, row()).cache.nbytes(16) == 16 * 4096 * 25


def test_no_module_asks_for_the_name_of_a_runtime() -> None:
    names = "|".join({runtime.name for runtime in runtimes()} - {"transformers"})  # which is a layout, too
    for module in Path(fitting.__file__).parent.glob("*.py"):
        assert not re.search(rf"""["']({names})["']""", module.read_text()), module.name


def test_the_switch_of_a_row_is_a_verdict_of_its_own() -> None:
    assert [runtime.name for runtime in runtimes()] == ["vllm", "vllm-no-hybrid-cache", "sglang", "transformers"]
    with_chunks, without = runtimes()[:2]
    assert without.command[-1] == Phrase("--disable-hybrid-kv-cache-manager")
    assert (with_chunks.keeps_chunks, without.keeps_chunks) == ("always", "never")


@pytest.mark.parametrize("runtime", runtimes(), ids=lambda runtime: runtime.name)
def test_every_text_has_placeholders_that_are_known(runtime: Runtime) -> None:
    deployment = Deployment(SCOUT, Weights(), None, find_gpu("h100-80gb"), max_context=8192)
    values = placeholders(deployment, runtime, 8192)
    for phrase in (*runtime.command, *runtime.loading_notes, *runtime.notes, Phrase(runtime.usage)):
        assert "{" not in phrase.text.format_map(values)


def test_every_fact_can_be_true() -> None:
    amd = find_gpu("mi300x-192gb")
    formats = ("compressed-tensors-int4", "compressed-tensors-fp8", "bitsandbytes-nf4")
    every = [Deployment(SCOUT, Weights(), format, amd, n_gpus=2, fp8_kv=True) for format in formats]
    assert set().union(*(facts(deployment, runtimes()[0]) for deployment in every)) == set(get_args(Fact))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": "experts"}, 'splits is "experts": choose one of tensors, layers'),
        ({"keep_chunks": "never"}, 'unknown field "keep_chunks": did you mean "keeps_chunks"?'),
        ({"notes": [{"text": "", "when": ["amd"]}]}, 'notes 1: when, entry 1 is "amd"'),
        ({"loads": []}, "loads, decompresses and refuses must share out"),
        ({"refuses": {"bitsandbytes-nf4": "no"}}, "loads, decompresses and refuses must share out"),
    ],
)
def test_a_wrong_row_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidField, match=re.escape(message)):
        row(**changes)
