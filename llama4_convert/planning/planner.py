"""Makes a plan from a bound source and a layout to write: for all commands, and without reading a byte of tensor data."""

from __future__ import annotations

from llama4_convert.errors import BadInput
from llama4_convert.planning.binding import BoundSource
from llama4_convert.planning.encoded import linear_layers
from llama4_convert.planning.layouts import OutputLayout
from llama4_convert.planning.plan import Plan
from llama4_convert.planning.record_order import checked_while_reading
from mappings import MappingError


def make_plan(source: BoundSource, layout: OutputLayout) -> Plan:
    """Plan to write `source` in a layout. Raises BadInput where the source cannot fill it, naming the key."""
    try:
        files = layout.files(source)
    except MappingError as error:
        raise BadInput(f"{source.name}: {error}") from error
    in_order = checked_while_reading(source, (piece for file in files for piece in file.pieces()))
    return Plan(
        geometry=source.geometry,
        files=files,
        checked_while_reading=in_order,
        checked_beforehand=tuple((n, record) for n, record in source.records if (n, record.name) not in in_order),
        compare=tuple(source.compare),
        meta_keys=tuple(layout.meta_keys(source)),
        dropped=source.dropped,
        base_evidence=tuple(source.base_evidence),
        warnings=tuple(source.warnings),
        linear_layers=linear_layers(source.binding, layout.recipe),
    )
