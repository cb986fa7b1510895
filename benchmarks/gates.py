"""What a right conversion measures in Transformers: the numbers that `validate`'s limits were derived from.

    python benchmarks/gates.py [--tokens 512] [--seeds 5] [--json FILE]

Converts the small trained model that ships with us, and random ones of each family, and validates each with Transformers as the
runner, in every dtype: all that can differ is rounding. Prints the worst of each metric, trained and random apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import resources
from pathlib import Path

from llama4_convert import convert, synth, validate
from llama4_convert.parity.gates import AT_LEAST, DTYPES, GATE_NAMES


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sources = {"trained": Path(str(resources.files("llama4_convert.demo") / "model"))}
        for geometry in ("scout", "maverick", "guard"):
            synth(folder / geometry, geometry=geometry, tiny=True, ranks=2)
            sources[geometry] = folder / geometry
        for name, source in sources.items():
            output = folder / f"{name}-hf"
            convert(source, output)
            for dtype in DTYPES:
                for seed in range(chosen.seeds):
                    result = validate(
                        output, reference=source, runner="transformers", dtype=dtype, tokens=chosen.tokens, seed=seed
                    )
                    assert not result["tensors_different"], "the conversion itself is wrong"
                    rows.append({"model": name, "dtype": dtype, "seed": seed} | {n: result[n] for n in GATE_NAMES})
    print(f"{'':10} {'':9} " + " ".join(f"{name:>14}" for name in GATE_NAMES))
    for trained in (True, False):
        for dtype in DTYPES:
            group = [row for row in rows if row["dtype"] == dtype and (row["model"] == "trained") == trained]
            worst = [(min if name in AT_LEAST else max)(row[name] for row in group) for name in GATE_NAMES]
            kind = "trained" if trained else "random"
            print(f"{kind:10} {dtype:9} " + " ".join(f"{value:14.3g}" for value in worst))
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
