"""What is called what: every tensor of a Llama 4, once, with its place in Meta's layout and in Transformers'.

The tables are TOML (`llama4_text.toml`, `llama4_vision.toml`, `dropped.toml`); `table` loads and binds them to one model,
`layout` turns a row into strides. It holds no tensor data and imports neither torch nor the other packages.

A worked row: `"layers.{layer}.feed_forward.experts.moe_w_in_eD_F" = "gate: (E D) F"` stores the gates of E experts, each D x F,
below each other. With E = 16, D = 5120, F = 8192 on one rank it is a placement of the logical tensor `E D F`: offset 0, strides
(5120 * 8192, 8192, 1). Transformers' `"...gate_up_proj" = "E D [gate|up]"` places the same tensor with the strides (5120 * 16384,
16384, 1). A conversion copies the box that two placements have in common, from the one set of strides to the other.
"""

from mappings.layout import Box, Copy, Layout, MappingError, Placement, copies
from mappings.table import Binding, LogicalTensor, ModelShape, Table, load_table

__all__ = [
    "Binding",
    "Box",
    "Copy",
    "Layout",
    "LogicalTensor",
    "MappingError",
    "ModelShape",
    "Placement",
    "Table",
    "copies",
    "load_table",
]
