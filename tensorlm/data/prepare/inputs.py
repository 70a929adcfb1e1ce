"""Inputs: files and data sets, divided into parts that workers read independently.

    *.txt and others      one UTF-8 document per file
    *.jsonl, *.ndjson     one record per line; divided by bytes
    *.json                one record per line, or one array of records
    *.parquet, *.arrow    divided by rows
    hf:NAME[:SUBSET[:SPLIT]]   a `datasets` name on the Hub, or a local folder; divided by rows

`.gz` and `.zst` may follow a text or JSON suffix; such a file is one part. Suffixes of unsupported
tables and binary files are rejected. Any other suffix is text.
"""

from collections.abc import Collection, Iterator

from .input_errors import PREPARE, Advice
from .readers import LONGEST_DOCUMENT, Part, extent_of, read_part


def plan_shards(
    sources: list[str], text_field: str, shard_bytes: int, max_bytes: int = 0
) -> list[list[Part]]:
    """Divide all inputs, in order, into parts for each shard, with about `shard_bytes` per shard.

    The result depends only on the inputs, not on the workers.

    Args:
        sources: from `find_files`.
        text_field: field (column) that holds the text.
        shard_bytes: input bytes per shard (for Parquet and Arrow: of the text column).
        max_bytes: stop after this many bytes of input (0: read all).
    """
    shards: list[list[Part]] = [[]]
    room, left = shard_bytes, max_bytes or float("inf")
    for source in sources:
        extent, num_bytes, can_cut = extent_of(source, text_field)
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


def adjust_shards(
    shards: list[list[Part]],
    changed: Collection[str],
    files: list[str],
    text_field: str,
    shard_bytes: int,
    max_bytes: int = 0,
) -> list[list[Part]]:
    """Keep the division into shards after some inputs have changed or were removed from `files`.

    The last part of a changed source ends where the source now ends. All other sources keep their
    parts. A changed source without parts (it was empty) gets new shards after the others. A shard
    may end up without parts.

    Args:
        shards: from `plan_shards`.
        changed: changed or removed sources.
        files: the remaining sources, in the order of `plan_shards`.
        text_field: field (column) that holds the text.
        shard_bytes: as for `plan_shards`.
        max_bytes: as for `plan_shards`; it still ends the inputs at the same place.
    """
    extents = {source: extent_of(source, text_field) for source in changed if source in files}
    end = {part.source: part for shard in shards for part in shard}
    new = [file for file in files if file in changed and file not in end]
    if max_bytes and _num_bytes(shards) >= max_bytes:
        del end[next(reversed(end))]
        new = []

    def adjusted(part: Part) -> Part | None:
        if part.source not in changed:
            return part
        if part.source not in extents:
            return None
        extent, num_bytes, _ = extents[part.source]
        stop = extent if end.get(part.source) == part else min(part.stop, extent)
        if stop <= part.start:
            return None
        return part._replace(stop=stop, num_bytes=round(num_bytes * (stop - part.start) / extent))

    kept = [[now for part in shard if (now := adjusted(part))] for shard in shards]
    left = max_bytes - _num_bytes(kept)
    if max_bytes and left <= 0:
        return kept
    return kept + plan_shards(new, text_field, shard_bytes, left if max_bytes else 0)


def _num_bytes(shards: list[list[Part]]) -> int:
    return sum(part.num_bytes for shard in shards for part in shard)


def read_documents(
    files: list[str],
    text_field: str,
    max_bytes: int = 0,
    longest: int = LONGEST_DOCUMENT,
    advice: Advice = PREPARE,
) -> Iterator[str]:
    """Yield the text of each non-empty document.

    Args:
        files: from `find_files`.
        text_field: field (column) that holds the text.
        max_bytes: stop before the document that would exceed this many bytes of text (0: no limit).
        longest: maximum bytes of a document.
        advice: fixes for error messages.

    Raises:
        UserError: a document cannot be read; the message names file and place.
    """
    total = 0
    for source in files:
        part = Part(source, 0, extent_of(source, text_field, advice)[0], 0)
        for text in read_part(part, text_field, longest=longest, advice=advice):
            total += len(text.encode())
            if max_bytes and total > max_bytes:
                return
            yield text
