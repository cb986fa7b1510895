"""A Transformers directory beside its weights: the small files that go into its conversion, and the digests of what it reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llama4_convert.checkpoints.digests import Digest, expected_digests
from llama4_convert.checkpoints.manifest import INDEX, NAME, Manifest
from llama4_convert.checkpoints.transformers import TransformersCheckpoint
from llama4_convert.files import is_file_name, is_notice, read_small
from llama4_convert.metadata.model_card import CARD, SOURCE_CARD

# Suffixes of tokenizers, templates and other configurations. Code and weights are left behind.
_KEPT = {".json", ".jinja", ".model", ".txt", ".md"}

# Small files that decide what is written, beside the weights.
_DECIDING = ("config.json", "tokenizer.json", "tokenizer.model", "original/params.json")


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


def source_digests(source: TransformersCheckpoint) -> tuple[dict[Path, Digest], list[str]]:
    """Digests that a manifest or a download states for the files that decide the output; a warning where some lack one."""
    others = (source.path / name for name in _DECIDING)
    weights = [index.path for index in source.files]
    found = expected_digests([*weights, *(path for path in others if path.is_file())])
    left = len([path for path in weights if path not in found])
    if not left:
        return found, []
    some = f"{left} of {len(source.files)} files" if left < len(source.files) else "its files"
    return found, [f"the source has no checksums: nothing says what {some} should be, and they are taken as they are"]
