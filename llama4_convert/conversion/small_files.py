"""The small files of a Transformers directory that go into its conversion."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llama4_convert.checkpoints.manifest import INDEX, NAME, Manifest
from llama4_convert.files import is_file_name, is_notice, read_small
from llama4_convert.metadata.model_card import CARD, SOURCE_CARD

# Suffixes of tokenizers, templates and other configurations. Code and weights are left behind.
_KEPT = {".json", ".jinja", ".model", ".txt", ".md"}


def kept_files(folder: Path) -> dict[str, bytes]:
    """The files of a Transformers directory that go into its conversion, but for weights, index and config.json.

    A model card of the source describes other files: it is kept under another name, unless this tool wrote it.
    """
    found: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        wanted = path.name not in {"config.json", INDEX, NAME} and (is_notice(path.name) or path.suffix in _KEPT)
        if wanted and is_file_name(path.name) and path.is_file():
            found[path.name] = read_small(path)
    if theirs := found.pop(CARD, None):
        before = Manifest.read(folder)
        entry = before.files.get(CARD) if before else None
        if entry is None or entry.sha256 != hashlib.sha256(theirs).hexdigest():
            name = SOURCE_CARD
            while name in found:
                name = f"{name.removesuffix('.md')}.source.md"
            found[name] = theirs
    return found
