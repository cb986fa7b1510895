"""Import paths, and checkpoints of Meta's code built once a session."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

# pytest puts tests/ on the path, where tests/llama4_convert would pass for a namespace package of that name: the
# repository's packages must come first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The torchvision that tests need (image processors) may not fit the installed torch. `make test` puts it beside the
# environment, not into it: there it would break `import transformers` for everything else.
torchvision_home = Path(sys.prefix) / "torchvision"
if torchvision_home.is_dir():
    sys.path.append(str(torchvision_home))
    from tests.support import torchvision_shim

    torchvision_shim.install()

# By the clock hypothesis counts what a slow or busy machine takes against us.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MetaCheckpoint:
    """A directory in Meta's layout and the model that it was written from."""

    src: Path
    model: Any
    params: dict[str, Any]


@pytest.fixture(scope="session")
def meta_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MetaCheckpoint]:
    """`meta_checkpoint(geometry, ranks=1, spelling="published", dtype=None, layout="plain", extra=True)`, cached.

    Read only: whoever wants to damage a checkpoint copies it first.
    """
    import torch

    from tests.support import meta_model

    @functools.cache
    def model_of(geometry: str, dtype: torch.dtype) -> Any:
        return meta_model.build(meta_model.GEOMETRIES[geometry], seed=0, dtype=dtype)

    @functools.cache
    def checkpoint_of(geometry: str, ranks: int, spelling: str, dtype: torch.dtype, layout: str, extra: bool) -> Any:
        model, params = model_of(geometry, dtype), meta_model.GEOMETRIES[geometry]
        src = meta_model.write_checkpoint(
            model,
            params,
            tmp_path_factory.mktemp(f"{geometry}-{ranks}-{spelling}-"),
            ranks=ranks,
            spelling=spelling,  # type: ignore[arg-type]
            dtype=dtype,
            layout=layout,  # type: ignore[arg-type]
            extra=extra,
        )
        return MetaCheckpoint(src, model, params)

    def get(
        geometry: str,
        ranks: int = 1,
        spelling: str = "published",
        dtype: torch.dtype | None = None,
        layout: str = "plain",
        extra: bool = True,
    ) -> MetaCheckpoint:
        return checkpoint_of(geometry, ranks, spelling, dtype or torch.bfloat16, layout, extra)

    return get


@pytest.fixture(scope="session")
def converted(
    meta_checkpoint: Callable[..., MetaCheckpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`converted(geometry)`: the Transformers directory made of that geometry's two ranks. Read only, as the checkpoint is."""
    from llama4_convert import convert

    @functools.cache
    def get(geometry: str) -> Path:
        path = tmp_path_factory.mktemp(f"{geometry}-hf-") / "out"
        convert(meta_checkpoint(geometry, ranks=2).src, path)
        return path

    return get
