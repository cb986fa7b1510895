"""The command `fit` on directories: formats told by headers, Meta's source by recipes, what is printed, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from llama4_convert import convert, fit, synth
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.conversion.convert import bind
from llama4_convert.conversion.request import Request
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.fitting.results import Fit, FitVerdict
from quant.typed import decode
from tests.support import commands, meta_model

GIB = 1 << 30
# Widths that groups of 128 divide; MoE and dense layers.
PARAMS: dict[str, Any] = {
    **meta_model.GEOMETRIES["scout"],
    "dim": 384,
    "n_heads": 6,
    "n_kv_heads": 2,
    "head_dim": 64,
    "n_layers": 4,
    "multiple_of": 128,
    "ffn_dim_multiplier": 0.75,
    "ffn_exp": 4.0,
    "attention_chunk_size": 16,
    "moe_args": {**meta_model.GEOMETRIES["scout"]["moe_args"], "num_experts": 3, "interleave_moe_layer_step": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    meta_model.write_checkpoint(meta_model.build(PARAMS, seed=1), PARAMS, path, ranks=2)
    return path


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Meta's Scout in full size, in holes."""
    path = tmp_path_factory.mktemp("scout") / "original"
    synth(path, geometry="scout", sparse=True, ranks=1)
    return path


def directory(source: Path, target: Path, recipe: str | None) -> Path:
    """What `convert` would make of `source`: true headers, and holes for the weights."""
    job = bind(Request(source, recipe=recipe)).job
    target.mkdir()
    for file in job.plan.files:
        (target / file.name).write_bytes(file.envelope().head())
        with open(target / file.name, "r+b") as opened:
            opened.truncate(file.size)
    (target / commands.INDEX).write_bytes(job.plan.index())
    (target / "config.json").write_bytes(job.contents()["config.json"])
    return target


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., commands.Outcome]:
    return lambda *arguments: commands.run(capsys, *arguments)


Run = Callable[..., commands.Outcome]


def largest(verdict: FitVerdict, runtime: str) -> int:
    return next(r.max_context for r in verdict.runtimes if r.runtime == runtime)


# -------------------- Scout on one H100


def test_meta_source_of_scout_on_one_h100(scout: Path) -> None:
    result = fit(scout)
    by_name = {v.name: v for v in result.verdicts}
    assert list(by_name) == ["bf16", "fp8", "int4-experts", "mixed", "int4", "int4-signed", "nf4"]
    assert [name for name, v in by_name.items() if not v.fits] == ["bf16", "fp8"]
    assert by_name["bf16"].weight_bytes == 2 * 108_641_793_536
    # 72 GiB less the weights and less 36 layers x 8,192 tokens x 4 KiB, in 48 KiB a token and whole blocks of 16.
    room = 72 * GIB - by_name["int4"].weight_bytes - 36 * 8192 * 4096
    assert largest(by_name["int4"], "vllm") == room // 49152 // 16 * 16 == 228_432
    assert largest(by_name["nf4"], "vllm") == 0
    assert by_name["fp8"].elsewhere == ("2 x h100-80gb", "h200-141gb")
    assert result.fits
    assert result.fit.name == "int4"
    assert result.fit.convert == f"llama4-convert convert {scout} llama4-int4 --recipe int4"
    assert "fp8 (106.8 GiB) does not fit (2 x h100-80gb or h200-141gb would)" in result.advice
    assert "int4 (60.4 GiB) fits with 228,432 tokens in vllm" in result.advice


@pytest.mark.parametrize(("recipe", "format"), [(None, None), ("fp8", "fp8"), ("int4", "int4"), ("mixed", "mixed")])
def test_a_directory_is_judged_as_its_recipe_was(
    recipe: str | None, format: str | None, scout: Path, tmp_path: Path
) -> None:
    path = directory(scout, tmp_path / "out", recipe)
    there = fit(path).fit
    planned = next(v for v in fit(scout).verdicts if v.name == (recipe or "bf16"))
    assert there.weight_bytes == planned.weight_bytes
    assert there.format == (f"compressed-tensors-{format}" if format else None)
    for a, b in zip(there.runtimes, planned.runtimes, strict=True):
        assert a.max_context == b.max_context
        assert str(path) in a.command or not a.command
    assert there.convert == ""


def test_fp8_scout_on_one_h100_is_no_and_says_what_would(run: Run, scout: Path, tmp_path: Path) -> None:
    path = directory(scout, tmp_path / "scout fp8", "fp8")
    outcome = run("fit", path)
    assert outcome.code == 5
    assert "does not fit" in outcome.error
    for way in ("recipe int4 (228,432 tokens)", "2 x h100-80gb", "h200-141gb"):
        assert way in outcome.error
        assert way in outcome.out
    two = run("fit", path, "--gpus", "2", "--context", "131072", "--json")
    assert two.code == 0
    assert two.err == ""
    vllm = two.json["fit"]["runtimes"][0]
    assert vllm["fits"]
    assert f"vllm serve '{path}' --max-model-len 131072 --tensor-parallel-size 2 " in vllm["command"]


def test_a_table_of_gpus_and_formats(run: Run, scout: Path) -> None:
    outcome = run("fit", scout, "--gpu", "all")
    assert outcome.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line.split()}
    names = outcome.out.splitlines()[3].split()
    assert dict(zip(names, rows["h100-80gb"], strict=True)) == {
        "bf16": "-", "fp8": "-", "int4-experts": "46,032", "mixed": "168,864", "int4": "228,432",
        "int4-signed": "228,432", "nf4": "182,288",
    }  # fmt: skip
    assert set(rows["rtx4090-24gb"]) == {"-"}
    assert rows["h200-141gb"][0] == "-"
    assert "-" not in rows["mi325x-256gb"]
    # The smallest that fits at all is advised.
    assert "vllm serve llama4-int4" in outcome.out


def test_a_table_of_formats_and_runtimes(run: Run, scout: Path) -> None:
    outcome = run("fit", scout, "--sequences", "2", "--kv-cache-dtype", "fp8")
    table = [line for line in outcome.out.splitlines() if line.endswith(("  no", "  fits"))]
    assert [line.split()[0] for line in table] == ["bf16", "fp8", "int4-experts", "mixed", "int4", "int4-signed", "nf4"]
    assert "2 sequences at a time, FP8 KV cache" in outcome.out
    assert "23.4 MiB" in table[0]  # 12 layers x 2 KiB x 1,000
    assert "--kv-cache-dtype fp8" in outcome.out


# -------------------- formats, by headers


@pytest.mark.parametrize(
    ("recipe", "format"),
    [
        (None, None),
        ("int4", "compressed-tensors-int4"),
        ("fp8", "compressed-tensors-fp8"),
        ("mixed", "compressed-tensors-mixed"),
        ("nf4", "bitsandbytes-nf4"),
    ],
)
def test_a_finished_directory(recipe: str | None, format: str | None, tiny: Path, tmp_path: Path) -> None:
    path = directory(tiny, tmp_path / "out", recipe)
    result = fit(path, gpu="l4-24gb")
    assert result.fit.format == format
    tensors = TransformersCheckpoint.open(path).tensors.values()
    assert result.fit.weight_bytes == sum(t.nbytes for t in tensors)
    # All of Meta's source is in its table, too.
    there = next(v for v in fit(tiny).verdicts if v.name == (recipe or "bf16"))
    assert there.weight_bytes == result.fit.weight_bytes
    assert there.format == format


def test_blocks_and_groups_are_read_off_the_scales(tiny: Path, tmp_path: Path) -> None:
    rule = 'format = "compressed-tensors"\n[[rule]]\nfamilies = ["routed_experts", "shared_expert", "dense_mlp"]\n'
    (tmp_path / "blocks.toml").write_text(f'{rule}scheme = "fp8"\ngranularity = "block"\n')
    (tmp_path / "groups.toml").write_text(f'{rule}scheme = "int4"\ngroup_size = 64\n')
    for name in ("blocks", "groups"):
        directory(tiny, tmp_path / name, str(tmp_path / f"{name}.toml"))
    widths = bind(Request(tiny)).job.plan.geometry
    assert (widths.expert_dim, widths.dense_dim) == (384, 768)
    # Experts 384 wide: a half is one and a half blocks of 128, and three groups of 64.
    notes = {n: fit(tmp_path / n, gpus=2).fit.runtimes[0] for n in ("blocks", "groups")}
    assert "FP8 blocks of 128 do not divide the 192" in notes["blocks"].note
    assert notes["groups"].fits


def test_what_transformers_has_saved(tmp_path: Path) -> None:
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        intermediate_size_mlp=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        max_position_embeddings=4096,
        attention_chunk_size=32,
    )
    model = Llama4ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    result = fit(tmp_path, gpu="rtx4090-24gb")
    assert result.fit.weight_bytes == 2 * sum(p.numel() for p in model.parameters())
    assert [r.max_context for r in result.fit.runtimes] == [4096, 4096, 0, 4096]  # SGLang drops a text model's experts
    assert "AutoModelForCausalLM" in result.fit.runtimes[3].command


@pytest.mark.parametrize("name", sorted(meta_model.GEOMETRIES))
def test_every_geometry_of_meta_gets_a_verdict(name: str, meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """The same from params.json as from the config.json that is made of it: chunks, dense layers, no vision and all."""
    source = meta_checkpoint(name).src
    result = fit(source, gpu="l4-24gb")
    assert result.fits
    assert result.fit.runtimes[0].max_context == result.max_context
    made = fit(directory(source, tmp_path / "out", None), gpu="l4-24gb")

    def without_names(verdict: FitVerdict) -> FitVerdict:
        runtimes = tuple(structs.replace(r, command="") for r in verdict.runtimes)
        return structs.replace(verdict, convert="", name="", recipe=None, best_recipe=None, runtimes=runtimes)

    assert without_names(made.fit) == without_names(result.verdicts[0])


# -------------------- what is refused


def test_no_byte_of_weights_is_read(scout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a directory the headers are opened, and nothing behind them is read."""
    from llama4_convert.checkpoints import readers

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor was read")

    path = directory(scout, tmp_path / "out", "nf4")
    monkeypatch.setattr(readers, "_read", refuse)
    assert fit(path).fit.format == "bitsandbytes-nf4"


def test_refusals(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert run("fit", tmp_path).code == 3  # neither layout
    assert "h100-80gb or h100-94gb" in run("fit", tiny, "--gpu", "h100").error
    assert run("fit", tiny, "--gpus", "0").code == 2
    assert run("fit", tiny, "--context", "0").code == 2
    for option in ("--gpus", "--context", "--sequences"):
        outcome = run("fit", tiny, option, "9" * 400)
        assert (outcome.code, "must be at most 1,099,511,627,776" in outcome.error) == (2, True)
    convert(tiny, tmp_path / "out")
    (tmp_path / "out" / commands.INDEX).unlink()
    outcome = run("fit", tmp_path / "out")
    assert outcome.code == 3
    assert "unfinished" in outcome.error
    with pytest.raises(UsageError, match="kv_cache_dtype"):
        fit(tiny, kv_cache_dtype="int8")


def test_a_quantization_that_is_not_known(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for body in ({"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int4"):
        (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "quantization_config": body}))
        with pytest.raises(UsageError, match="does not know"):
            fit(tmp_path / "out")


def test_a_configuration_that_contradicts_itself(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["text_config"]["num_key_value_heads"] = 4
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="num_key_value_heads"):
        fit(tmp_path / "out")


def test_json_is_one_object_also_where_the_answer_is_no(run: Run, scout: Path) -> None:
    outcome = run("fit", scout, "--gpu", "l4-24gb", "--json")
    assert outcome.code == 5
    said = outcome.json
    assert not said["fits"]
    assert {"gpu", "gpu_bytes", "weight_bytes", "runtimes"} <= said["fit"].keys()
    assert {"weights", "kv_cache", "activations", "context_overhead"} <= said["fit"].keys()
    assert all({"runtime", "fits", "max_context", "command", "note"} <= r.keys() for r in said["fit"]["runtimes"])


def test_what_is_printed_reads_back(run: Run, tiny: Path) -> None:
    assert decode(run("fit", tiny, "--json").json, Fit, "fit.json") == fit(tiny)


def test_the_docs_show_what_is_printed(scout: Path) -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "fit.md").read_text()
    verdicts = {v.name: v for v in fit(scout).verdicts}
    for name in ("bf16", "fp8", "int4"):
        assert f"{verdicts[name].weight_bytes:,} bytes" in text
    for r in verdicts["int4"].runtimes[:3]:
        assert f"{r.max_context:,} tokens" in text
    assert f"{verdicts['int4'].runtimes[0].max_context_fp8_kv:,} tokens" in text
    assert f"{largest(verdicts['nf4'], 'transformers'):,} tokens" in text
    assert f"{largest(verdicts['int4-experts'], 'vllm'):,} tokens" in text
