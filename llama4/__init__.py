"""What the model is: a Llama 4 in a few small modules, running from either layout.

It imports neither the other packages nor Transformers.

Read `config` for what a Llama 4 can be, `text` and `vision` for what it computes, `model` for how they join,
`generate` for the KV cache and sampling, `weights` for where the numbers come from. Names are importable from here; torch is
imported with the first of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama4.chat import Llama4Processor as Llama4Processor
    from llama4.config import Llama4Config as Llama4Config
    from llama4.config import Llama4TextConfig as Llama4TextConfig
    from llama4.config import Llama4VisionConfig as Llama4VisionConfig
    from llama4.image import Llama4ImageProcessor as Llama4ImageProcessor
    from llama4.model import Llama4ForCausalLM as Llama4ForCausalLM
    from llama4.model import Llama4ForConditionalGeneration as Llama4ForConditionalGeneration
    from llama4.text import Llama4TextModel as Llama4TextModel
    from llama4.vision import Llama4VisionModel as Llama4VisionModel

_HOME = {
    "Llama4Config": "config",
    "Llama4TextConfig": "config",
    "Llama4VisionConfig": "config",
    "Llama4TextModel": "text",
    "Llama4VisionModel": "vision",
    "Llama4ForCausalLM": "model",
    "Llama4ForConditionalGeneration": "model",
    "Llama4ImageProcessor": "image",
    "Llama4Processor": "chat",
}

__all__ = [
    "Llama4Config",
    "Llama4ForCausalLM",
    "Llama4ForConditionalGeneration",
    "Llama4ImageProcessor",
    "Llama4Processor",
    "Llama4TextConfig",
    "Llama4TextModel",
    "Llama4VisionConfig",
    "Llama4VisionModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"llama4.{_HOME[name]}"), name)
