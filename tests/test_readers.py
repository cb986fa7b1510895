"""What `make readers` recorded is what the table of readers says, and what the page shows."""

from __future__ import annotations

import pytest

from tests.readers import table
from tests.readers.subjects import SUBJECTS
from tests.readers.table import Reader, Run

READERS, RESULTS = table.readers(), table.results()


@pytest.mark.parametrize("name", READERS)
def test_a_reader_was_run_and_did_what_the_table_says(name: str) -> None:
    reader, run = READERS[name], RESULTS[name]
    assert (table.HERE / "scripts" / reader.script).exists()
    assert list(run.found) == reader.reads
    assert set(reader.reads) <= set(SUBJECTS)
    assert set(reader.fails) <= set(reader.reads)
    assert list(table.surprises(reader, run)) == []


def test_the_page_shows_the_record() -> None:
    _, _, written = table.PAGE.read_text().partition(table.START)
    assert written.splitlines()[1:] == list(table.page(READERS, RESULTS))


def test_a_reader_that_does_other_than_the_table_says_is_a_surprise() -> None:
    reader = Reader(requires=[], script="", reads=["bf16", "int4"], fails={"int4": "no"}, pictures="blind")
    right = {"bf16": {"text": 1e-9, "picture": "ValueError"}, "int4": {"text": "ValueError"}}
    assert list(table.surprises(reader, Run(date="", versions={}, found=right))) == []
    wrong = {"bf16": {"text": 1e-3, "picture": 1e-9}, "int4": {"text": 1e-9}}
    assert [text.partition(":")[0] for text in table.surprises(reader, Run(date="", versions={}, found=wrong))] == [
        "bf16, text",
        "bf16, picture",
        "int4, text",
    ]
    assert table.page({"X": reader}, {"X": Run(date="today", versions={}, found=right)})
