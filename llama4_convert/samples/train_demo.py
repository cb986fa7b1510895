"""Trains the small Llama 4 of `llama4_convert/samples/demo_model` from what ships with Python, and writes it as Meta would.

    python -m llama4_convert.samples.train_demo OUT

It learns text from pydoc's topics and the docstrings and comments of the standard library, and pictures from drawings of
one coloured shape with a caption. Some 20 minutes on two cores of their own; OUT/README.md says what came out.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from llama4.config import Llama4Config, Llama4TextConfig
from llama4.geometry import Geometry
from llama4.weights import parameter_shapes
from llama4_convert.files import json_object
from llama4_convert.reference.checkpoint import load_reference
from llama4_convert.reference.tokenization import TextTokenizer
from llama4_convert.samples import corpus, pictures
from llama4_convert.samples.corpus import Words
from llama4_convert.samples.rank_files import RANKS, rank_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from llama4.loading import DictWeights
    from llama4.model import Llama4ForCausalLM

SEED = 0
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
PARAMS_FILE = Path(__file__).parent / "demo_model" / "params.json"


def train_language(out: Path) -> None:
    """The whole model, on text and pictures. In so few pictures it learns the colours and hardly the shapes."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    topics, _, library = corpus.texts()
    (out / "params.json").write_bytes(PARAMS_FILE.read_bytes())
    (out / "tokenizer.model").write_bytes(corpus.tokenizer_model([*topics, *library]))
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
    traits = (pictures.SHAPES, pictures.COLOURS, pictures.GROUNDS)
    sizes = [len(names) for names in traits]
    classifier = torch.nn.Linear(4 * config.text_config.hidden_size, sum(sizes))
    tower = {name: tensor for name, tensor in weights.items() if name.startswith("vision.")}
    parameters = [*tower.values(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    for step in range(TOWER.steps):
        set_rate(optimizer, TOWER.rate_at(step))
        kinds, pixels = pictures.drawn(random, TOWER.pictures)
        guesses = classifier(model.image_features(pixels).view(TOWER.pictures, -1)).split(sizes, dim=1)
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

    topics, held_out, library = corpus.texts()
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

    batches = corpus.text_batches(documents, words.bos, random)
    recent: list[float] = []
    for step in range(stage.steps):
        set_rate(optimizer, stage.rate_at(step))
        text_loss = next_token_loss(model, torch.tensor(next(batches)), first=1)
        torch.autograd.backward(text_loss + BALANCE_WEIGHT * imbalance(scores))
        pixels, tokens = pictures.captioned(random, words, stage.pictures)
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

    topics, held_out, library = corpus.texts()
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
        "text seen": f"{steps * corpus.SEQUENCES * corpus.LENGTH:,} tokens in {steps:,} steps",
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
    readme = _README.format(version=platform.python_version(), table=table, held=", ".join(corpus.HELD_OUT))
    (out / "README.md").write_text(readme)
    return table


# -------------------- the model


def meta_config(words: Words) -> Llama4Config:
    return replace(
        Llama4Config.from_geometry(Geometry.from_params(json_object(PARAMS_FILE))), image_token_index=words.patch
    )


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
    """Nats a token, each document in pieces of LENGTH tokens that begin with bos."""
    import torch

    total, count = 0.0, 0
    for text in documents:
        ids = words.document(text)[1:]
        for start in range(0, len(ids), corpus.LENGTH):
            piece = torch.tensor([[words.bos, *ids[start : start + corpus.LENGTH]]])
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

    kinds, pixels = pictures.drawn(random, n)
    prompts = torch.tensor([words.picture] * n)
    made = model.generate(prompts, pixels, max_new_tokens=24, stop=[words.eos])[:, prompts.shape[1] :]
    found = [words.tokenizer.decode(row) for row in made.tolist()]
    right = [{*kind[:2]} <= {*text.split()} for kind, text in zip(kinds, found, strict=True)]
    whole = [pictures.caption(*kind) == text for kind, text in zip(kinds, found, strict=True)]
    return sum(right) / n, sum(whole) / n


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
