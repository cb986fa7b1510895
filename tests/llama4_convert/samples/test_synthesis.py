"""`synth` writes what Meta published: names, shapes, sizes and files, as Meta's own model code and torch read them."""

from __future__ import annotations

import base64
import codecs
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from llama4.geometry import Geometry
from llama4_convert import plan
from llama4_convert.errors import EnvironmentFailed, UsageError
from llama4_convert.samples.synthetic.numbers import DTYPES
from llama4_convert.samples.synthetic.params import SPECIAL_TOKENS, synth_params
from llama4_convert.samples.synthetic.synth import MARKER, synth
from llama4_convert.samples.synthetic.tensors import tensors_of
from llama4_convert.samples.synthetic.tokenizer import encode, tokenizer_model

# The package's attribute of that name is the function.
module = importlib.import_module("llama4_convert.samples.synthetic.synth")

FAMILIES = ("scout", "maverick", "guard")
# What each rank holds whole, by the ends of the names; everything else is split.
REPLICATED = re.compile(
    r"(^norm\.weight|feed_forward\.norm\.weight|layer_norm_weight|router_DE|rope\.freqs|class_embedding"
    r"|positional_embedding_vlm|ln_\w+\.(weight|bias)|attn\.wo\.bias|mlp\.c_proj\.bias)$"
)


def load(directory: Path) -> list[dict[str, Any]]:
    """The state dicts of all ranks, as torch reads them; every CRC checked on the way."""
    states = []
    for path in sorted(directory.glob("*.pth")):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        with torch.serialization.safe_globals([io.BytesIO, codecs.encode]):
            states.append(torch.load(path, weights_only=True, mmap=True))
    return states


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scout")
    synth(directory, tiny=True, ranks=2)
    return directory


# -------------------- Meta's code reads the result


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_s_own_model_loads_every_family_strictly(tmp_path: Path, family: str) -> None:
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.datatypes import TransformerInput
    from llama_models.llama4.model import Transformer

    from tests.support import meta_model

    meta_model.init()
    summary = synth(tmp_path / "m", geometry=family, tiny=True, ranks=1)
    (state,) = load(tmp_path / "m")
    params = json.loads((tmp_path / "m" / "params.json").read_text())
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Transformer(ModelArgs(**params, max_batch_size=1, max_seq_len=64)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    # Strict: nothing missing, and nothing left over once its hooks have dropped rope.freqs and the extra states.
    model.load_state_dict(state, strict=True)
    assert sum(p.numel() for p in model.parameters()) == summary.parameters

    tokens = torch.randint(params["vocab_size"], (1, 40), generator=torch.Generator().manual_seed(0))
    logits = model(TransformerInput(tokens=tokens, tokens_position=0)).logits
    assert logits.shape == (1, 40, params["vocab_size"])
    assert torch.isfinite(logits).all()
    assert 0.1 < logits.std() < 10
    image = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 40, 1, dtype=torch.bool)
    mask[0, :4] = True
    h = torch.zeros(1, 40, params["dim"], dtype=torch.bfloat16)
    with torch.inference_mode():
        seen = model.vision_projection(model.vision_embeddings([[image]], mask, h))
    assert torch.isfinite(seen).all()
    assert seen[0, :4].abs().amax(-1).min() > 0


def test_base_models_carry_statistics_that_nobody_loads(tmp_path: Path) -> None:
    synth(tmp_path / "m", geometry="maverick", tiny=True, ranks=1, base=True, layers=2, experts=3)
    (state,) = load(tmp_path / "m")
    found = {key: tuple(value.shape) for key, value in state.items() if key.endswith("E")}
    assert found == {
        "layers.1.feed_forward.router_DE": (256, 3),
        "layers.1.feed_forward.expert_activation_DE": (256, 3),
        "layers.1.feed_forward.global_gate_stats_3E": (3, 3),
        "layers.1.feed_forward.running_gate_stats_3E": (3, 3),
    }


# -------------------- the published geometry


@pytest.mark.parametrize(
    ("family", "parameters"), [("scout", 108_641_793_536), ("maverick", 401_583_781_376), ("guard", 12_001_097_216)]
)
def test_full_size_models_have_the_published_number_of_parameters(family: str, parameters: int) -> None:
    geometry = Geometry.from_params(synth_params(family))
    for ranks in (1, 8):
        assert sum(t.parameters(ranks) for t in tensors_of(geometry, ranks, base=True)) == parameters


def test_a_rank_of_scout_holds_the_published_shapes() -> None:
    plan = {t.key: t.shape for t in tensors_of(Geometry.from_params(synth_params("scout")), 8, base=False)}
    assert len(plan) == len(set(plan))
    expected = {
        "tok_embeddings.weight": (25256, 5120),
        "output.weight": (25256, 5120),
        "norm.weight": (5120,),
        "rope.freqs": (64,),
        "layers.47.attention.wqkv.weight": (896, 5120),
        "layers.47.attention.wqkv.layer_norm_weight": (5120,),
        "layers.47.attention.wqkv._extra_state": None,
        "layers.47.attention.wo.weight": (5120, 640),
        "layers.47.attention.wo._extra_state": None,
        "layers.47.feed_forward.norm.weight": (5120,),
        "layers.47.feed_forward.router_DE": (5120, 16),
        "layers.47.feed_forward.experts.moe_w_in_eD_F": (16 * 5120, 1024),
        "layers.47.feed_forward.experts.moe_w_swiglu_eD_F": (16 * 5120, 1024),
        "layers.47.feed_forward.experts.moe_w_out_eF_D": (16 * 1024, 5120),
        "layers.47.feed_forward.experts.mlp._extra_state": None,
        "layers.47.feed_forward.w_in_shared_FD.weight": (1024, 5120),
        "layers.47.feed_forward.w_swiglu_FD.weight": (1024, 5120),
        "layers.47.feed_forward.w_out_shared_DF.weight": (5120, 1024),
        "layers.47.feed_forward.mlp_shared._extra_state": None,
        "vision_projection.weight": (640, 4096),
    }
    assert {key: plan[key] for key in expected} == expected
    assert {key for key in plan if key.startswith("layers.47.")} == {key for key in expected if "47" in key}


def test_maverick_s_even_layers_are_dense() -> None:
    plan = {t.key: t.shape for t in tensors_of(Geometry.from_params(synth_params("maverick")), 8, base=False)}
    assert plan["layers.0.feed_forward.mlp.layer_norm_weight"] == (5120,)
    assert plan["layers.0.feed_forward.mlp.fc1_weight"] == (2 * 2048, 5120)
    assert plan["layers.0.feed_forward.mlp.fc2_weight"] == (5120, 2048)
    assert plan["layers.1.feed_forward.router_DE"] == (5120, 128)
    assert "layers.1.feed_forward.mlp.fc1_weight" not in plan


def test_numbers_can_be_cut() -> None:
    params = synth_params("maverick", layers=2, experts=4, vocab=1000, vision_layers=1)
    assert params["n_layers"] == 2
    assert params["moe_args"]["num_experts"] == 4
    assert params["vocab_size"] == 1000
    assert params["vision_args"]["n_layers"] == 1
    full = synth_params("maverick")  # the table itself stays whole
    assert (full["n_layers"], full["moe_args"]["num_experts"], full["vision_args"]["n_layers"]) == (48, 128, 34)


# -------------------- the values


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_replicated_tensors_are_equal_and_split_ones_differ(tmp_path: Path, ranks: int) -> None:
    synth(tmp_path / "m", geometry="maverick", tiny=True, layers=2, ranks=ranks)
    states = load(tmp_path / "m")
    assert len(states) == ranks
    assert all(list(state) == list(states[0]) for state in states)
    for key, first in states[0].items():
        if isinstance(first, torch.Tensor):
            same = [torch.equal(first, state[key]) for state in states[1:]]
            assert same == [bool(REPLICATED.search(key))] * (ranks - 1), key


def test_values_are_gaussian_of_the_right_scale(scout: Path) -> None:
    state = load(scout)[0]
    geometry = Geometry.from_params(json.loads((scout / "params.json").read_text()))
    for key, fan_in in (
        ("tok_embeddings.weight", geometry.dim),
        ("layers.0.feed_forward.experts.moe_w_out_eF_D", geometry.expert_dim),
        ("layers.0.attention.wo.weight", geometry.dim),
    ):
        z = state[key].double() * fan_in**0.5
        assert abs(z.mean()) < 0.02
        assert abs(z.std() - 1) < 0.02
        assert abs((z.abs() < 1).double().mean() - 0.6827) < 0.02
        assert 3.5 < z.abs().max() < 4.5
    assert abs(state["norm.weight"].double().mean() - 1) < 0.05
    assert state["layers.0.feed_forward.router_DE"].unique().numel() > 100


def test_the_same_seed_gives_the_same_bytes(scout: Path, tmp_path: Path) -> None:
    synth(tmp_path / "again", tiny=True, ranks=2)
    synth(tmp_path / "other", tiny=True, ranks=2, seed=1)
    for path in scout.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        if path.name != "params.json":
            assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()


def test_a_tensor_s_content_does_not_depend_on_the_rest(scout: Path, tmp_path: Path) -> None:
    synth(tmp_path / "m", tiny=True, ranks=2, layers=2, experts=3, vision_layers=1)
    for cut, whole in zip(load(tmp_path / "m"), load(scout), strict=True):
        assert set(cut) < set(whole)
        for key, value in cut.items():
            if isinstance(value, torch.Tensor) and value.shape == whole[key].shape:
                assert torch.equal(value, whole[key]), key


def test_the_dtypes_hold_the_same_numbers_rounded(tmp_path: Path) -> None:
    states = {}
    for dtype in DTYPES:
        synth(tmp_path / dtype, tiny=True, ranks=1, layers=1, dtype=dtype)
        (states[dtype],) = load(tmp_path / dtype)
    for key, value in states["float32"].items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.float32
            assert torch.equal(states["bfloat16"][key], value.bfloat16()), key
            assert torch.equal(states["float16"][key], value.half()), key


# -------------------- the files


def test_the_summary_and_the_checklist_tell_the_truth(tmp_path: Path) -> None:
    totals: list[tuple[int, int]] = []
    steps: list[int] = []
    summary = synth(tmp_path, tiny=True, layers=1, start=lambda *t: totals.append(t), progress=steps.append)
    shards = [f"consolidated.{rank:02d}.pth" for rank in range(8)]
    assert summary.files == [MARKER, *shards, "tokenizer.model", "checklist.chk", "params.json"]
    assert sorted(summary.files) == sorted(path.name for path in tmp_path.iterdir())
    assert summary.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    listed = dict(line.split("  ")[::-1] for line in (tmp_path / "checklist.chk").read_text().splitlines())
    assert set(listed) == {*shards, "tokenizer.model", "params.json"}
    for name, digest in listed.items():
        assert hashlib.md5((tmp_path / name).read_bytes()).hexdigest() == digest
    tensors = sum(v.nbytes for state in load(tmp_path) for v in state.values() if isinstance(v, torch.Tensor))
    assert totals == [(tensors, 0)]
    assert sum(steps) == tensors


def test_the_tokenizer_and_the_vocabulary_agree(scout: Path) -> None:
    tokenizer = pytest.importorskip("llama_models.llama4.tokenizer").Tokenizer(scout / "tokenizer.model")
    assert tokenizer.n_words == json.loads((scout / "params.json").read_text())["vocab_size"]
    text = "the quick brown fox jumps over the lazy dog, 123\n\u00e9\u4f60"
    ids = tokenizer.encode(text, bos=True, eos=False)
    assert tokenizer.decode(ids[1:]) == text
    assert len(ids) - 1 < len(text.encode())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_token_is_one_merge_of_two_earlier_ones(seed: int) -> None:
    lines = tokenizer_model(1000, seed).decode().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split(" ") for line in lines)}
    assert list(ranks.values()) == list(range(1000))
    assert list(ranks)[:256] == [bytes([value]) for value in range(256)]
    earlier = {bytes([value]): value for value in range(256)}
    for token, rank in list(ranks.items())[256:]:
        assert len(encode(earlier, token)) == 2
        earlier[token] = rank
    assert tokenizer_model(1000, seed) == tokenizer_model(1000, seed)
    assert tokenizer_model(1000, seed) != tokenizer_model(1000, seed + 1)


def test_an_earlier_synthetic_checkpoint_is_replaced(tmp_path: Path) -> None:
    synth(tmp_path, tiny=True, layers=1, ranks=2)
    (tmp_path / "consolidated.01.pth.part").write_bytes(b"left by a run that was cut off")
    summary = synth(tmp_path, tiny=True, layers=1, ranks=1)
    assert sorted(summary.files) == sorted(path.name for path in tmp_path.iterdir())
    assert len(load(tmp_path)) == 1


@pytest.mark.parametrize("stranger", ["consolidated.00.pth", "notes.txt"])
def test_anything_else_is_left_alone(tmp_path: Path, stranger: str) -> None:
    # A real checkpoint has our names but not our marker.
    (tmp_path / stranger).write_bytes(b"precious")
    with pytest.raises(UsageError, match=f"holds {stranger} and no earlier synthetic checkpoint"):
        synth(tmp_path, tiny=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(stranger, b"precious")]


def test_a_stranger_beside_our_files_is_left_alone(tmp_path: Path) -> None:
    synth(tmp_path, tiny=True, layers=1, ranks=1)
    (tmp_path / "notes.txt").touch()
    before = {path.name: path.stat() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=r"holds notes.txt"):
        synth(tmp_path, tiny=True)
    assert {path.name: path.stat() for path in tmp_path.iterdir()} == before


def test_a_file_is_no_destination(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a directory"):
        synth(tmp_path / "file", tiny=True)


def test_a_failed_run_leaves_no_params_and_can_be_repeated(tmp_path: Path) -> None:
    synth(tmp_path, tiny=True, layers=1, ranks=2)

    size = (tmp_path / "consolidated.00.pth").stat().st_size
    done = 0

    def stop(n: int) -> None:
        nonlocal done
        done += n
        if done > size * 1.5:  # in the middle of the second rank
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth(tmp_path, tiny=True, layers=1, ranks=2, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["consolidated.00.pth", MARKER]
    synth(tmp_path, tiny=True, layers=1, ranks=2)
    assert len(load(tmp_path)) == 2


def test_too_little_space_is_told_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1_000_000))
    with pytest.raises(EnvironmentFailed, match=r"[\d,]{9,} bytes are needed and 1,000,000 are free"):
        synth(tmp_path / "a" / "b", tiny=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("geometry", FAMILIES)
@pytest.mark.parametrize("base", [False, True])
def test_the_space_asked_for_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, geometry: str, base: bool
) -> None:
    asked = []
    prepare = module._prepare
    monkeypatch.setattr(module, "_prepare", lambda path, needed: (asked.append(needed), prepare(path, needed)))
    summary = synth(tmp_path, geometry=geometry, tiny=True, ranks=8, base=base)
    assert summary.bytes <= asked[0] < 1.5 * summary.bytes


def test_a_refusing_system_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailed, match="writing a checkpoint into"):
        synth(tmp_path / "file" / "dst", tiny=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"geometry": "behemoth"}, "geometry 'behemoth' is not known: choose one of scout, maverick, guard"),
        ({"dtype": "int8"}, "dtype 'int8' is not known: choose one of bfloat16, float16, float32"),
        ({"ranks": 3}, r"3 ranks do not divide n_heads \(16\): choose one of 1, 2, 4, 8"),
        ({"ranks": 16}, r"16 ranks do not divide n_kv_heads \(8\): choose one of 1, 2, 4, 8"),
        ({"ranks": 0}, "0 ranks do not divide"),
        ({"ranks": 4, "vocab": 2306}, r"4 ranks do not divide vocab_size \(2306\): choose one of 1, 2"),
        ({"vocab": 2296}, "a vocabulary of 2296 has no room for 256 bytes and 2048 special tokens"),
        ({"layers": 0}, "n_layers must be at least 1, not 0"),
        ({"experts": 0}, "num_experts must be at least 1, not 0"),
        ({"geometry": "guard", "experts": 4}, "guard is a dense model"),
    ],
)
def test_impossible_sizes_are_usage_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        synth(tmp_path / "m", tiny=True, **options)
    assert not list(tmp_path.iterdir())


def test_the_smallest_vocabulary_is_bytes_and_special_tokens(tmp_path: Path) -> None:
    synth(tmp_path, tiny=True, layers=1, ranks=1, vocab=256 + SPECIAL_TOKENS)
    assert len((tmp_path / "tokenizer.model").read_text().splitlines()) == 256


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_full_width_takes_the_memory_of_a_chunk_and_no_torch(tmp_path: Path) -> None:
    # One layer and a vocabulary of eight words: 450 MB, its largest tensor 168 MB.
    script = (
        "import sys, resource, numpy\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "idle = peak()\n"
        "from llama4_convert.samples.synthetic.synth import synth\n"
        "summary = synth(sys.argv[1], geometry='guard', layers=1, vocab=8, vision_layers=1)\n"
        "assert not {'torch', 'mappings'} & set(sys.modules)\n"
        "print(peak() - idle, *summary.files)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    grown, *files = run.stdout.split()
    assert int(grown) < 64 * 1024
    # No tokenizer of the full vocabulary can be made up, and MD5 sums of full-size files take too long.
    assert files == [MARKER, "consolidated.00.pth", "params.json"]
    (tmp_path / "m" / "consolidated.00.pth").unlink()  # pytest keeps the directories of three runs


def test_a_sparse_model_is_zeros_that_take_no_space(tmp_path: Path) -> None:
    assert synth(tmp_path / "dense", tiny=True, ranks=2).sparse is False
    assert synth(tmp_path / "sparse", tiny=True, ranks=2, sparse=True).sparse is True
    for dense, sparse in zip(load(tmp_path / "dense"), load(tmp_path / "sparse"), strict=True):
        assert dense.keys() == sparse.keys()
        tensors = [(dense[key], sparse[key]) for key in dense if isinstance(dense[key], torch.Tensor)]
        assert len(tensors) > 50
        assert all(a.shape == b.shape and a.dtype == b.dtype and not b.any() for a, b in tensors)
    name = "consolidated.01.pth"
    assert (tmp_path / "dense" / name).stat().st_size == (tmp_path / "sparse" / name).stat().st_size


def test_a_sparse_scout_of_full_size_can_be_planned(tmp_path: Path) -> None:
    synth(tmp_path / "m", sparse=True)
    files = list((tmp_path / "m").iterdir())
    assert sum(file.stat().st_size for file in files) > 217e9
    if all(hasattr(file.stat(), "st_blocks") for file in files):
        assert sum(file.stat().st_blocks for file in files) * 512 < 64 << 20
    planned = plan(tmp_path / "m")
    assert planned.parameters == 108_641_793_536
    assert planned.output_bytes > 217_283_587_072
    shutil.rmtree(tmp_path / "m")  # nobody should back this up
