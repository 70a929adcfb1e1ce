"""Reading the documents of one part of an input, format by format."""

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import streams
from .fields import inner_value, locate_column, not_text, value_of
from .files import is_unicode, kind_of
from .hub import open_dataset
from .input_errors import PREPARE, Advice, InputError, problems_named

LONGEST_DOCUMENT = 1 << 28  # bytes; encoding needs about a hundred times as much memory
_BATCH_ROWS = 256


class Part(NamedTuple):
    """A range [start, stop) of `source` that one worker reads: bytes of a JSONL file, rows of a
    table, or [0, 1) for a file that cannot be divided. `num_bytes` estimates the work."""

    source: str
    start: int
    stop: int
    num_bytes: int


class Reading(NamedTuple):
    """Settings of reading documents.

    text_field: field (column) that holds the text; longest: maximum bytes of a document, or of a
    record of a JSON file.
    """

    text_field: str
    longest: int = LONGEST_DOCUMENT


# (place in the source, value of the field, bytes of the part read so far)
Values = Iterator[tuple[str, Any, int]]


def read_part(
    part: Part,
    text_field: str,
    count: Callable[[int], None] = lambda _: None,
    longest: int = LONGEST_DOCUMENT,
    advice: Advice = PREPARE,
) -> Iterator[str]:
    """Yield the text of each non-empty document of `part`.

    Args:
        part: from `plan_shards`.
        text_field: field (column) that holds the text.
        count: called with the number of bytes read since the last call; the sum is
            `part.num_bytes`.
        longest: maximum bytes of a document, or of a record of a JSON file.
        advice: fixes for error messages.

    Raises:
        UserError: a document cannot be read; the message names file and place.
    """
    done = 0
    with problems_named(part.source, advice=advice):
        for where, value, now in _READERS[kind_of(part.source)](part, Reading(text_field, longest)):
            with _located(where):
                text = _checked(value, text_field, longest)
            now = min(now, part.num_bytes)
            count(now - done)
            done = now
            if text:
                yield text
        count(part.num_bytes - done)


def extent_of(source: str, text_field: str, advice: Advice = PREPARE) -> tuple[int, int, bool]:
    """(bytes or rows, bytes, whether it can be divided) of a source.

    Raises:
        UserError: it cannot be read, or is a table without the column `text_field`.
    """
    kind = kind_of(source)
    with problems_named(source, kind, advice):
        if kind == "parquet":
            return _parquet_extent(source, text_field)
        if kind in ("arrow", "dataset"):
            table = _open_arrow(source) if kind == "arrow" else open_dataset(source)
            schema = table.schema if kind == "arrow" else table.features.arrow_schema
            locate_column(schema, text_field)
            size = table.nbytes if kind == "arrow" else table.data.nbytes
            return len(table), max(1, size), True
        size = Path(source).stat().st_size
        return (size, size, True) if kind == "jsonl" else (1, size, False)


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Add the place in the source to an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error.problem}", error.fix) from None


def _checked(value: Any, text_field: str, longest: int) -> str:
    if not isinstance(value, str):
        raise not_text(value, text_field)
    if len(value) > longest:
        raise streams.too_long(longest)
    if not is_unicode(value):
        raise InputError("contains an unpaired surrogate", "fix or remove the record")
    return value


def _read_text(part: Part, reading: Reading) -> Values:
    with streams.open_bytes(part.source) as (file, position):
        with _located("content"):
            text = streams.read_text(file, reading.longest)
        yield "content", text, position()


def _read_jsonl(part: Part, reading: Reading) -> Values:
    """Read the records whose lines begin in [start, stop)."""
    with streams.open_bytes(part.source) as (file, _):
        if part.start:
            file.seek(part.start - 1)
            streams.skip_line(file)
        while (at := file.tell()) < part.stop:
            where = f"byte {at}"
            with _located(where):
                line = streams.read_line(file, reading.longest)
                if streams.is_blank(line):
                    continue
                value = value_of(_parse(line), reading.text_field)
            yield where, value, at + len(line) - part.start


def _read_json(part: Part, reading: Reading) -> Values:
    """Read a JSON file from its beginning."""
    with streams.open_bytes(part.source) as (file, position):
        records = _array_records if streams.starts_array(file) else _line_records
        for where, record in records(file, reading.longest):
            with _located(where):
                value = value_of(record, reading.text_field)
            yield where, value, position()


def _array_records(file: io.BufferedReader, longest: int) -> Iterator[tuple[str, Any]]:
    with _located("content"), _json_errors():
        for number, record in enumerate(streams.ArrayReader(file, longest)):
            yield f"record {number}", record


def _line_records(file: io.BufferedReader, longest: int) -> Iterator[tuple[str, Any]]:
    for number in itertools.count(1):
        where = f"line {number}"
        with _located(where):
            line = streams.read_line(file, longest)
            if not line:
                return
            if streams.is_blank(line):
                continue
            record = _parse(line)
        yield where, record


def _parse(content: bytes) -> Any:
    with _json_errors():
        return json.loads(content)


@contextmanager
def _json_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "nested too deeply"
        raise InputError(f"must be JSON: {reason}", "fix or remove it") from None


def _parquet_extent(source: str, text_field: str) -> tuple[int, int, bool]:
    metadata = pq.read_metadata(source)
    name = ".".join(locate_column(metadata.schema.to_arrow_schema(), text_field))
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    columns = [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    size = sum(group.column(i).total_uncompressed_size for group in groups for i in columns)
    return metadata.num_rows, max(1, size), True


def _read_parquet(part: Part, reading: Reading) -> Values:
    with pq.ParquetFile(part.source) as file:
        path = locate_column(file.schema_arrow, reading.text_field)
        first, groups = 0, []
        skipped = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows <= part.start:
                skipped += rows
            elif first < part.stop:
                groups.append(group)
            first += rows
        batches = file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[".".join(path)])
        yield from _rows(batches, path, skipped, part, reading)


def _read_arrow(part: Part, reading: Reading) -> Values:
    table = _open_arrow(part.source)
    path = locate_column(table.schema, reading.text_field)
    table = table.select([table.schema.names.index(path[0])])
    batches = table.slice(part.start, part.stop - part.start).to_batches(_BATCH_ROWS)
    yield from _rows(batches, path, part.start, part, reading)


def _rows(
    batches: Iterable[Any], path: tuple[str, ...], at: int, part: Part, reading: Reading
) -> Values:
    """Rows [start, stop) of a column of batches; the first batch begins at row `at`."""
    for batch in batches:
        rows = batch.slice(max(0, part.start - at), max(0, part.stop - max(at, part.start)))
        column = rows.column(rows.schema.names.index(path[0]))
        if path[1:]:
            column = pc.struct_field(column, list(path[1:]))
        for number, value in enumerate(column, max(at, part.start)):
            yield f"row {number}", value.as_py(), _bytes_before(number + 1, part)
        at += batch.num_rows


def _bytes_before(row: int, part: Part) -> int:
    return part.num_bytes * (row - part.start) // (part.stop - part.start)


def _open_arrow(source: str) -> Any:
    """Map the table of an Arrow file: the stream format that `datasets` writes, or Feather."""
    with pa.memory_map(source) as mapped:
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).read_all()


def _read_dataset(part: Part, reading: Reading) -> Values:
    dataset = open_dataset(part.source)
    name, *inner = locate_column(dataset.features.arrow_schema, reading.text_field)
    dataset = dataset.select_columns([name])
    for start in range(part.start, part.stop, _BATCH_ROWS):
        values = dataset[start : min(start + _BATCH_ROWS, part.stop)][name]
        for number, value in enumerate(values, start):
            yield f"row {number}", inner_value(value, tuple(inner)), _bytes_before(number + 1, part)


_READERS = {
    "text": _read_text,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "dataset": _read_dataset,
}
