"""A candidate run by Transformers, which nobody can say shares our mistakes."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama4_convert.errors import EnvironmentFailed, UsageError, one_line
from llama4_convert.parity import CandidateFailed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llama4_convert.prompts import Batch


def load_transformers(path: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The model of a directory. Raises UsageError without Transformers, CandidateFailed for a directory it does not take.

    A tensor that is missing or misshapen fails here: Transformers itself warns and fills it with random numbers.
    """
    body: Any = json.loads((path / "config.json").read_bytes())
    name = "Llama4ForConditionalGeneration" if "text_config" in body else "Llama4ForCausalLM"
    try:
        import transformers

        kind = getattr(transformers, name)
    except ImportError as error:  # also raised for a package that Transformers finds and cannot use
        raise UsageError(
            f"Transformers cannot be used here ({one_line(error, 150)}): pip install 'llama4-convert[transformers]'"
        ) from error
    try:
        # It reports problems in tables on the terminal; they come back from here as an error.
        with quiet():
            loaded: Any = kind.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except ImportError as error:  # what it needs for a quantized directory
        raise EnvironmentFailed(
            f"Transformers needs a package for {path} ({one_line(error, 150)}): pip install 'llama4-convert[quantized]'"
        ) from error
    except Exception as error:  # it raises of every kind, about whatever its config classes check
        raise CandidateFailed(f"Transformers refuses it: {one_line(error)}") from error
    model, info = loaded
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(problem):
            keys = sorted(str(key) for key in info[problem])
            raise CandidateFailed(f"Transformers reports {problem.replace('_', ' ')}: {', '.join(keys[:3])}")
    return model.eval()


def transformers_logits(path: Path, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Logits at the batch's real positions, in order: [positions, vocabulary]. Each prompt runs alone, without padding."""
    import torch

    model = load_transformers(path, dtype)
    parts = []
    for prompt in batch.prompts:
        extra = {} if prompt.pixel_values is None else {"pixel_values": prompt.pixel_values.to(dtype)}
        try:
            with quiet():  # of decompression, at the first forward
                parts.append(model(torch.tensor([prompt.tokens]), **extra).logits[0])
        except Exception as error:  # whatever a wrong configuration leads it to
            raise CandidateFailed(f"Transformers fails on it: {one_line(error)}") from error
    return torch.cat(parts)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its tables, bars and warnings; what is wrong it also raises, or we ask for."""
    from transformers.utils import logging

    log: Any = logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.set_verbosity(verbosity)
        log.enable_progress_bar()
