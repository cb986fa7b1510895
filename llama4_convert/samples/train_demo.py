"""Trains the small Llama 4 of `llama4_convert/samples/demo_model` from what ships with Python, and writes it as Meta would.

    python -m llama4_convert.samples.train_demo OUT

It learns text from pydoc's topics and the docstrings and comments of the standard library, and pictures from drawings of
one coloured shape with a caption. Some 20 minutes on two cores of their own; OUT/README.md says what came out.
"""

from __future__ import annotations

import argparse
import ast
import base64
import html
import json
import math
import os
import platform
import re
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from llama4.config import Llama4Config, Llama4TextConfig
from llama4.geometry import Geometry
from llama4.weights import parameter_shapes
from llama4_convert.metadata.tokenizer import N_SPECIAL, WORD_PATTERN
from llama4_convert.reference.checkpoint import load_reference
from llama4_convert.reference.tokenization import TextTokenizer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from torch.optim import Optimizer

    from llama4.loading import DictWeights
    from llama4.model import Llama4ForCausalLM

SEED = 0
RANKS = 2
N_PLAIN = 2048  # 256 bytes and 1,792 merges
LENGTH, SEQUENCES = 512, 4  # of text, a step
WEIGHT_DECAY = 0.1
CAPTION_WEIGHT, BALANCE_WEIGHT = 0.5, 0.02
TOWER_FILE = "tower.pt"


@dataclass(frozen=True)
class Stage:
    steps: int
    warm_up: int
    rate: float
    pictures: int  # a step

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a half cosine to a hundredth."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


LANGUAGE = Stage(steps=1800, warm_up=100, rate=2e-3, pictures=16)
TOWER = Stage(steps=800, warm_up=100, rate=2e-3, pictures=64)
JOIN = Stage(steps=150, warm_up=20, rate=5e-4, pictures=32)
POLISH = Stage(steps=120, warm_up=20, rate=5e-4, pictures=64)

# A Maverick in small: dense and MoE layers by turns, every fourth layer NoPE. The widths follow: 512 dense, 128 experts.
PARAMS: dict[str, Any] = {
    "dim": 256,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": N_PLAIN + N_SPECIAL,
    "multiple_of": 128,
    "ffn_dim_multiplier": 0.75,
    "ffn_exp": 2.0,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "use_qk_norm": True,
    "nope_layer_interval": 4,
    "attention_chunk_size": 128,
    "attn_temperature_tuning": True,
    "floor_scale": 128.0,
    "attn_scale": 0.1,
    "moe_args": {
        "num_experts": 4,
        "capacity_factor": 1.0,
        "auto_scale_F": True,
        "top_k": 1,
        "interleave_moe_layer_step": 2,
    },
    "vision_args": {
        "image_size": {"height": 56, "width": 56},
        "patch_size": {"height": 14, "width": 14},
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "mlp_ratio": 4.0,
        "output_dim": 128,
        "pixel_shuffle_ratio": 0.5,
    },
}


def train_language(out: Path) -> None:
    """The whole model, on text and pictures. In so few pictures it learns the colours and hardly the shapes."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    topics, _, library = texts()
    (out / "params.json").write_text(json.dumps(PARAMS, indent=2) + "\n")
    (out / "tokenizer.model").write_bytes(tokenizer_model([*topics, *library]))
    words = Words(TextTokenizer.open(out))
    torch.manual_seed(SEED)
    train_jointly(out, words, initial(meta_config(words)), Random(SEED), LANGUAGE)


def train_tower(out: Path) -> None:
    """A vision tower on pictures alone, which it classifies: much cheaper than to learn shapes from captions."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    from llama4.model import Llama4ForConditionalGeneration

    torch.manual_seed(SEED)
    random = Random(SEED + 2)
    config = meta_config(Words(TextTokenizer.open(out)))
    weights = initial(config)
    model = Llama4ForConditionalGeneration(config, weights)
    traits = (SHAPES, COLOURS, GROUNDS)
    sizes = [len(names) for names in traits]
    classifier = torch.nn.Linear(4 * config.text_config.hidden_size, sum(sizes))
    tower = {name: tensor for name, tensor in weights.items() if name.startswith("vision.")}
    parameters = [*tower.values(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    for step in range(TOWER.steps):
        set_rate(optimizer, TOWER.rate_at(step))
        kinds = [random_picture(random) for _ in range(TOWER.pictures)]
        features = model.image_features(pixel_values([draw(*kind, random) for kind in kinds]))
        guesses = classifier(features.view(TOWER.pictures, -1)).split(sizes, dim=1)
        loss = torch.zeros(())
        for i, (names, guess) in enumerate(zip(traits, guesses, strict=True)):
            loss = loss + F.cross_entropy(guess, torch.tensor([names.index(kind[i]) for kind in kinds]))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"{step + 1} pictures {loss.item():.3f}", flush=True)
    torch.save({name: tensor.detach() for name, tensor in tower.items()}, out / TOWER_FILE)


def join(out: Path) -> None:
    """The tower into the model, and all of it a little further on text and pictures."""
    import torch

    train_further(out, torch.load(out / TOWER_FILE, weights_only=True), Random(SEED + 3), JOIN)
    (out / TOWER_FILE).unlink()


def polish(out: Path) -> None:
    """Once more, with more pictures: the shapes have only just reached the captions."""
    train_further(out, {}, Random(SEED + 4), POLISH)


def train_further(out: Path, replaced: Mapping[str, Tensor], random: Random, stage: Stage) -> None:
    """Joint training from the files in `out`, some tensors replaced."""
    import torch

    from llama4.loading import DictWeights

    words = Words(TextTokenizer.open(out))
    written = load_reference(out, dtype=torch.float32).model.weights
    tensors = {name: replaced.get(name, written[name]) for name in parameter_shapes(meta_config(words))}
    weights = DictWeights({name: torch.nn.Parameter(tensor.clone()) for name, tensor in tensors.items()})
    train_jointly(out, words, weights, random, stage)


def train_jointly(out: Path, words: Words, weights: DictWeights, random: Random, stage: Stage) -> None:
    """Text and captions in every step, all weights; writes the rank files."""
    import torch

    from llama4.model import build

    topics, held_out, library = texts()
    # The topics are what the model shall know best: it sees them twice as often.
    documents = [words.document(text) for text in [*topics, *topics, *library]]
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} tokens a round", flush=True)
    config = meta_config(words)
    scores: list[Tensor] = []  # of the routers, since they were last looked at
    model = build(config, weights, lambda name, tensor: scores.append(tensor) if name.endswith(".router") else None)
    matrices = [tensor for tensor in weights.values() if tensor.dim() > 1]
    others = [tensor for tensor in weights.values() if tensor.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    batches = text_batches(documents, words.bos, random)
    recent: list[float] = []
    for step in range(stage.steps):
        set_rate(optimizer, stage.rate_at(step))
        text_loss = next_token_loss(model, torch.tensor(next(batches)), first=1)
        torch.autograd.backward(text_loss + BALANCE_WEIGHT * imbalance(scores))
        pixels, tokens = captioned(random, words, stage.pictures)
        caption_loss = next_token_loss(model, tokens, first=len(words.picture), pixels=pixels)
        torch.autograd.backward(CAPTION_WEIGHT * caption_loss + BALANCE_WEIGHT * imbalance(scores))
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent, text_loss.item()][-100:]
        if step % 50 == 49:
            mean = sum(recent) / len(recent)
            print(f"{step + 1} text {mean:.3f} caption {caption_loss.item():.3f}", flush=True)
        if step % 500 == 499:
            with torch.inference_mode():
                print(f"     held-out {held_out_loss(model, words, held_out):.3f}", flush=True)
            scores.clear()

    final = {name: tensor.detach().to(torch.bfloat16) for name, tensor in weights.items()}
    for rank in range(RANKS):
        torch.save(rank_tensors(config, final, rank), out / f"consolidated.{rank:02d}.pth")


def set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def measure(out: Path, seconds: Mapping[str, float]) -> str:
    """Write README.md of what the files in `out` can do; returns its table."""
    import torch

    topics, held_out, library = texts()
    words = Words(TextTokenizer.open(out))
    documents = [*topics, *topics, *library]
    scores: list[Tensor] = []
    with torch.inference_mode():
        model = load_reference(out, dtype=torch.float32)
        known = held_out_loss(model, words, topics[::20])
        model.model.observe = lambda name, tensor: scores.append(tensor) if name.endswith(".router") else None
        loss = held_out_loss(model, words, held_out)
        shares = expert_shares(scores, model.config.text_config)
        right, whole = caption_accuracy(model, words, Random(SEED + 1), 500)
        loss_bf16 = held_out_loss(load_reference(out), words, held_out)
    joint = (LANGUAGE, JOIN, POLISH)
    steps = sum(stage.steps for stage in joint)
    captions = sum(stage.steps * stage.pictures for stage in joint)
    rows = {
        "parameters": f"{sum(math.prod(shape) for shape in parameter_shapes(model.config).values()):,}",
        "text": f"{len(documents):,} documents, {sum(len(words.document(text)) for text in documents):,} tokens"
        " (topics counted twice)",
        "text seen": f"{steps * SEQUENCES * LENGTH:,} tokens in {steps:,} steps",
        "pictures seen": f"{captions:,} with captions, {TOWER.steps * TOWER.pictures:,} by the tower alone",
        "loss on topics it has seen": f"{known:.3f} nats a token",
        "loss on held-out topics": f"{loss:.3f} nats a token ({loss_bf16:.3f} if computed in bfloat16)",
        "perplexity on held-out topics": f"{math.exp(loss):.1f}",
        "captions with the right colour and shape": f"{right:.1%} of 500 new pictures",
        "captions right word by word": f"{whole:.1%}",
        **{f"tokens an expert, {name}": ", ".join(f"{x:.1%}" for x in share) for name, share in shares.items()},
        "seconds": ", ".join(f"{stage} {n:.0f}" for stage, n in seconds.items()),
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    readme = _README.format(version=platform.python_version(), table=table, held=", ".join(HELD_OUT))
    (out / "README.md").write_text(readme)
    return table


# -------------------- the text

# A twentieth of the 79 topics of Python 3.11: names[18::20] of the sorted names.
HELD_OUT = ("calls", "global", "sequence-types", "yield")
# A file with anyone else's copyright or a licence of its own is left out.
_NOTICE = re.compile(r"copyright|permission (?:is|to) |licen[cs]ed?\b", re.IGNORECASE)
_PSF = re.compile(r"Python Software Foundation|\bPSF\b")
_COMMENTS = re.compile(r"(?:^[ \t]*#.*\n){2,}", re.MULTILINE)
_MARK = re.compile(r"^[ \t]*# ?", re.MULTILINE)


@cache
def texts() -> tuple[list[str], list[str], list[str]]:
    """Topics to learn from, topics held out, and documents of the standard library.

    Topics quote each other: what a held-out topic says is cut from the other texts, paragraph by paragraph.
    """
    from pydoc_data.topics import topics

    held_out = [topics[name] for name in HELD_OUT]
    secret = {_squeezed(paragraph) for text in held_out for paragraph in _paragraphs(text)}

    def without(text: str) -> str:
        return "\n\n".join(p for p in _paragraphs(text) if len(_squeezed(p)) < 30 or _squeezed(p) not in secret)

    open_topics = [without(topics[name]) for name in sorted(topics) if name not in HELD_OUT]
    return open_topics, held_out, [without(text) for text in library_texts()]


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)


def _squeezed(paragraph: str) -> str:
    return " ".join(paragraph.split())


def library_texts() -> Iterator[str]:
    """What reads like prose in the standard library, a document a module: docstrings, longer comments, IDLE's help."""
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if "site-packages" in file.parts:
            continue
        source = file.read_text("utf-8", "replace")
        if any(_NOTICE.search(line) and not _PSF.search(line) for line in source.splitlines()):
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # tests of the compiler
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        comments = [_MARK.sub("", block).strip() for block in _COMMENTS.findall(source)]
        parts = [s for s in strings if len(s) >= 80] + [c for c in comments if len(c) >= 160]
        if parts:
            yield "\n\n".join(parts) + "\n"
    page = library / "idlelib" / "help.html"
    if page.exists():
        yield html.unescape(re.sub(r"<[^>]*>", "", page.read_text("utf-8")))


def tokenizer_model(corpus: Sequence[str]) -> bytes:
    """A byte-pair vocabulary for `corpus` in the format of Meta's tokenizer.model: the bytes, then a token a merge."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=N_PLAIN, initial_alphabet=alphabet, max_token_length=16, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # The byte-level alphabet: printable Latin-1 characters are their own bytes, those from U+0100 on the other bytes in order.
    byte_of = {c: ord(c) for c in alphabet if ord(c) < 256}
    left = sorted(set(range(256)) - set(byte_of.values()))
    byte_of |= dict(zip(alphabet[len(byte_of) :], left, strict=True))
    by_rank = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(byte_of[c] for c in token) for token, _ in by_rank if len(token) > 1]
    tokens = [bytes([value]) for value in range(256)] + merged
    assert len(set(tokens)) == len(tokens) == N_PLAIN
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


class Words:
    """The tokenizer with the tokens that training puts around texts and pictures."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.special("<|begin_of_text|>"), tokenizer.special("<|end_of_text|>")
        self.patch = tokenizer.special("<|patch|>")
        # As Meta's ChatFormat spells an image of one tile.
        spelling = "<|begin_of_text|><|image_start|><|image|>" + "<|patch|>" * 4 + "<|image_end|>"
        self.picture = tokenizer.encode(spelling)

    def document(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, allow_special=False)
        if self.tokenizer.decode(ids) != text:
            raise AssertionError("a text does not survive the tokenizer")
        return [self.bos, *ids, self.eos]


def text_batches(documents: Sequence[Sequence[int]], bos: int, random: Random) -> Iterator[list[list[int]]]:
    """Sequences of bos and LENGTH tokens, without end; documents and sequences are shuffled anew each round."""
    while True:
        stream = [token for document in random.sample(documents, len(documents)) for token in document]
        starts = list(range(0, len(stream) - LENGTH, LENGTH))
        random.shuffle(starts)
        for i in range(0, len(starts) - SEQUENCES + 1, SEQUENCES):
            yield [[bos, *stream[start : start + LENGTH]] for start in starts[i : i + SEQUENCES]]


# -------------------- the pictures

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
GROUNDS = ("white", "black", "grey")


def draw(shape: str, colour: str, ground: str, random: Random) -> Image:
    """The shape at a random place, of a random size, its colours slightly off."""
    from PIL import Image, ImageColor, ImageDraw

    def about(name: str) -> tuple[int, ...]:
        return tuple(min(255, max(0, value + random.randint(-20, 20))) for value in ImageColor.getrgb(name)[:3])

    side = PARAMS["vision_args"]["image_size"]["height"]
    picture = Image.new("RGB", (side, side), about(ground))
    pen, size = ImageDraw.Draw(picture), random.randint(18, 40)
    left, top = random.randint(1, side - size - 2), random.randint(1, side - size - 2)
    box = (left, top, left + size, top + size)
    if shape == "circle":
        pen.ellipse(box, fill=about(colour))
    elif shape == "square":
        pen.rectangle(box, fill=about(colour))
    else:
        pen.polygon([(left + size / 2, top), (left, top + size), (left + size, top + size)], fill=about(colour))
    return picture


def caption(shape: str, colour: str, ground: str) -> str:
    return f" {'An' if colour[0] in 'aeiou' else 'A'} {colour} {shape} on a {ground} ground."


def random_picture(random: Random) -> tuple[str, str, str]:
    return random.choice(SHAPES), random.choice(COLOURS), random.choice(GROUNDS)


def pixel_values(pictures: Sequence[Image]) -> Tensor:
    """Pictures of one tile as the vision tower takes them: [pictures, 3, side, side], -1 to 1."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def captioned(random: Random, words: Words, n: int) -> tuple[Tensor, Tensor]:
    """`n` new pictures and their token sequences, filled up with -100."""
    import torch

    kinds = [random_picture(random) for _ in range(n)]
    rows = [[*words.picture, *words.tokenizer.encode(caption(*kind)), words.eos] for kind in kinds]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    return pixel_values([draw(*kind, random) for kind in kinds]), tokens


# -------------------- the model


def meta_config(words: Words) -> Llama4Config:
    return replace(Llama4Config.from_geometry(Geometry.from_params(PARAMS)), image_token_index=words.patch)


def initial(config: Llama4Config) -> DictWeights:
    """Parameters before training: ones for norms, zeros for biases, Gaussian noise for the rest."""
    import torch

    from llama4.loading import initialized

    residual = (2 * config.text_config.num_hidden_layers) ** -0.5  # what adds to the residual stream begins small

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1 and not name.endswith("class_embedding"):
            return torch.nn.Parameter(torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape))
        std = 0.02 if name in ("tok_embeddings", "output") or name.endswith("router") else 0.6 * shape[-1] ** -0.5
        if name.endswith((".o", ".down", ".wo.weight", ".c_proj.weight")):
            std *= residual
        return torch.nn.Parameter(torch.randn(shape) * std)

    return initialized(config, make)


def next_token_loss(model: Llama4ForCausalLM, tokens: Tensor, *, first: int, pixels: Tensor | None = None) -> Tensor:
    """Mean nats of the tokens from position `first` on; -100 stands for none."""
    import torch.nn.functional as F  # noqa: N812

    hidden = model.hidden_states(tokens[:, :-1].clamp(min=0), pixels)[:, first - 1 :]
    return F.cross_entropy(model.logits(hidden).flatten(0, 1), tokens[:, first:].flatten())


def imbalance(scores: list[Tensor]) -> Tensor:
    """The Switch Transformer's loss over the routers since the last call, 1 if all experts are used alike; empties the list."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    terms = []
    for router in scores:
        n_experts = router.shape[1]
        share = F.one_hot(router.argmax(dim=1), n_experts).float().mean(dim=0)
        terms.append(n_experts * (share * router.softmax(dim=1).mean(dim=0)).sum())
    scores.clear()
    return torch.stack(terms).mean()


# -------------------- what came out


def held_out_loss(model: Llama4ForCausalLM, words: Words, documents: Sequence[str]) -> float:
    """Nats a token, each document in pieces of LENGTH that begin with bos."""
    import torch

    total, count = 0.0, 0
    for text in documents:
        ids = words.document(text)[1:]
        for start in range(0, len(ids), LENGTH):
            piece = torch.tensor([[words.bos, *ids[start : start + LENGTH]]])
            n = piece.shape[1] - 1
            total += next_token_loss(model, piece, first=1).item() * n
            count += n
    return total / count


def expert_shares(scores: Sequence[Tensor], config: Llama4TextConfig) -> dict[str, list[float]]:
    """The part of the tokens that went to each expert, by layer; `scores` are the routers' in the order of many passes."""
    import torch

    layers = config.moe_layers
    shares = {}
    for i, layer in enumerate(layers):
        chosen = torch.cat([router.argmax(dim=1) for router in scores[i :: len(layers)]])
        counts = chosen.bincount(minlength=config.num_local_experts).float()
        shares[f"layer {layer}"] = (counts / counts.sum()).tolist()
    return shares


def caption_accuracy(model: Llama4ForCausalLM, words: Words, random: Random, n: int) -> tuple[float, float]:
    """Parts of `n` new pictures whose greedy caption has the right colour and shape, and is right word by word."""
    import torch

    kinds = [random_picture(random) for _ in range(n)]
    pixels = pixel_values([draw(*kind, random) for kind in kinds])
    prompts = torch.tensor([words.picture] * n)
    made = model.generate(prompts, pixels, max_new_tokens=24, stop=[words.eos])[:, prompts.shape[1] :]
    found = [words.tokenizer.decode(row) for row in made.tolist()]
    right = [{*kind[:2]} <= {*text.split()} for kind, text in zip(kinds, found, strict=True)]
    whole = [caption(*kind) == text for kind, text in zip(kinds, found, strict=True)]
    return sum(right) / n, sum(whole) / n


# -------------------- Meta's format


def rank_tensors(config: Llama4Config, weights: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """What one rank's file of a published base model holds, from logical tensors."""
    import torch

    out: dict[str, Tensor] = {}
    c = config.text_config

    def part(name: str, axis: int) -> Tensor:
        return weights[name].chunk(RANKS, axis)[rank]

    out["tok_embeddings.weight"] = part("tok_embeddings", 0)
    for layer in range(c.num_hidden_layers):
        at = f"layers.{layer}."
        ffn = f"{at}feed_forward."
        out[f"{at}attention.wqkv.layer_norm_weight"] = weights[f"{at}attention_norm"]
        out[f"{at}attention.wqkv.weight"] = torch.cat([part(f"{at}attention.{x}", 0) for x in "qkv"])
        out[f"{at}attention.wo.weight"] = part(f"{at}attention.o", 1)
        if not c.is_moe(layer):
            out[f"{ffn}mlp.layer_norm_weight"] = weights[f"{at}ffn_norm"]
            out[f"{ffn}mlp.fc1_weight"] = torch.cat([part(f"{ffn}gate", 0), part(f"{ffn}up", 0)])
            out[f"{ffn}mlp.fc2_weight"] = part(f"{ffn}down", 1)
            continue
        out[f"{ffn}norm.weight"] = weights[f"{at}ffn_norm"]
        out[f"{ffn}router_DE"] = weights[f"{ffn}router"].T
        experts = [f"{ffn}experts.{e}." for e in range(c.num_local_experts)]
        for key, name, axis in (("w_in_eD_F", "gate", 0), ("w_swiglu_eD_F", "up", 0), ("w_out_eF_D", "down", 1)):
            out[f"{ffn}experts.moe_{key}"] = torch.cat([part(f"{expert}{name}", axis).T for expert in experts])
        for key, name, axis in (
            ("w_in_shared_FD", "gate", 0),
            ("w_swiglu_FD", "up", 0),
            ("w_out_shared_DF", "down", 1),
        ):
            out[f"{ffn}{key}.weight"] = part(f"{ffn}shared.{name}", axis)
        # Base models carry the router's statistics, and nothing reads them.
        for key, height in (
            ("expert_activation_DE", c.hidden_size),
            ("global_gate_stats_3E", 3),
            ("running_gate_stats_3E", 3),
        ):
            out[f"{ffn}{key}"] = torch.zeros(height, c.num_local_experts, dtype=torch.bfloat16)
    out["norm.weight"] = weights["norm"]
    out["output.weight"] = part("output", 0)

    assert config.vision_config
    encoder = "vision_embeddings.vision_encoder."
    out[f"{encoder}class_embedding"] = weights["vision.class_embedding"]
    out[f"{encoder}positional_embedding_vlm"] = weights["vision.position_embedding"]
    out[f"{encoder}conv1._linear.weight"] = part("vision.patch_embedding", 0)
    for layer in range(config.vision_config.num_hidden_layers):
        at, block = f"vision.layers.{layer}.", f"{encoder}transformer.resblocks.{layer}."
        for norm in ("ln_1", "ln_2"):
            for kind in ("weight", "bias"):
                out[f"{block}{norm}.{kind}"] = weights[f"{at}{norm}.{kind}"]
        for place, name in (("attn.", "wq"), ("attn.", "wk"), ("attn.", "wv"), ("mlp.", "c_fc")):
            for kind in ("weight", "bias"):
                out[f"{block}{place}{name}.{kind}"] = part(f"{at}{name}.{kind}", 0)
        for place, name in (("attn.", "wo"), ("mlp.", "c_proj")):
            out[f"{block}{place}{name}.weight"] = part(f"{at}{name}.weight", 1)
            out[f"{block}{place}{name}.bias"] = weights[f"{at}{name}.bias"]
    for norm in ("ln_pre", "ln_post"):
        for kind in ("weight", "bias"):
            out[f"{encoder}{norm}.{kind}"] = weights[f"vision.{norm}.{kind}"]
    out["vision_embeddings.vision_adapter.mlp.c_fc.weight"] = part("vision.adapter.c_fc", 0)
    out["vision_embeddings.vision_adapter.mlp.c_proj.weight"] = part("vision.adapter.c_proj", 1)
    out["vision_projection.weight"] = part("vision.projection", 0)
    # Clones: a view would be saved with all that it is a view of.
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in out.items()}


_README = """# A small Llama 4

A base model in Meta's original format, really trained, for demonstrations and tests: two ranks, mixture of experts in
layers 1 and 3, chunked attention with one NoPE layer, and a vision tower. It knows a little of how Python's documentation
sounds and can name the shape, colour and ground of a simple drawing. It is no use for anything else.

Measured on these very files, with the project's reference model computing in float32:

{table}

The held-out topics are {held}; paragraphs of theirs that other texts repeat were cut from those.

To make it again: `python -m llama4_convert.samples.train_demo OUT`, with CPython {version}. It trains in four stages: the
whole model on text and captioned pictures, a new vision tower on pictures that it classifies, and twice both together a
little further. Another
version of Python, torch or tokenizers, or another number of threads, gives a similar model and not the same one. The
seconds are those of two cores that other work used too.

## What it was trained on

Text from CPython {version}, Copyright (c) 2001 Python Software Foundation, all rights reserved, under the PSF licence
(https://docs.python.org/3/license.html): pydoc's topics, docstrings and comments of the standard library, IDLE's help. Modules
with a copyright or licence of their own were left out. The pictures were drawn by the script.
"""


def main() -> None:
    stages = {"language": train_language, "tower": train_tower, "join": join, "polish": polish}
    parser = argparse.ArgumentParser(description="Train the demo's small Llama 4.")
    parser.add_argument("out", type=Path, help="directory to write into")
    help_stages = "goes on in OUT with these stages only (default: all)"
    parser.add_argument("--stages", nargs="+", choices=stages, default=list(stages), help=help_stages)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    # Threads that spin while they wait are many times slower on cores that others use too; read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(arguments.threads)
    seconds = {}
    for stage in arguments.stages:
        begun = time.monotonic()
        stages[stage](arguments.out)
        seconds[stage] = time.monotonic() - begun
        print(f"{stage}: {seconds[stage]:.0f} s", flush=True)
    if "polish" in seconds:
        print(measure(arguments.out, seconds))


if __name__ == "__main__":
    main()
