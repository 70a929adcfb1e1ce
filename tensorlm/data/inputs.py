"""Where documents come from: files and data sets, cut into parts that workers read on their own.

    *.txt and others      one UTF-8 document a file
    *.jsonl, *.ndjson     a record a line; cut anywhere by bytes
    *.json                the same, or one array of records
    *.parquet, *.arrow    cut anywhere by rows
    hf:NAME[:SUBSET[:SPLIT]]   a `datasets` name on the hub, or a local folder; cut by rows

`.gz` and `.zst` may follow a text or JSON suffix; such a file is one part. Suffixes of tables and
binary files that are not read are refused; any other suffix is text.
"""

import codecs
import contextlib
import fnmatch
import glob
import io
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tensorlm.errors import UserError

HUB = "hf:"
_KINDS = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
_NOT_READ = {
    ".csv", ".tsv", ".xls", ".xlsx", ".ods", ".orc", ".avro", ".sqlite", ".db", ".h5", ".hdf5",
    ".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".safetensors", ".model", ".tar",
    ".tgz", ".zip", ".7z", ".rar", ".bz2", ".xz", ".lz4", ".pdf", ".doc", ".docx", ".odt", ".epub",
    ".png", ".jpg", ".jpeg", ".gif", ".mp3", ".mp4", ".wav", ".so", ".exe", ".pyc", ".whl", ".jar",
}  # fmt: skip
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

    A pattern that is the name of a file stands for that one alone. Names that start with `hf:` are
    passed on.

    Raises:
        UserError: a pattern matches nothing, nothing is left, or a file is of a kind not read, or
            has a name that is not UTF-8.
    """
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith(HUB) or os.path.isfile(pattern):
            found.add(pattern)
            continue
        files = [f for f in glob.glob(pattern, recursive=True) if Path(f).is_file()]
        if not files and Path(pattern).is_dir():
            raise UserError(f"{pattern}: is a folder (write '{Path(pattern) / '**' / '*.txt'}')")
        if not files:
            raise UserError(f"{pattern}: no such file")
        found.update(files)
    kept = sorted(f for f in found if not any(fnmatch.fnmatch(f, e) for e in exclude or []))
    if not kept:
        raise UserError(f"--exclude: leaves nothing of {len(found)} files (exclude fewer)")
    for file in kept:
        if not _is_unicode(file):
            shown = os.fsencode(file).decode(errors="backslashreplace")
            raise UserError(
                f"{shown}: the name is not UTF-8 (rename it, or leave it out with --exclude)"
            )
        if not file.startswith(HUB) and _suffix(file) in _NOT_READ:
            raise UserError(
                f"{file}: {_suffix(file)} is not read (make it .jsonl or .parquet, or leave it out "
                "with --exclude)"
            )
    return kept


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


def mend_shards(
    shards: list[list[Part]],
    changed: Collection[str],
    files: list[str],
    text_field: str,
    shard_bytes: int,
    max_bytes: int = 0,
) -> list[list[Part]]:
    """The same cut of inputs of which some have changed, or are no longer among `files`.

    The last part of a changed source ends where the source now ends; all other sources stay as they
    are cut. A changed source without parts (it was empty) gets new shards behind the others. A
    shard may have no parts left.

    Args:
        shards: from `plan_shards`.
        changed: sources that are not as they were.
        files: the sources that there still are, in the order of `plan_shards`.
        text_field: field (column) that holds the text.
        shard_bytes: that of `plan_shards`.
        max_bytes: that of `plan_shards`; where it cut the inputs off, it still does.
    """
    extents = {source: _extent(source, text_field) for source in changed if source in files}
    end = {part.source: part for shard in shards for part in shard}
    new = [file for file in files if file in changed and file not in end]
    if max_bytes and _num_bytes(shards) >= max_bytes:
        del end[next(reversed(end))]
        new = []

    def mended(part: Part) -> Part | None:
        if part.source not in changed:
            return part
        if part.source not in extents:
            return None
        extent, num_bytes, _ = extents[part.source]
        stop = extent if end.get(part.source) == part else min(part.stop, extent)
        if stop <= part.start:
            return None
        return replace(part, stop=stop, num_bytes=round(num_bytes * (stop - part.start) / extent))

    kept = [[now for part in shard if (now := mended(part))] for shard in shards]
    left = max_bytes - _num_bytes(kept)
    if max_bytes and left <= 0:
        return kept
    return kept + plan_shards(new, text_field, shard_bytes, left if max_bytes else 0)


def _num_bytes(shards: list[list[Part]]) -> int:
    return sum(part.num_bytes for shard in shards for part in shard)


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


def read_part(
    part: Part, text_field: str, count: Callable[[int], None] = lambda _: None
) -> Iterator[str]:
    """Yield the text of each document of `part` that is not empty.

    Args:
        part: from `plan_shards`.
        text_field: field (column) that holds the text.
        count: called with the bytes read since the last call, `part.num_bytes` in all.

    Raises:
        UserError: what cannot be read, by file and place.
    """
    reader, done = _READERS[_kind(part.source)], 0
    try:
        for where, text, now in reader(part, text_field):
            if not isinstance(text, str):
                raise UserError(
                    f"{part.source}: {where}: field {text_field!r} holds no text (choose "
                    "--text-field, or remove the record)"
                )
            if not _is_unicode(text):
                raise UserError(
                    f"{part.source}: {where}: half of a surrogate pair is no text (mend it, or "
                    "remove the record)"
                )
            now = min(now, part.num_bytes)
            count(now - done)
            done = now
            if text:
                yield text
        count(part.num_bytes - done)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{part.source}: cannot be read: {reason} (mend it, or leave it out with --exclude)"
        ) from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _suffix(source: str) -> str:
    """In lower case, without that of a compression."""
    name, suffix = os.path.splitext(source.lower())
    return os.path.splitext(name)[1] if suffix in _COMPRESSIONS else suffix


def _kind(source: str) -> str:
    if source.startswith(HUB):
        return "dataset"
    kind = _KINDS.get(_suffix(source), "text")
    return "json" if kind == "jsonl" and _compression(source) else kind  # it cannot be cut


def _compression(source: str) -> str | None:
    return _COMPRESSIONS.get(os.path.splitext(source.lower())[1])


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
            table = _open_arrow(source) if kind == "arrow" else open_dataset(source)
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
            f"{source}: no field {text_field!r} (has {', '.join(names) or 'none'}; choose "
            "--text-field)"
        )
    return names.index(text_field)


@contextlib.contextmanager
def _open_bytes(source: str) -> Iterator[tuple[Any, Callable[[], int]]]:
    """The file's content as a buffered stream, decompressed where its name says so; and a function
    that tells how many bytes of the file that has taken."""
    compression = _compression(source)
    if compression is None:
        with open(source, "rb") as file:
            yield file, file.tell
        return
    with pa.OSFile(source) as stored:
        content = pa.CompressedInputStream(stored, compression)
        yield io.BufferedReader(content, 1 << 20), stored.tell


def _read_text(part: Part, _: str) -> Iterator[tuple[str, Any, int]]:
    with _open_bytes(part.source) as (file, position):
        yield "content", file.read().decode(), position()


def _read_jsonl(part: Part, text_field: str) -> Iterator[tuple[str, Any, int]]:
    """The records whose lines begin in [start, stop)."""
    with open(part.source, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        while (at := file.tell()) < part.stop:
            line = file.readline()
            if line.strip():
                text = _field(_parse(line, part, f"byte {at}"), part, f"byte {at}", text_field)
                yield f"byte {at}", text, at + len(line) - part.start


def _read_json(part: Part, text_field: str) -> Iterator[tuple[str, Any, int]]:
    """A file that is read from its beginning: records line by line, or one array of records."""
    with _open_bytes(part.source) as (file, position):
        if file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            for number, record in enumerate(_parse(file.read(), part, "content")):
                where = f"record {number}"
                yield where, _field(record, part, where, text_field), position()
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"line {number}"
                text = _field(_parse(line, part, where), part, where, text_field)
                yield where, text, position()


def _parse(content: bytes, part: Part, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "nested too deeply"
        raise UserError(
            f"{part.source}: {where}: not JSON: {reason} (mend it, or remove it)"
        ) from None


def _field(record: Any, part: Part, where: str, text_field: str) -> Any:
    names = list(record) if isinstance(record, dict) else []
    _column(names, text_field, f"{part.source}: {where}")
    return record[text_field]


def _read_parquet(part: Part, text_field: str) -> Iterator[tuple[str, Any, int]]:
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


def _read_arrow(part: Part, text_field: str) -> Iterator[tuple[str, Any, int]]:
    table = _open_arrow(part.source).select([text_field])
    batches = table.slice(part.start, part.stop - part.start).to_batches(_BATCH_ROWS)
    yield from _rows(batches, part.start, part)


def _rows(batches: Iterable[Any], at: int, part: Part) -> Iterator[tuple[str, Any, int]]:
    """The rows [start, stop) of one-column batches, the first of which begins at row `at`."""
    for batch in batches:
        rows = batch.slice(max(0, part.start - at), max(0, part.stop - max(at, part.start)))
        for number, text in enumerate(rows.column(0).to_pylist(), max(at, part.start)):
            yield f"row {number}", text, _bytes_before(number + 1, part)
        at += batch.num_rows


def _bytes_before(row: int, part: Part) -> int:
    return part.num_bytes * (row - part.start) // (part.stop - part.start)


def _open_arrow(source: str) -> Any:
    """The table of an Arrow file, mapped: the stream format that `datasets` writes, or Feather."""
    with pa.memory_map(source) as mapped:
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(mapped).read_all()


def _read_dataset(part: Part, text_field: str) -> Iterator[tuple[str, Any, int]]:
    dataset = open_dataset(part.source).select_columns([text_field])
    for start in range(part.start, part.stop, _BATCH_ROWS):
        texts = dataset[start : min(start + _BATCH_ROWS, part.stop)][text_field]
        for number, text in enumerate(texts, start):
            yield f"row {number}", text, _bytes_before(number + 1, part)


def dataset_identity(source: str) -> tuple[int, str]:
    """Rows and fingerprint of an `hf:` source: equal in every process as long as it is unchanged.

    Raises:
        UserError: it cannot be loaded.
    """
    dataset = open_dataset(source)
    return len(dataset), dataset._fingerprint


@cache
def open_dataset(source: str) -> Any:
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
