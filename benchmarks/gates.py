"""What right conversions measure: the numbers that `validate`'s limits were derived from (docs/validate.md).

    python benchmarks/gates.py [--tokens 512] [--seeds 5] [--models trained random wide] [--json FILE]

Of the small trained model that ships with us (random tokens, and text that it was not trained on) and of random ones of each
family: a plain conversion with Transformers as the runner, in every dtype, where all that can differ is rounding; and a
conversion by each recipe in our reference. `wide`, which is not run unless it is named: two layers of Scout's real width and one
of each kind of Maverick's (8 GB of disk, a quarter of an hour). Prints the worst of each metric, the largest local error of a
layer, and the root mean square of the logits' error.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from recipes import prompts

from llama4_convert import convert, synth, validate
from llama4_convert.validation.parity.gates import AT_LEAST, DTYPES, GATE_NAMES
from llama4_convert.validation.results import Validation

RECIPES = ("fp8", "int4", "nf4")
MODELS = ("trained", "random", "wide")
WIDE: dict[str, dict[str, Any]] = {
    "scout": {"layers": 2, "experts": 4, "vocab": 8192},
    "maverick": {"layers": 2, "experts": 4, "vocab": 8192},
}


def measured(result: Validation) -> dict[str, float]:
    assert not result.tensors_different, "the conversion itself is wrong"
    stages = [*result.layers, *result.vision]
    pairs = result.pictures.logit_sample
    power = sum(a * a for a, _ in pairs) / len(pairs)
    return {name: getattr(result, name) for name in GATE_NAMES} | {
        "local": max(one.nmse_local for one in stages),
        "rms_error": math.sqrt(result.nmse * power),
    }


def of_model(name: str, source: Path, folder: Path, tokens: int, seeds: int, wide: bool) -> Iterator[dict[str, Any]]:
    batches: list[dict[str, Any]] = [{"tokens": tokens, "seed": seed} for seed in range(seeds)]
    if name == "trained":
        ids = folder / "ids.json"
        ids.write_text(json.dumps(prompts(source)))
        batches.append({"token_ids": ids})
    convert(source, folder / "plain")
    for dtype in DTYPES if not wide else ("bfloat16",):  # 10 GB of memory in float32
        for batch in batches:
            told = validate(folder / "plain", reference=source, runner="transformers", dtype=dtype, **batch)
            yield {"model": name, "kind": dtype} | measured(told)
    for recipe in RECIPES:
        convert(source, folder / recipe, recipe=recipe)
        for batch in batches:
            yield {"model": name, "kind": recipe} | measured(validate(folder / recipe, reference=source, **batch))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--models", nargs="+", choices=MODELS, default=MODELS[:2])
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    rows: list[dict[str, Any]] = []
    trained = Path(str(resources.files("llama4_convert.samples") / "demo_model"))
    sources: list[tuple[str, str, dict[str, Any]]] = [("trained", "", {})]
    sources += [("random", geometry, {"tiny": True}) for geometry in ("scout", "maverick", "guard")]
    sources += [("wide", geometry, sizes) for geometry, sizes in WIDE.items()]
    for name, geometry, sizes in sources:
        if name not in chosen.models:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            if geometry:
                synth(folder / "source", geometry=geometry, ranks=2, **sizes)
            source = folder / "source" if geometry else trained
            wide = name == "wide"
            tokens, seeds = (128, 1) if wide else (chosen.tokens, chosen.seeds)
            rows += of_model(name, source, folder, tokens, seeds, wide)
    columns = (*GATE_NAMES, "local", "rms_error")
    print(f"{'':10} {'':9} " + " ".join(f"{name:>14}" for name in columns))
    for model in dict.fromkeys(row["model"] for row in rows):
        for kind in dict.fromkeys(row["kind"] for row in rows if row["model"] == model):
            group = [row for row in rows if (row["model"], row["kind"]) == (model, kind)]
            worst = [(min if name in AT_LEAST else max)(row[name] for row in group) for name in columns]
            print(f"{model:10} {kind:9} " + " ".join(f"{value:14.3g}" for value in worst))
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
