"""From text files to token shards: read with `datasets`, encode, hold some documents out, write."""

import fnmatch
import glob
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tensorlm.errors import UserError

from .shards import write_shard
from .tokenizers import copy_tokenizer, load_tokenizer, tokenizer_sha256

_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".jsonl.zst": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_BATCH_DOCUMENTS = 64


def find_files(patterns: list[str], exclude: list[str] | None = None) -> list[str]:
    """Files that match any glob pattern (`**` reaches into folders), sorted, less the excluded.

    Raises:
        UserError: a pattern matches nothing.
    """
    files: set[str] = set()
    for pattern in patterns:
        found = [f for f in glob.glob(pattern, recursive=True) if Path(f).is_file()]
        if not found:
            raise UserError(f"{pattern}: no such file")
        files.update(found)
    return sorted(f for f in files if not any(fnmatch.fnmatch(f, e) for e in exclude or []))


def read_documents(files: list[str], text_field: str, max_bytes: int = 0) -> Iterator[str]:
    """Yield the text of each document: a record of JSONL, Parquet or Arrow, or a whole text file.

    Args:
        files: from `find_files`; the reader of each is chosen by its name.
        text_field: field (column) that holds the text.
        max_bytes: stop before the document that would exceed this many bytes of text; 0: no limit.
    """
    total = 0
    for file in files:
        for text in _read_file(file, text_field):
            total += len(text.encode())
            if max_bytes and total > max_bytes:
                return
            if text:
                yield text


def _read_file(file: str, text_field: str) -> Iterator[str]:
    reader = next((r for suffix, r in _READERS.items() if file.endswith(suffix)), None)
    if reader is None:
        try:
            yield Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8 text (exclude it, or convert it)") from None
        return
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    records = load_dataset(reader, data_files=file, split="train", streaming=True)
    try:
        for record in records:
            if not isinstance(record.get(text_field), str):
                raise UserError(f"{file}: no text in field {text_field!r} (has {sorted(record)})")
            yield record[text_field]
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{file}: cannot be read as {reader} ({reason})") from None


@dataclass
class _Split:
    """The documents of one split that are not yet on disk, and what is."""

    folder: Path
    pending: list[NDArray[Any]] = field(default_factory=list)
    pending_tokens: int = 0
    num_shards: int = 0
    num_tokens: int = 0
    num_documents: int = 0


class ShardSet:
    """Collects encoded documents of a data set and writes a shard whenever one is full."""

    def __init__(
        self, output: Path, vocab_size: int, tokenizer_hash: str, shard_tokens: int, holdout: float
    ) -> None:
        self.vocab_size, self.tokenizer_hash = vocab_size, tokenizer_hash
        self.shard_tokens, self.holdout = shard_tokens, holdout
        self.splits = {name: _Split(output / name) for name in ("train", "valid")}
        for split in self.splits.values():
            split.folder.mkdir(parents=True, exist_ok=True)
            if any(split.folder.glob("shard-*.json")):
                raise UserError(f"{split.folder}: holds shards already (choose another --output)")

    def add(self, text: str, ids: NDArray[Any]) -> None:
        """Add a document; whether it is held out depends on its text alone."""
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        split = self.splits["valid" if bucket < self.holdout else "train"]
        split.pending.append(ids)
        split.pending_tokens += len(ids)
        if split.pending_tokens >= self.shard_tokens:
            self._write(split)

    def finish(self) -> None:
        """Write what is left."""
        for split in self.splits.values():
            if split.pending:
                self._write(split)

    def _write(self, split: _Split) -> None:
        write_shard(
            split.folder, split.num_shards, split.pending, self.vocab_size, self.tokenizer_hash
        )
        split.num_shards += 1
        split.num_tokens += split.pending_tokens
        split.num_documents += len(split.pending)
        split.pending, split.pending_tokens = [], 0


def encode(
    files: list[str],
    tokenizer_folder: Path,
    output: Path,
    *,
    text_field: str = "text",
    max_bytes: int = 0,
    shard_tokens: int = 1 << 28,
    holdout: float = 0.0,
) -> str:
    """Encode documents into shards `output/train`, `output/valid`; returns a one-line summary.

    Each document becomes BOS, its ids, EOS. The tokenizer is copied to `output/tokenizer`.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    copy_tokenizer(tokenizer_folder, output / "tokenizer")
    shards = ShardSet(
        output, len(tokenizer), tokenizer_sha256(output / "tokenizer"), shard_tokens, holdout
    )
    start, num_bytes = time.perf_counter(), 0
    with tqdm(unit="B", unit_scale=True, desc="encode", total=max_bytes or None) as progress:
        for texts in _batches(read_documents(files, text_field, max_bytes)):
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
            for text, ids in zip(texts, encoded["input_ids"], strict=True):
                shards.add(text, np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]))
                num_bytes += len(text.encode())
            progress.update(num_bytes - progress.n)
    shards.finish()
    train, valid = shards.splits["train"], shards.splits["valid"]
    if not train.num_documents:
        raise UserError(f"{output}: no training documents (of {len(files)} files)")
    rate = (train.num_tokens + valid.num_tokens) / (time.perf_counter() - start)
    return (
        f"{output}: train {train.num_documents:,} documents, {train.num_tokens:,} tokens; "
        f"valid {valid.num_documents:,} documents, {valid.num_tokens:,} tokens; "
        f"{num_bytes / 1e6:.1f} MB, {rate:,.0f} tokens/s"
    )


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Group documents so that the tokenizer can use its threads."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch
