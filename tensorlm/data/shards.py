"""Token shards on disk: write them atomically, map them into memory, know when they are damaged.

A data set is a folder with `train/` and `valid/` (shards) and `tokenizer/`. Shard N is three files:

    shard-0000N.tokens   token ids of all documents, one after the other (uint16 or uint32)
    shard-0000N.ends     end offset of each document, in tokens (uint64)
    shard-0000N.json     header: format version, dtype, counts, vocabulary, sizes and sha256 of both

The header is renamed into place last: a shard without one does not exist.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorlm.errors import UserError

FORMAT = "tensorlm-shard"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One shard, mapped read-only."""

    header: dict[str, Any]
    tokens: NDArray[Any]
    ends: NDArray[np.uint64]


def token_dtype(vocab_size: int) -> str:
    """Smallest of uint16 and uint32 that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(
    folder: Path, index: int, documents: list[NDArray[Any]], vocab_size: int, tokenizer_sha256: str
) -> dict[str, Any]:
    """Write one shard of encoded documents and return its header.

    Raises:
        UserError: a document has an id outside the vocabulary, or there are no documents.
    """
    if not documents:
        raise UserError(f"{folder}: no documents to write")
    dtype = token_dtype(vocab_size)
    tokens = np.concatenate(documents)
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(f"{folder}: token id {int(tokens.max())} outside vocabulary {vocab_size}")
    ends = np.cumsum([len(d) for d in documents], dtype=np.uint64)
    base = f"shard-{index:05d}"
    header = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "num_tokens": int(tokens.size),
        "num_documents": len(documents),
        "max_id": int(tokens.max()) if tokens.size else 0,
        "tokenizer_sha256": tokenizer_sha256,
        "files": {
            f"{base}.tokens": _write(folder / f"{base}.tokens", tokens.astype(dtype).tobytes()),
            f"{base}.ends": _write(folder / f"{base}.ends", ends.tobytes()),
        },
    }
    _write(folder / f"{base}.json", json.dumps(header, indent=1).encode())
    return header


def _write(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file whole or not at all; return its size and sha256."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def open_shards(folder: str | Path) -> list[Shard]:
    """Map every shard of a split, in order; sizes, counts and ids are checked against the headers.

    Raises:
        UserError: no shard, or one that its header does not describe.
    """
    folder = Path(folder)
    headers = sorted(folder.glob("shard-*.json"))
    if not headers:
        raise UserError(f"{folder}: no shards (make them with launcher/prepare_data.py encode)")
    shards = [_open_shard(path) for path in headers]
    first = shards[0].header
    for path, shard in zip(headers, shards, strict=True):
        for key in ("tokenizer_sha256", "vocab_size", "dtype"):
            if shard.header[key] != first[key]:
                raise UserError(f"{path}: {key} differs from {headers[0].name} (mixed data sets)")
    return shards


def _open_shard(path: Path) -> Shard:
    try:
        header = json.loads(path.read_text())
        known = header["format"] == FORMAT and header["version"] == VERSION
        dtype, max_id, vocab_size = header["dtype"], header["max_id"], header["vocab_size"]
        num_tokens, num_documents = header["num_tokens"], header["num_documents"]
        sizes = {name: entry["bytes"] for name, entry in header["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a shard header (prepare the data again)") from None
    if not known or dtype not in ("uint16", "uint32") or max_id >= vocab_size:
        raise UserError(f"{path}: unknown format, version, dtype or ids (prepare the data again)")
    tokens_path, ends_path = path.with_suffix(".tokens"), path.with_suffix(".ends")
    expected = {
        tokens_path: num_tokens * np.dtype(dtype).itemsize,
        ends_path: num_documents * 8,
    }
    for file, size in expected.items():
        actual = file.stat().st_size if file.exists() else -1
        if actual != size or sizes.get(file.name) != size:
            raise UserError(f"{file}: {actual} bytes, expected {size} (prepare the data again)")
    tokens = np.memmap(tokens_path, dtype=dtype, mode="r") if num_tokens else np.empty(0, dtype)
    ends = np.memmap(ends_path, dtype=np.uint64, mode="r")
    if int(ends[-1]) != num_tokens:
        raise UserError(f"{ends_path}: ends at {ends[-1]}, header says {num_tokens} tokens")
    return Shard(header, tokens, ends)


def verify_shards(folder: str | Path) -> list[str]:
    """Full checksums of a split; the names of the files that do not match their header."""
    bad = []
    for path in sorted(Path(folder).glob("shard-*.json")):
        for name, entry in json.loads(path.read_text())["files"].items():
            with open(path.parent / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    bad.append(name)
    return bad


def fingerprint(shards: Iterable[Shard]) -> str:
    """sha256 over the headers: equal for equal data, whatever the folder is called."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(json.dumps(shard.header, sort_keys=True).encode())
    return digest.hexdigest()


class Corpus:
    """All documents of a split as one indexed sequence of token arrays."""

    def __init__(self, folder: str | Path) -> None:
        self.shards = open_shards(folder)
        self.vocab_size: int = self.shards[0].header["vocab_size"]
        self.tokenizer_sha256: str = self.shards[0].header["tokenizer_sha256"]
        self.fingerprint = fingerprint(self.shards)
        ends = [s.ends.astype(np.int64) for s in self.shards]
        self.lengths = np.concatenate([np.diff(e, prepend=0) for e in ends])
        self._first = np.cumsum([0] + [len(e) for e in ends])

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) of one document, clipped to its length."""
        shard_index = int(np.searchsorted(self._first, document, side="right")) - 1
        shard = self.shards[shard_index]
        end = int(shard.ends[document - self._first[shard_index]])
        begin = end - int(self.lengths[document])
        return shard.tokens[begin + start : min(begin + stop, end)]
