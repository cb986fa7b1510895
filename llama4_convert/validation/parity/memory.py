"""How much memory a walk of two models needs, and what is left of a bound for weights that are kept or read ahead.

The numbers that count, at Scout's width and 4,096 tokens in float32: a state is 84 MB, an expert's three matrices are 503 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama4.config import Llama4Config
from llama4_convert.errors import UsageError

INTERPRETER_BYTES = 420 << 20  # Python with torch, and what its allocator holds back
_STORED_BYTES = 2  # of a weight as the checkpoint has it, beside its cast
_HIDDEN_BYTES = 3 * 4 << 25  # what `llama4.text.swiglu` and attention have in memory between projections
_HEAD_BYTES = 320 << 20  # slices of logits and their sums (`walk._LOGITS_IN_MEMORY`)
_MAX_AHEAD_BYTES = 256 << 20  # of weights that either model reads before they are needed: three of Scout's matrices
_KEPT_STATES = 4  # between stages: the reference's before and after, the candidate's free and forced
_CANDIDATE_RUNS = 3  # at a time: free, forced, and on the reference's input
_COPIES_A_RUN = 4  # of a state that a stage makes for each run: normed, projected, summed


@dataclass(frozen=True)
class Budget:
    """Bytes of weights that each of the two models may have: kept for later, and read before they are needed."""

    keep: int
    ahead: int


def budget(config: Llama4Config, rows: int, tiles: int, itemsize: int, max_memory: int) -> Budget:
    """For `rows` tokens (padding included) and `tiles` pictures, computed in `itemsize` bytes.

    Raises UsageError, naming what is needed, if `max_memory` is too little.
    """
    least = (
        INTERPRETER_BYTES
        + max(_HEAD_BYTES, _weights(config, itemsize) + _HIDDEN_BYTES)
        + _activations(config, rows, tiles, itemsize)
    )
    if least > max_memory:
        raise UsageError(
            f"{rows:,} tokens of this width need {-(-least >> 20):,} MiB: give --max-memory {-(-least // (1 << 28)) / 4:g}GiB,"
            " or fewer tokens"
        )
    left = max_memory - least
    ahead = min(_MAX_AHEAD_BYTES, left // 4)
    return Budget((left - 2 * ahead) // 2, ahead)


def _weights(config: Llama4Config, itemsize: int) -> int:
    """The largest block's matrices, and one of them as it was read and once more while it is put together."""
    c = config.text_config
    widths = [c.intermediate_size if c.is_moe(i) else c.intermediate_size_mlp for i in range(c.num_hidden_layers)]
    projections = c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    matrix = c.hidden_size * max(widths)
    return max(3 * matrix, c.hidden_size * projections) * itemsize + 3 * matrix * _STORED_BYTES


def _activations(config: Llama4Config, rows: int, tiles: int, itemsize: int) -> int:
    c, v = config.text_config, config.vision_config
    heads = c.head_dim * (c.num_attention_heads + 2 * c.num_key_value_heads)
    text = rows * ((_KEPT_STATES + _CANDIDATE_RUNS * _COPIES_A_RUN) * c.hidden_size * itemsize + 3 * heads * 4)
    if v is None or not tiles:
        return text
    patches = tiles * (v.patches_a_side**2 + 1)
    vision = patches * ((_KEPT_STATES + 4 * _COPIES_A_RUN) * v.hidden_size + 2 * v.intermediate_size) * itemsize
    return max(text, vision)
