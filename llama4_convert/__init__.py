"""Meta's original Llama 4 checkpoints to Transformers directories.

The functions here are the commands of the same names, and `load_reference`; each is imported when first used, so that importing
the package costs nothing. Their modules have other names: a submodule called `plan` would replace the function in this
namespace.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llama4_convert.version import VERSION

if TYPE_CHECKING:
    from llama4_convert.card_file import card as card
    from llama4_convert.conversion import convert as convert
    from llama4_convert.conversion import plan as plan
    from llama4_convert.diffing import diff as diff
    from llama4_convert.explaining import explain as explain
    from llama4_convert.exporting import export as export
    from llama4_convert.fitting.fit import fit as fit
    from llama4_convert.generation import generate as generate
    from llama4_convert.inspection import inspect as inspect
    from llama4_convert.parity.validation import validate as validate
    from llama4_convert.pushing import push as push
    from llama4_convert.reference import load_reference as load_reference
    from llama4_convert.synthesis.synth import synth as synth
    from llama4_convert.verification import verify as verify

__version__ = VERSION

_HOME = {
    "card": "card_file",
    "convert": "conversion",
    "plan": "conversion",
    "push": "pushing",
    "diff": "diffing",
    "explain": "explaining",
    "export": "exporting",
    "fit": "fitting.fit",
    "generate": "generation",
    "inspect": "inspection",
    "load_reference": "reference",
    "synth": "synthesis.synth",
    "validate": "parity.validation",
    "verify": "verification",
}

__all__ = [
    "__version__",
    "card",
    "convert",
    "diff",
    "explain",
    "export",
    "fit",
    "generate",
    "inspect",
    "load_reference",
    "plan",
    "push",
    "synth",
    "validate",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"llama4_convert.{_HOME[name]}"), name)
