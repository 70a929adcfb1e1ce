"""Atomic writing of shards: an interrupted writer never leaves a partial shard.

Files are written under temporary names, synced and renamed: tokens, ends, then the header, without
which a shard does not exist. The index is written last and makes the split readable.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorlm.runtime import disk
from tensorlm.runtime.errors import UserError

from .. import shards


def token_dtype(vocab_size: int) -> str:
    """The smaller of uint16 and uint32 that can hold every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror} (make room and run the same "
            "command again: finished shards are kept)"
        ) from None


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        disk.make_folder(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be created ({error.strerror})") from None


def write_atomically(path: Path, content: bytes) -> shards.FileEntry:
    """Write a small file atomically.

    Raises:
        UserError: the file cannot be written.
    """
    with _errors_named(path):
        size, sha256 = disk.replace_file(path, content)
    return shards.FileEntry(bytes=size, sha256=sha256)


class Vocabulary(NamedTuple):
    """What a shard's header says about the tokenizer."""

    vocab_size: int
    bos_id: int
    eos_id: int
    tokenizer_sha256: str


class ShardWriter:
    """Writes one shard of `folder` as documents arrive; a context that publishes or discards it.

    Raises:
        UserError: a token id is outside the vocabulary, or a file cannot be written.
    """

    def __init__(self, folder: Path, number: int, vocabulary: Vocabulary) -> None:
        self._path = folder / f"{shards.shard_name(number)}.json"
        dtype = token_dtype(vocabulary.vocab_size)
        self._header: dict[str, Any] = {"dtype": dtype, **vocabulary._asdict()}
        self._ends: list[int] = []
        self._num_tokens = self._num_bytes = self._max_id = 0
        path = self._path.with_suffix(".tokens")
        with _errors_named(path):
            self._tokens = disk.AtomicFile(path)

    def add(self, documents: Sequence[NDArray[Any]], num_bytes: int = 0) -> None:
        """Append non-empty documents with `num_bytes` bytes of text in total."""
        if not documents:
            return
        ids = np.concatenate(documents)
        largest = int(ids.max())
        if largest >= self._header["vocab_size"]:
            raise UserError(
                f"{self._path}: token ids must be below the vocabulary size "
                f"{self._header['vocab_size']}, got {largest} (check the tokenizer's files)"
            )
        with _errors_named(self._tokens.path):
            self._tokens.write(ids.astype(self._header["dtype"]).tobytes())
        self._max_id = max(self._max_id, largest)
        self._ends += (self._num_tokens + np.cumsum([len(d) for d in documents])).tolist()
        self._num_tokens += len(ids)
        self._num_bytes += num_bytes

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._tokens.discard()

    def _publish(self) -> None:
        with _errors_named(self._tokens.path):
            size, sha256 = self._tokens.publish()
        ends = self._path.with_suffix(".ends")
        files = {
            self._tokens.path.name: shards.FileEntry(bytes=size, sha256=sha256),
            ends.name: write_atomically(ends, np.array(self._ends, dtype=np.uint64).tobytes()),
        }
        header = shards.ShardHeader(
            **self._header,
            max_id=self._max_id,
            num_tokens=self._num_tokens,
            num_documents=len(self._ends),
            num_bytes=self._num_bytes,
            files=files,
        )
        disk.sync_folder(self._path.parent)
        write_atomically(self._path, header.model_dump_json(indent=1).encode())


def write_index(folder: Path, num_shards: int) -> None:
    """Write the index of a split with shards 0 ... num_shards - 1, which makes it readable.

    A correct index is not written again.

    Raises:
        UserError: a shard or one of its files is missing, or its header is damaged.
    """
    digests = {}
    for number in range(num_shards):
        path = folder / f"{shards.shard_name(number)}.json"
        shards.check_files(path, shards.read_header(path))
        digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    index: dict[str, Any] = {"format": shards.FORMAT, "version": shards.VERSION, "headers": digests}
    index["sha256"] = shards.seal(index)
    content = json.dumps(index, indent=1).encode()
    path = folder / shards.INDEX
    if not path.is_file() or path.read_bytes() != content:
        disk.sync_folder(folder)
        write_atomically(path, content)
