"""The dtypes that weights of a model come in: what safetensors calls them, and what torch and config.json do."""

from __future__ import annotations

TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
SAFETENSORS_NAMES = {name: dtype for dtype, name in TORCH_NAMES.items()}
