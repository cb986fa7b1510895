"""The readers under a fuzzer that looks for inputs which reach new code (Atheris, which is libFuzzer). For as long as you like:

    make fuzz                                                  # ten minutes, from whole files
    python -m tests.torture.fuzz CORPUS -max_total_time=3600   # goes on in a folder that it fills; libFuzzer's options

What an input leads to must be what mutants.py says: read, or refused with an error of ours, and no forbidden action. Else the
input is left as crash-*, and this file with that name as its only argument repeats it. An input's first byte says who reads it.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llama4_convert", "llama4", "mappings", "quant"]):
    from llama4_convert import synth
    from tests.support.subjects import REFUSED, Watch, subjects

LIMITS = ["-timeout=5", "-rss_limit_mb=2048", "-max_len=65536"]  # Python and its libraries have half of the memory


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    synth(folder / "source", tiny=True, layers=2, experts=2, ranks=2)
    everything = list(subjects(folder / "source", folder).values())
    corpus = next((Path(a) for a in sys.argv[1:] if not a.startswith("-") and not Path(a).is_file()), None)
    if corpus is not None:
        corpus.mkdir(parents=True, exist_ok=True)
        for number, subject in enumerate(everything):
            (corpus / f"whole-{number}").write_bytes(bytes([number]) + subject.seed)
    watch = Watch()

    def one_input(data: bytes) -> None:
        subject = everything[data[0] % len(everything) if data else 0]
        subject.put(data[1:])
        try:
            with watch.on():
                subject.read(data[1:])
        except REFUSED:
            pass
        finally:
            subject.put(subject.seed)
        assert not watch.seen, watch.seen

    atheris.Setup([sys.argv[0], *LIMITS, *sys.argv[1:]], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
