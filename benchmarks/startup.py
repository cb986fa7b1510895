"""How long a user waits before anything happens: `--help`, and `plan` on a Scout of full size in sparse files.

python benchmarks/startup.py [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measuring import measured, spread, told

COMMANDS = {
    "--help": ["--help"],
    "plan": ["plan", "SRC"],
    "plan --recipe int4 --gpu h100-80gb": ["plan", "SRC", "--recipe", "int4", "--gpu", "h100-80gb"],
}


def compare(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each command, 48 layers, 8 ranks, 108 B parameters."""
    from llama4_convert import synth

    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        synth(folder, geometry="scout", sparse=True)
        for name, arguments in COMMANDS.items():
            command = [sys.executable, "-m", "llama4_convert", *(folder if a == "SRC" else a for a in arguments)]
            found[name] = spread([measured(command).wall_s for _ in range(rounds)])
            print(f"  {name}: {told(found[name])} s", flush=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    found = compare(args.rounds)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
