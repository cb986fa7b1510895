"""Walks a plan: reads source slices, scatters them into output buffers, checks what it reads, hands the buffers on.

Memory is a few reused buffers, whatever the size of a tensor. One thread reads, checks and scatters, front to back through
each output file; the digest and the disk have a thread each (see `writer`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from isal.isal_zlib import crc32

from llama4_convert.checkpoints.meta_quantized import DequantizedView
from llama4_convert.checkpoints.pth import check_records
from llama4_convert.errors import BadInput
from llama4_convert.planning.binding import mismatch
from llama4_convert.planning.plan import Plan, PlannedFile
from llama4_convert.progress import Progress
from llama4_convert.streaming.encode import MatrixEncoder
from llama4_convert.streaming.fill import Fillers, filler_from_bytes
from llama4_convert.streaming.gather import Fill
from llama4_convert.streaming.run_result import RunResult
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
    result: RunResult,
    progress: Progress,
    allow_nonfinite: bool = False,
) -> None:
    """Stream one planned file into `writer`. `allow_nonfinite`: matrices with NaN or infinities are quantized, too."""
    envelope, checksum, fillers = file.envelope(), _Checksum(), Fillers(source, plan.checked_while_reading, result)
    with ThreadPoolExecutor(1, "gather") as thread:
        encoder = MatrixEncoder(file, fillers, thread, progress, allow_nonfinite)
        _put(envelope.head(), writer)
        for tensor in file.tensors:
            _put(envelope.begin(), writer)
            if tensor.part:  # its matrix is counted as it is gathered
                _put(encoder.take(tensor.part), writer)
            else:
                fill = (
                    fillers.filler_for(tensor) if tensor.name in file.replicas else fillers.counting_filler_for(tensor)
                )
                if envelope.has_checksums:
                    fill = checksum.following(fill)
                _stream(tensor.nbytes, fill, writer, progress)
            _put(envelope.finish(checksum.taken()), writer)
        _put(envelope.tail(), writer)


class _Checksum:
    """The CRC-32 of what a filler makes."""

    def __init__(self) -> None:
        self._crc = 0

    def following(self, fill: Fill) -> Fill:
        def checked(start: int, into: memoryview) -> None:
            fill(start, into)
            self._crc = crc32(into, self._crc)

        return checked

    def taken(self) -> int:
        """The CRC-32 since the last call; the next one begins anew."""
        crc, self._crc = self._crc, 0
        return crc


def _put(data: bytes | memoryview, writer: FileWriter) -> None:
    _stream(len(data), filler_from_bytes(data), writer)


def _stream(size: int, fill: Fill, writer: FileWriter, progress: Progress = lambda n: None) -> None:
    """Have `fill` make the next `size` bytes of the file."""
    position = 0
    while position < size:
        space = writer.space()
        n = min(len(space), size - position)
        fill(position, space[:n])
        writer.advance(n)
        position += n
        progress(n)
