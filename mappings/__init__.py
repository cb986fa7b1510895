"""What is called what: every tensor of a Llama 4, once, with its place in Meta's layout and in Transformers'.

The tables are TOML (`llama4_text.toml`, `llama4_vision.toml`, `dropped.toml`); `table` loads and binds them to one model,
`layout` turns a row into strides. No tensor data, no torch, and nothing of the other rooms.
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
