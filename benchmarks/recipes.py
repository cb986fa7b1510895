"""What each recipe costs the small trained model: size, weight error, and KL, top-1 and perplexity against bf16.

    python benchmarks/recipes.py [--json FILE]

The text is four topics of Python's documentation that the model was not trained on. A model this small loses more to
quantization than a large one: the numbers compare recipes with each other, and are what `validate`'s limits came from.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import resources
from pathlib import Path

from llama4_convert import convert, validate
from llama4_convert.reference.tokenization import TextTokenizer
from llama4_convert.samples.corpus import HELD_OUT
from quant.recipe import built_in

LENGTH = 384  # tokens a prompt: several chunks of the model's 128


def prompts(model: Path) -> list[list[int]]:
    from pydoc_data.topics import topics

    tokenizer = TextTokenizer.open(model)
    begin = tokenizer.special("<|begin_of_text|>")
    ids = [i for name in HELD_OUT for i in tokenizer.encode(topics[name])]
    return [[begin, *ids[i : i + LENGTH]] for i in range(0, len(ids), LENGTH)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    model = Path(str(resources.files("llama4_convert.samples") / "demo_model"))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "ids.json").write_text(json.dumps(prompts(model)))
        for name in (None, *(name for name, recipe in built_in().items() if recipe.format != "meta")):
            made = convert(model, folder / str(name), recipe=name)
            told = validate(folder / str(name), reference=model, token_ids=folder / "ids.json")
            recipe = made.quantization
            rows.append(
                {
                    "recipe": name or "bf16",
                    "bytes": made.output_bytes,
                    "bits": recipe.bits_per_quantized_weight if recipe else 16.0,
                    "relative_mse": recipe.relative_mse if recipe else 0.0,
                    **{key: getattr(told, key) for key in ("tokens", "top1_agreement", "kl_mean", "kl_p999", "nmse")},
                    "perplexity": told.perplexity_candidate,
                }
            )
    print("| recipe | MB | bits a weight | relative squared error | KL, nats | KL 99.9 % | top-1 | nmse | perplexity |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['recipe']} | {row['bytes'] / 1e6:.2f} | {row['bits']:.2f} | {row['relative_mse']:.5f} |"
            f" {row['kl_mean']:.5f} | {row['kl_p999']:.3f} | {row['top1_agreement']:.3f} | {row['nmse']:.5f} |"
            f" {row['perplexity']:.2f} |"
        )
    print(f"{rows[0]['tokens']} tokens")
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
