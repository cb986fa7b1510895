"""The trained model that ships with the demo: Meta's code loads it, and it has learnt something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_models.llama4.args import ModelArgs
from llama_models.llama4.datatypes import MaskedEmbedding, TransformerInput
from llama_models.llama4.model import Transformer
from PIL import Image, ImageDraw
from torch import Tensor

from llama4.model import Llama4ForCausalLM
from llama4_convert import generate, load_reference, plan, samples
from llama4_convert.reference.tokenization import TextTokenizer
from llama4_convert.samples.corpus import Words
from llama4_convert.samples.pictures import pixel_values
from llama4_convert.samples.train_demo import next_token_loss
from tests.support import meta_model

MODEL = Path(samples.__file__).parent / "demo_model"
RANKS = [MODEL / "consolidated.00.pth", MODEL / "consolidated.01.pth"]

# Written for this test, so that no version of Python has taught it.
PROSE = """A function is called with a list of arguments. If the number of arguments does not match the parameters in the
definition, a "TypeError" exception is raised. When a class defines the method, the interpreter looks it up on the type
of the object and not on the instance itself.

The return value of the expression is a new list. If the object is not an iterator, the statement raises an exception,
and the name is not bound in the local scope. Names that are assigned in a nested block are visible in that block only,
unless they have been declared to be global. For example, the following code opens a file and reads its lines, and the
file is closed at the end of the block, even if an error occurs.
"""


@pytest.fixture(scope="module")
def reference() -> Llama4ForCausalLM:
    return load_reference(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def words() -> Words:
    return Words(TextTokenizer.open(MODEL))


@pytest.fixture(scope="module")
def meta() -> Any:
    """Meta's model with the shipped weights: its own hooks read each rank's file, and its layers say how ranks join."""
    meta_model.init()
    params = json.loads((MODEL / "params.json").read_text())
    model = Transformer(ModelArgs(**params, max_batch_size=1, max_seq_len=512)).float().eval()
    ranks = [torch.load(path, weights_only=True) for path in RANKS]
    for state in ranks:
        for path, module in model.named_modules():
            if hasattr(module, "load_hook"):
                module.load_hook(state, f"{path}." if path else "", {}, True, [], [], [])
    joined = {
        name: ranks[0][name] if dim is None else torch.cat([state[name] for state in ranks], dim)
        for name, dim in meta_model.split_dims(model).items()
    }
    # What Meta's loader has no place for are a base model's statistics.
    assert {name.rpartition(".")[2] for name in ranks[0].keys() - joined.keys()} == {
        "expert_activation_DE",
        "global_gate_stats_3E",
        "running_gate_stats_3E",
    }
    for name in joined:
        if meta_model.split_dims(model)[name] is None:
            assert torch.equal(*(state[name] for state in ranks)), name
    missing, unexpected = model.load_state_dict(joined, strict=False)
    assert not unexpected
    assert not set(missing) & joined.keys()
    return model


def metas_logits(model: Any, tokens: Tensor, pixels: Tensor | None = None, patch: int = -1) -> Tensor:
    with torch.inference_mode():
        image = None
        if pixels is not None:
            mask = (tokens == patch).unsqueeze(-1)
            embedding = model.vision_embeddings([[pixels]], mask, model.tok_embeddings(tokens))
            image = MaskedEmbedding(embedding=embedding, mask=mask)
        output: Tensor = model(TransformerInput(tokens=tokens, tokens_position=0, image_embedding=image)).logits
    return output.clone()


def test_metas_code_makes_the_same_logits(meta: Any, reference: Llama4ForCausalLM, words: Words) -> None:
    tokens = torch.tensor([words.document(PROSE + PROSE)])
    assert tokens.shape[1] > 2 * reference.config.text_config.attention_chunk_size  # type: ignore[operator]
    torch.testing.assert_close(reference(tokens), metas_logits(meta, tokens), atol=1e-4, rtol=0)


def test_metas_code_sees_the_same_picture(meta: Any, reference: Llama4ForCausalLM, words: Words) -> None:
    tokens = torch.tensor([[*words.picture, *words.tokenizer.encode(" A red circle on a white ground.")]])
    pixels = pixel_values([red_circle()])
    expected = metas_logits(meta, tokens, pixels, words.patch)
    torch.testing.assert_close(reference(tokens, pixels), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(reference(tokens, -pixels), expected, atol=1)


def test_it_knows_how_documentation_sounds(reference: Llama4ForCausalLM, words: Words) -> None:
    tokens = torch.tensor([words.document(PROSE)])
    with torch.inference_mode():
        loss = next_token_loss(reference, tokens, first=1).item()
        backwards = next_token_loss(reference, tokens.flip(1), first=1).item()
    assert loss < 4.7
    assert backwards > loss + 2


def red_circle() -> Image.Image:
    picture = Image.new("RGB", (56, 56), (250, 250, 245))
    ImageDraw.Draw(picture).ellipse((11, 17, 40, 46), fill=(225, 10, 15))
    return picture


def test_it_names_a_red_circle(tmp_path: Path) -> None:
    red_circle().save(tmp_path / "circle.png")
    text = generate(MODEL, "<|image|>", image=tmp_path / "circle.png", max_new_tokens=16, dtype="float32").text
    assert {"red", "circle"} <= set(text.split())


def test_the_files_are_small_and_say_where_the_text_came_from() -> None:
    files = sorted(MODEL.iterdir())
    assert [file.name for file in files] == [
        "README.md",
        "consolidated.00.pth",
        "consolidated.01.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert sum(file.stat().st_size for file in files) < 12_000_000
    assert "PSF" in (MODEL / "README.md").read_text()


def test_it_is_taken_for_a_base_model() -> None:
    assert plan(MODEL).variant == "base"
