"""Writes one planned file: has each tensor filled into output buffers, checks what was read, hands the buffers on.

Memory is a few reused buffers, whatever the size of a tensor. One thread reads, checks and scatters, front to back through
each output file; the digest and the disk have a thread each (see `writer`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from isal.isal_zlib import crc32

from llama4_convert.checkpoints.meta_quantized import DequantizedView
from llama4_convert.checkpoints.numbers import count_nonfinite
from llama4_convert.checkpoints.pth import check_records
from llama4_convert.errors import BadInput
from llama4_convert.planning.binding import mismatch
from llama4_convert.planning.plan import Plan, PlannedFile
from llama4_convert.progress import Progress
from llama4_convert.streaming.encode import MatrixEncoder
from llama4_convert.streaming.fill import Fillers, Findings
from llama4_convert.streaming.gather import Fill
from llama4_convert.streaming.source import Source
from llama4_convert.streaming.writer import FileWriter


def check_beforehand(plan: Plan, source: Source, progress: Progress) -> None:
    """Check the records that the run will not read front to back. Raises BadInput for damage, or a replica that differs."""
    for number, record in plan.checked_beforehand:
        stored = record.codes.record if isinstance(record, DequantizedView) else record
        check_records(source.files[number], [stored], progress)
    source.check_scales()
    for key, number in plan.compare:
        if not source.same(key, number):
            raise BadInput(mismatch(key, source.files[0].path.name, source.files[number].path.name))


def write_file(
    plan: Plan,
    file: PlannedFile,
    source: Source,
    writer: FileWriter,
    findings: Findings,
    progress: Progress,
    allow_nonfinite: bool,
) -> None:
    """Stream one planned file into `writer`. `allow_nonfinite`: matrices with NaN or infinities are quantized, too."""
    envelope, fillers = file.envelope(), Fillers(source, plan.checked_while_reading, findings)
    with ThreadPoolExecutor(1, "gather") as thread:
        encoder = MatrixEncoder(file, fillers, thread, progress, allow_nonfinite)
        writer.write(envelope.head())
        for tensor in file.tensors:
            writer.write(envelope.begin())
            crc = 0
            if tensor.part:  # its matrix is counted as it is gathered
                writer.write(encoder.take(tensor.part))
            else:
                for made in _filled(tensor.nbytes, fillers.filler_for(tensor), writer):
                    # Buffers end at multiples of the item size, so no number is cut.
                    if tensor.name not in file.replicas:
                        findings.count(tensor.name, count_nonfinite(made, tensor.dtype))
                    if envelope.has_checksums:
                        crc = crc32(made, crc)
                    progress(len(made))
            writer.write(envelope.finish(crc))
        writer.write(envelope.tail())


def _filled(size: int, fill: Fill, writer: FileWriter) -> Iterator[memoryview]:
    """Have `fill` make the next `size` bytes of the file. Yields each range before the writer takes it."""
    position = 0
    while position < size:
        made = writer.space()[: size - position]
        fill(position, made)
        yield made
        position += len(made)
        writer.advance(len(made))
