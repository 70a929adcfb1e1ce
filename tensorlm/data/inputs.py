"""Where documents come from: files and data sets, cut into parts that workers read on their own.

    *.txt and others      one UTF-8 document a file
    *.jsonl               a record a line; cut anywhere by bytes
    *.json                the same, or one array of records
    *.parquet, *.arrow    cut anywhere by rows
    hf:NAME[:SUBSET[:SPLIT]]   a `datasets` name on the hub, or a local folder; cut by rows

`.gz` and `.zst` may follow a text or JSON suffix; such a file is one part.
"""

import fnmatch
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tensorlm.errors import UserError

HUB = "hf:"
_KINDS = {".json": "json", ".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BATCH_ROWS = 256


@dataclass(frozen=True)
class Part:
    """Documents that one worker reads: [start, stop) of `source`, in bytes of a JSONL file or in
    rows of a table; a file that cannot be cut is [0, 1). `num_bytes` estimates the work."""

    source: str
    start: int
    stop: int
    num_bytes: int


def find_files(patterns: list[str], exclude: list[str] | None = None) -> list[str]:
    """Files that match any glob pattern (`**` reaches into folders), sorted, less the excluded.

    Names that start with `hf:` are passed on.

    Raises:
        UserError: a pattern matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith(HUB):
            found.add(pattern)
            continue
        files = [f for f in glob.glob(pattern, recursive=True) if Path(f).is_file()]
        if not files:
            raise UserError(f"{pattern}: no such file")
        found.update(files)
    return sorted(f for f in found if not any(fnmatch.fnmatch(f, e) for e in exclude or []))


def plan_shards(
    sources: list[str], text_field: str, shard_bytes: int, max_bytes: int = 0
) -> list[list[Part]]:
    """Cut all inputs, in order, into the parts of each shard: about `shard_bytes` a shard.

    It depends on the inputs alone, never on who will read them.

    Args:
        sources: from `find_files`.
        text_field: field (column) that holds the text.
        shard_bytes: input bytes in one shard (of Parquet and Arrow: of the text column).
        max_bytes: cut the inputs off after this much; 0: read all.
    """
    shards: list[list[Part]] = [[]]
    room, left = shard_bytes, max_bytes or float("inf")
    for source in sources:
        extent, num_bytes, can_cut = _extent(source, text_field)
        start = 0
        while start < extent:
            rest = num_bytes * (extent - start) / extent
            if rest > left and not can_cut:
                return [shard for shard in shards if shard]
            take = min(rest, left, room) if can_cut else rest
            stop = (
                extent if take == rest else max(start + 1, start + int(take * extent / num_bytes))
            )
            size = round(num_bytes * (stop - start) / extent)
            shards[-1].append(Part(source, start, stop, size))
            start, room, left = stop, room - size, left - size
            if room <= 0:
                shards.append([])
                room = shard_bytes
            if left <= 0:
                return [shard for shard in shards if shard]
    return [shard for shard in shards if shard]


def read_documents(files: list[str], text_field: str, max_bytes: int = 0) -> Iterator[str]:
    """Yield the text of each document that is not empty.

    Args:
        files: from `find_files`.
        text_field: field (column) that holds the text.
        max_bytes: stop before the document that would exceed this many bytes of text; 0: no limit.
    """
    total = 0
    for source in files:
        for text in read_part(Part(source, 0, _extent(source, text_field)[0], 0), text_field):
            total += len(text.encode())
            if max_bytes and total > max_bytes:
                return
            yield text


def read_part(part: Part, text_field: str) -> Iterator[str]:
    """Yield the text of each document of `part` that is not empty.

    Raises:
        UserError: what cannot be read, by file and place.
    """
    reader = _READERS[_kind(part.source)]
    try:
        for where, text in reader(part, text_field):
            if not isinstance(text, str):
                raise UserError(
                    f"{part.source}: {where}: field {text_field!r} holds no text (choose "
                    "--text-field, or remove the record)"
                )
            if text:
                yield text
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{part.source}: cannot be read: {reason} (mend it, or leave it out with --exclude)"
        ) from None


def _kind(source: str) -> str:
    if source.startswith(HUB):
        return "dataset"
    name, suffix = os.path.splitext(source)
    if suffix not in _COMPRESSIONS:
        return _KINDS.get(suffix, "text")
    kind = _KINDS.get(os.path.splitext(name)[1], "text")
    return "json" if kind == "jsonl" else kind  # packed, it cannot be cut


def _extent(source: str, text_field: str) -> tuple[int, int, bool]:
    """(bytes or rows, bytes, whether it can be cut) of a source."""
    kind = _kind(source)
    try:
        if kind == "parquet":
            metadata = pq.read_metadata(source)
            paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
            column = _column(paths, text_field, source)
            groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
            size = sum(group.column(column).total_uncompressed_size for group in groups)
            return metadata.num_rows, max(1, size), True
        if kind in ("arrow", "dataset"):
            table = _open_arrow(source) if kind == "arrow" else _open_dataset(source)
            _column(table.column_names, text_field, source)
            size = table.nbytes if kind == "arrow" else table.data.nbytes
            return len(table), max(1, size), True
        size = Path(source).stat().st_size
        return (size, size, True) if kind == "jsonl" else (1, size, False)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{source}: cannot be read as {kind}: {str(error).splitlines()[0]} (mend it, or leave "
            "it out with --exclude)"
        ) from None


def _column(names: Iterable[str], text_field: str, source: str) -> int:
    names = list(names)
    if text_field not in names:
        raise UserError(
            f"{source}: no field {text_field!r} (has {', '.join(names)}; choose --text-field)"
        )
    return names.index(text_field)


def _open_bytes(source: str) -> Any:
    """The file's content as a buffered stream, decompressed where its name says so."""
    compression = _COMPRESSIONS.get(os.path.splitext(source)[1])
    if compression is None:
        return open(source, "rb")
    return io.BufferedReader(pa.input_stream(source, compression=compression), 1 << 20)


def _read_text(part: Part, _: str) -> Iterator[tuple[str, Any]]:
    with _open_bytes(part.source) as file:
        yield "content", file.read().decode()


def _read_jsonl(part: Part, text_field: str) -> Iterator[tuple[str, Any]]:
    """The records whose lines begin in [start, stop)."""
    with open(part.source, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        while (at := file.tell()) < part.stop:
            line = file.readline()
            if line.strip():
                yield from _record(line, f"byte {at}", part.source, text_field)


def _read_json(part: Part, text_field: str) -> Iterator[tuple[str, Any]]:
    """A file that is read from its beginning: records line by line, or one array of records."""
    with _open_bytes(part.source) as file:
        if file.peek(64).lstrip()[:1] == b"[":
            try:
                records = json.loads(file.read())
            except ValueError as error:
                raise UserError(f"{part.source}: not JSON: {error} (mend it)") from None
            for number, record in enumerate(records):
                yield from _field(record, f"record {number}", part.source, text_field)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield from _record(line, f"line {number}", part.source, text_field)


def _record(line: bytes, where: str, source: str, text_field: str) -> Iterator[tuple[str, Any]]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"{source}: {where}: not JSON: {error} (mend the line, or remove it)"
        ) from None
    yield from _field(record, where, source, text_field)


def _field(record: Any, where: str, source: str, text_field: str) -> Iterator[tuple[str, Any]]:
    names = list(record) if isinstance(record, dict) else []
    _column(names, text_field, f"{source}: {where}")
    yield where, record[text_field]


def _read_parquet(part: Part, text_field: str) -> Iterator[tuple[str, Any]]:
    with pq.ParquetFile(part.source) as file:
        first, groups = 0, []
        skipped = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows <= part.start:
                skipped += rows
            elif first < part.stop:
                groups.append(group)
            first += rows
        batches = file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[text_field])
        yield from _rows(batches, skipped, part)


def _read_arrow(part: Part, text_field: str) -> Iterator[tuple[str, Any]]:
    table = _open_arrow(part.source).select([text_field])
    batches = table.slice(part.start, part.stop - part.start).to_batches(_BATCH_ROWS)
    yield from _rows(batches, part.start, part)


def _rows(batches: Iterable[Any], at: int, part: Part) -> Iterator[tuple[str, Any]]:
    """The rows [start, stop) of one-column batches, the first of which begins at row `at`."""
    for batch in batches:
        rows = batch.slice(max(0, part.start - at), max(0, part.stop - max(at, part.start)))
        for number, text in enumerate(rows.column(0).to_pylist(), max(at, part.start)):
            yield f"row {number}", text
        at += batch.num_rows


def _open_arrow(source: str) -> Any:
    """The table of an Arrow file, mapped: the stream format that `datasets` writes, or Feather."""
    with pa.memory_map(source) as mapped:
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).read_all()


def _read_dataset(part: Part, text_field: str) -> Iterator[tuple[str, Any]]:
    dataset = _open_dataset(part.source).select_columns([text_field])
    for start in range(part.start, part.stop, _BATCH_ROWS):
        texts = dataset[start : min(start + _BATCH_ROWS, part.stop)][text_field]
        yield from ((f"row {number}", text) for number, text in enumerate(texts, start))


@cache
def _open_dataset(source: str) -> Any:
    """A `datasets` data set; once a process, since a hub name may be looked up over the network."""
    import datasets

    name, subset, split = (*source.removeprefix(HUB).split(":"), "", "")[:3]
    split = split or "train"
    try:
        if (Path(name) / "dataset_info.json").exists():
            return datasets.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # each builder raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: cannot be loaded by datasets ({reason})") from None


_READERS = {
    "text": _read_text,
    "json": _read_json,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "dataset": _read_dataset,
}
