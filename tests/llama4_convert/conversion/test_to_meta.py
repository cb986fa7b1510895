"""`export`: what Meta's own code wrote comes back bit by bit, at any rank count, and Meta's own code runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from llama_models.llama4.tokenizer import Tokenizer

from llama4.config import Llama4Config
from llama4.geometry import Geometry
from llama4_convert import convert, export, inspect, synth, verify
from llama4_convert.checkpoints.pth import PthIndex
from llama4_convert.errors import BadInput, UsageError
from llama4_convert.metadata.params import params_json
from llama4_convert.metadata.tokenizer import tokenizer_files, tokenizer_model
from llama4_convert.validation.parity.transformers_runner import load_transformers
from tests.support import commands, meta_model

GEOMETRIES = list(meta_model.GEOMETRIES)
DROPPED = ("rope.freqs", "_extra_state", "gate_stats_3E", "expert_activation_DE")


def tensors(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Of each rank file, as torch reads it; what convert drops is left out."""
    return [
        {key: value for key, value in torch.load(path, weights_only=False).items() if not key.endswith(DROPPED)}
        for path in sorted(folder.glob("consolidated.*.pth"))
    ]


def assert_equal(found: Path, expected: Path) -> None:
    ranks, truth = tensors(found), tensors(expected)
    assert len(ranks) == len(truth)
    for mine, its in zip(ranks, truth, strict=True):
        assert mine.keys() == its.keys()
        for key, tensor in its.items():
            assert mine[key].dtype == tensor.dtype
            assert torch.equal(mine[key], tensor), key
            assert mine[key].is_contiguous()


def possible_ranks(geometry: str) -> list[int]:
    """Those at which Meta's modules can be cut."""
    params = meta_model.GEOMETRIES[geometry]
    params = params.get("model", params)
    heads = [params.get("n_kv_heads") or params["n_heads"], (params.get("vision_args") or {}).get("n_heads", 8)]
    return [n for n in (1, 2, 4, 8) if not any(count % n for count in heads)]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_it_is_what_metas_code_wrote(meta_checkpoint: Callable[..., Any], tmp_path: Path, geometry: str) -> None:
    """Meta -> Transformers -> Meta, and Meta -> Meta, from two ranks to each number that its modules can be cut into."""
    ranks = possible_ranks(geometry)
    source = meta_checkpoint(geometry, 2 if 2 in ranks else 1).src
    convert(source, tmp_path / "hf")
    for n in ranks:
        try:
            truth = meta_checkpoint(geometry, n).src
        except (ValueError, RuntimeError):
            continue  # widths that so many ranks cannot share
        for start in ("hf", "meta"):
            target = tmp_path / f"{start}-{n}"
            result = export(tmp_path / "hf" if start == "hf" else source, target, ranks=n)
            assert result.ranks == n
            assert_equal(target, truth)
            assert json.loads((target / "params.json").read_text()) == meta_model.GEOMETRIES[geometry]
            assert (target / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
            assert verify(target).ok


@pytest.mark.parametrize("spelling", ["published", "module", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_spelling_is_the_recorded_one(
    meta_checkpoint: Callable[..., Any], tmp_path: Path, spelling: str, dtype: torch.dtype
) -> None:
    source = meta_checkpoint("maverick", 2, spelling=spelling, dtype=dtype).src
    convert(source, tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "back")  # to as many ranks as there were
    assert_equal(tmp_path / "back", source)


@pytest.mark.parametrize("layout", ["views", "one_storage", "parameters"])
def test_other_storages(meta_checkpoint: Callable[..., Any], tmp_path: Path, layout: str) -> None:
    source = meta_checkpoint("scout", 2, layout=layout).src
    export(source, tmp_path / "out", ranks=4)
    assert_equal(tmp_path / "out", meta_checkpoint("scout", 4).src)


@pytest.mark.parametrize("geometry", ["scout", "maverick", "guard", "top2"])
def test_metas_own_code_runs_it(meta_checkpoint: Callable[..., Any], tmp_path: Path, geometry: str) -> None:
    checkpoint = meta_checkpoint(geometry, 2)
    convert(checkpoint.src, tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "one", ranks=1)
    params = json.loads((tmp_path / "one" / "params.json").read_text())
    model = meta_model.build(params, seed=1)  # other numbers
    state = torch.load(tmp_path / "one" / "consolidated.00.pth", weights_only=True)
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert not unexpected
    assert not [key for key in missing if not key.endswith(DROPPED)]
    tokens = meta_model.text_tokens(checkpoint.model, 24)
    assert torch.equal(meta_model.logits(model, tokens), meta_model.logits(checkpoint.model, tokens))
    assert Tokenizer(tmp_path / "one" / "tokenizer.model").n_words == meta_model.VOCAB_SIZE


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_from_what_transformers_saved(meta_checkpoint: Callable[..., Any], tmp_path: Path, geometry: str) -> None:
    """No manifest and no params.json are left: the spelling is the published one, and params.json is made of config.json."""
    checkpoint = meta_checkpoint(geometry, 1)
    convert(checkpoint.src, tmp_path / "hf")
    model = load_transformers(tmp_path / "hf", torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    shutil.copy(tmp_path / "hf" / "tokenizer.json", tmp_path / "saved")
    export(tmp_path / "saved", tmp_path / "back", ranks=1)
    assert_equal(tmp_path / "back", checkpoint.src)
    made = Geometry.from_params(json.loads((tmp_path / "back" / "params.json").read_text()))
    kept = Geometry.from_params(meta_model.GEOMETRIES[geometry])
    sizes = made.vocab_size or 0, made.n_experts or 0, made.expert_dim or 0, made.dense_dim or 0
    # What params.json leaves open, and intervals beyond the layers, are said in other ways that mean the same.
    first, second = (Llama4Config.from_geometry(g.completed(*sizes)) for g in (kept, made))
    assert first == second
    # Meta's own constructors make the same widths of it.
    shapes = {
        key: value.shape
        for key, value in meta_model.build(json.loads((tmp_path / "back" / "params.json").read_text()), seed=0)
        .state_dict()
        .items()
    }
    assert shapes == {key: value.shape for key, value in checkpoint.model.state_dict().items()}


@hypothesis.given(
    dim=st.integers(1, 40).map(lambda n: 16 * n),
    dense=st.integers(1, 5000),
    expert=st.integers(1, 5000),
    published=st.booleans(),
)
@hypothesis.settings(max_examples=300)
def test_params_that_make_any_width(dim: int, dense: int, expert: int, published: bool) -> None:
    geometry = Geometry.from_params(
        {**meta_model.GEOMETRIES["maverick"], "dim": dim, "n_heads": 8, "head_dim": dim // 8, "n_kv_heads": 4}
    )
    if published:
        dense, expert = -(-int(1.2 * int(8 * dim / 3)) // 2048) * 2048, expert
    wanted = Llama4Config.from_geometry(replace(geometry, dense_dim=dense, expert_dim=expert))
    params = json.loads(params_json(wanted))
    made = Geometry.from_params(params)
    assert (made.dense_dim, made.expert_dim) == (dense, expert)
    args = meta_model.model_args(params)  # Meta's own formula
    hidden = int(2 * int(args.ffn_exp * args.dim) / 3)
    hidden = int(int(args.ffn_dim_multiplier * hidden) / (args.moe_args.capacity_factor + 1))
    assert hidden + -hidden % args.multiple_of == expert


def test_published_geometries_get_the_published_factors(tmp_path: Path) -> None:
    for name in ("scout", "maverick"):
        synth(tmp_path / name, geometry=name, layers=2, sparse=True, experts=2, vocab=4096)
        published = json.loads((tmp_path / name / "params.json").read_text())
        g = Geometry.from_params(published)
        params = json.loads(params_json(Llama4Config.from_geometry(g)))
        for field in ("multiple_of", "ffn_dim_multiplier", "ffn_exp", "moe_args", "vision_args", "rope_theta"):
            assert params[field] == published[field], (name, field)


def test_the_real_tokenizer_comes_back(tmp_path: Path) -> None:
    import llama_models.llama4

    data = (Path(llama_models.llama4.__file__).parent / "tokenizer.model").read_bytes()
    made = tokenizer_files(data, variant="instruct", vision=True, max_length=1000)["tokenizer.json"]
    assert tokenizer_model(made) == data


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"added_tokens": [], "model": {"vocab": {"a": 0}}}',
        b'{"added_tokens": [], "model": {"vocab": {"\xe4\xb8\xad": 0}}}',
        b'{"added_tokens": 3, "model": {"vocab": {}}}',
    ],
)
def test_tokenizers_of_others(body: bytes) -> None:
    with pytest.raises(BadInput):
        tokenizer_model(body)


def test_special_tokens_elsewhere(meta_checkpoint: Callable[..., Any]) -> None:
    data = (meta_checkpoint("scout", 1).src / "tokenizer.model").read_bytes()
    body = json.loads(tokenizer_files(data, variant="instruct", vision=True, max_length=100)["tokenizer.json"])
    body["added_tokens"][0]["id"] += 7
    with pytest.raises(BadInput, match=r"has <\|begin_of_text\|> at 271, Llama 4 at 264"):
        tokenizer_model(json.dumps(body).encode())


class TestRefused:
    def test_ranks_that_cannot_share_a_tensor(self, meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
        source = meta_checkpoint("guard", 1).src
        with pytest.raises(BadInput, match="2312 rows cannot be shared by 3 ranks: take 1 or 2 or 4 or 8 ranks"):
            export(source, tmp_path / "out", ranks=3)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("ranks", [0, -1, 129])
    def test_numbers_of_ranks(self, tmp_path: Path, ranks: int) -> None:
        with pytest.raises(UsageError, match="ranks must be from 1 to 128"):
            export(tmp_path, tmp_path / "out", ranks=ranks)

    def test_a_quantized_directory(self, tmp_path: Path) -> None:
        synth(tmp_path / "meta", tiny=True)
        convert(tmp_path / "meta", tmp_path / "int4", recipe="int4")
        with pytest.raises(UsageError, match="is quantized: export what it was made from"):
            export(tmp_path / "int4", tmp_path / "out")

    def test_layers_that_follow_no_interval(self, converted: Callable[[str], Path], tmp_path: Path) -> None:
        changed = commands.copy(converted("scout"), tmp_path / "hf")
        config = json.loads((changed / "config.json").read_text())
        config["text_config"]["no_rope_layers"][0] ^= 1
        (changed / "config.json").write_text(json.dumps(config))
        said: list[str] = []
        with pytest.raises(BadInput, match="no_rope_layers"):
            export(changed, tmp_path / "out", warn=said.append)

    def test_onto_its_source(self, converted: Callable[[str], Path], tmp_path: Path) -> None:
        source = commands.copy(converted("scout"), tmp_path / "hf")
        with pytest.raises(UsageError, match="would overwrite the source"):
            export(source, source)

    def test_into_what_is_there(
        self, converted: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "out"
        export(converted("scout"), target, ranks=2)
        outcome = commands.run(capsys, "export", converted("scout"), target, "--ranks", 4)
        assert outcome.code == 2
        assert "holds another conversion: ranks 2 there, 4 now" in outcome.error
        assert "--overwrite" in outcome.error
        export(converted("scout"), target, ranks=1, overwrite=True)
        assert [path.name for path in target.glob("*.pth")] == ["consolidated.00.pth"]


def test_a_vocabulary_that_grew_since(converted: Callable[[str], Path], tmp_path: Path) -> None:
    """original/params.json no longer says what config.json does: it is made anew, and that is said."""
    from safetensors.torch import load_file, save_file

    hf = (
        commands.copy(converted("text"), tmp_path / "hf")
        if "text" in GEOMETRIES
        else commands.copy(converted("guard"), tmp_path / "hf")
    )
    (hf / "llama4-convert.json").unlink()  # which says what the file was
    (path,) = hf.glob("*.safetensors")
    content = load_file(path)
    grown = 0
    for key in list(content):
        if key.endswith(("embed_tokens.weight", "lm_head.weight")):
            content[key] = torch.cat([content[key], torch.zeros(8, content[key].shape[1], dtype=content[key].dtype)])
            grown = len(content[key])
    save_file(content, path, metadata={"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    (config.get("text_config") or config)["vocab_size"] = grown
    (hf / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    export(hf, tmp_path / "out", ranks=2, warn=said.append)
    assert any("nothing says what its files should be" in text for text in said)
    assert any("params.json is made of config.json" in text and "vocab_size" in text for text in said)
    assert json.loads((tmp_path / "out" / "params.json").read_text())["vocab_size"] == grown


def test_a_source_without_a_tokenizer(converted: Callable[[str], Path], tmp_path: Path) -> None:
    hf = commands.copy(converted("guard"), tmp_path / "hf")
    (hf / "tokenizer.json").unlink()
    said: list[str] = []
    result = export(hf, tmp_path / "out", warn=said.append)
    assert said == result.warnings == ["the source has no tokenizer: copy tokenizer.model from the model's page"]
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_text_only(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    source = meta_checkpoint("scout", 2).src
    convert(source, tmp_path / "hf", text_only=True)
    export(tmp_path / "hf", tmp_path / "back")
    assert "vision_args" not in json.loads((tmp_path / "back" / "params.json").read_text())
    for mine, its in zip(tensors(tmp_path / "back"), tensors(source), strict=True):
        assert mine.keys() == {key for key in its if not key.startswith("vision_")}
        assert all(torch.equal(tensor, its[key]) for key, tensor in mine.items())


def test_a_linearized_directory(tmp_path: Path) -> None:
    """Experts one by one, as recipes leave those that they do not quantize."""
    from safetensors.torch import load_file, save_file

    synth(tmp_path / "meta", tiny=True, ranks=2)
    convert(tmp_path / "meta", tmp_path / "hf")
    linear = commands.copy(tmp_path / "hf", tmp_path / "linear")
    (linear / "llama4-convert.json").unlink()  # which says what the files were
    (path,) = linear.glob("*.safetensors")
    content = load_file(path)
    for key in list(content):
        if key.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(content.pop(key)):
                for name, part in zip(("gate", "up"), expert.chunk(2, dim=1), strict=True):
                    content[key.replace("gate_up_proj", f"{i}.{name}_proj.weight")] = part.T.contiguous()
        elif key.endswith("experts.down_proj"):
            for i, expert in enumerate(content.pop(key)):
                content[key.replace("down_proj", f"{i}.down_proj.weight")] = expert.T.contiguous()
    save_file(content, path, metadata={"format": "pt"})
    (linear / "model.safetensors.index.json").unlink()
    path.rename(linear / "model.safetensors")
    export(linear, tmp_path / "back", ranks=2)
    assert_equal(tmp_path / "back", tmp_path / "meta")


def test_every_rank_file_has_its_crcs(converted: Callable[[str], Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    export(converted("scout"), target, ranks=2)
    (target / "llama4-convert.json").unlink()  # Meta's directory, as any other
    assert verify(target).ok
    record = max(PthIndex.read(target / "consolidated.01.pth").records, key=lambda r: r.size)
    commands.flip(target / "consolidated.01.pth", record.offset + record.size // 2)
    assert not verify(target).ok


def test_where_ranks_part_a_head_metas_loader_takes_q_k_and_v_apart(tmp_path: Path) -> None:
    """It splits `wqkv` by rows a head, which must be whole; the spelling is recorded, and comes back with the ranks."""
    params = meta_model.GEOMETRIES["text_only"] | {"dim": 72, "n_heads": 12, "n_kv_heads": 4, "head_dim": 6}
    model = meta_model.build(params, seed=0)
    source = meta_model.write_checkpoint(model, params, tmp_path / "src", ranks=2, extra=False)
    told = export(source, tmp_path / "four", ranks=4)
    assert [w.partition(":")[0] for w in told.warnings] == ["attention.wqkv.weight is written as wq, wk and wv"]
    truth = tensors(meta_model.write_checkpoint(model, params, tmp_path / "truth", ranks=4, spelling="module"))
    for rank, state in enumerate(tensors(tmp_path / "four")):
        assert "layers.0.attention.wqkv.weight" not in state
        for name in "qkv":
            key = f"layers.0.attention.w{name}.weight"
            assert torch.equal(state[key], truth[rank][key])
    export(tmp_path / "four", tmp_path / "back", ranks=2)
    assert_equal(tmp_path / "back", source)
    convert(source, tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "of-hf", ranks=4)
    assert_equal(tmp_path / "of-hf", tmp_path / "four")
    published = meta_model.write_checkpoint(model, params, tmp_path / "published", ranks=4, extra=False)
    convert(published, tmp_path / "hf4")
    export(tmp_path / "hf4", tmp_path / "one", ranks=1)
    for start in ("hf4", "one"):  # what came so goes back so
        export(tmp_path / start, tmp_path / f"{start}-back", ranks=4)
        assert_equal(tmp_path / f"{start}-back", published)


def test_an_export_is_converted_to_the_same_directory(meta_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """What tells a base model is not exported, but that it is one is recorded."""
    source = meta_checkpoint("scout", 2).src
    assert convert(source, tmp_path / "hf").variant == "base"
    expected = commands.digests(tmp_path / "hf")
    for number, start in enumerate((source, tmp_path / "hf", tmp_path / "meta-0")):
        export(start, tmp_path / f"meta-{number}", ranks=4)
        told = convert(tmp_path / f"meta-{number}", tmp_path / f"hf-{number}")
        assert told.variant_reason == "its llama4-convert.json says so: it was exported from such a model"
        found = commands.digests(tmp_path / f"hf-{number}")
        assert {name for name in expected if found.pop(name) != expected[name]} <= {"README.md", "llama4-convert.json"}
        assert not found


def test_an_interrupted_export_goes_on(converted: Callable[[str], Path], tmp_path: Path) -> None:
    source = converted("scout")
    export(source, tmp_path / "straight", ranks=4)

    stop = commands.stopping_after(1.6 * inspect(source).bytes)  # all of it is checked, then read
    with pytest.raises(commands.Stop):
        export(source, tmp_path / "out", ranks=4, progress=stop)
    assert not (tmp_path / "out" / "params.json").exists()
    assert not verify(tmp_path / "out").ok
    result = export(source, tmp_path / "out", ranks=4)
    assert result.files_kept_from_earlier_run > 0
    assert commands.digests(tmp_path / "out") == commands.digests(tmp_path / "straight")
    assert export(source, tmp_path / "out", ranks=4).status == "already complete"


def test_the_command(converted: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = commands.run(capsys, "export", converted("scout"), tmp_path / "out", "--json")
    assert outcome.code == 0
    assert outcome.json["ranks"] == 2
    assert {one["file"] for one in outcome.json["files"]} >= {"consolidated.00.pth", "params.json", "tokenizer.model"}
    assert outcome.json["parameters"] == inspect(converted("scout")).parameters
    again = commands.run(capsys, "export", converted("scout"), tmp_path / "out")
    assert "is complete already" in again.out
    fewer = commands.run(capsys, "export", tmp_path / "out", tmp_path / "one", "--ranks", 1)
    assert "in 1 rank file" in fewer.out
