"""Token shards on disk: maps them into memory and detects damage (docs/data_format.md).

A data set is a folder with `train/`, `valid/` (splits of shards) and `tokenizer/`. A split holds

    shard-0000N.tokens   token ids of all documents, one after the other (uint16 or uint32)
    shard-0000N.ends     end offset of each document, in tokens (uint64)
    shard-0000N.json     header: dtype, counts, vocabulary, largest id, size and sha256 of both
    index.json           sha256 of every header, and of itself; without it a split is unfinished
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from tensorlm.config import Section
from tensorlm.runtime import disk
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.progress import byte_bar

FORMAT: Final = "tensorlm-shard"
VERSION: Final = 2
INDEX = "index.json"
_HASH_THREADS = 8
_REPAIR = "restore the file, or prepare the data again"


class FileEntry(Section):
    """Size and checksum of one file of a shard."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ShardHeader(Section):
    """Content of shard-0000N.json; `num_bytes` is the size of the encoded text in UTF-8."""

    format: Literal["tensorlm-shard"] = FORMAT
    version: Literal[2] = VERSION
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(gt=0)
    max_id: int = Field(ge=0)
    num_tokens: int = Field(ge=0)
    num_documents: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    bos_id: int = Field(ge=0)
    eos_id: int = Field(ge=0)
    tokenizer_sha256: str
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Shard:
    """One shard, mapped read-only."""

    header: ShardHeader
    tokens: NDArray[Any]
    ends: NDArray[np.uint64]


def shard_name(number: int) -> str:
    """Name of the files of shard `number`, without their suffix."""
    return f"shard-{number:05d}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: missing ({_REPAIR})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror} ({_REPAIR})") from None


def read_header(path: Path) -> ShardHeader:
    """Read and check one header.

    Raises:
        UserError: it is missing, not a header, of another version, or inconsistent.
    """
    try:
        header = ShardHeader.model_validate_json(_read(path))
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "content"
        raise UserError(
            f"{path}: must be a shard header of version {VERSION}, got an invalid {where} "
            f"({_REPAIR})"
        ) from None
    if header.max_id >= header.vocab_size:
        raise UserError(
            f"{path}: token ids must be below the vocabulary size {header.vocab_size}, got "
            f"{header.max_id} (prepare the data again, with one tokenizer)"
        )
    sizes = {
        f"{path.stem}.tokens": header.num_tokens * np.dtype(header.dtype).itemsize,
        f"{path.stem}.ends": header.num_documents * 8,
    }
    if {name: entry.bytes for name, entry in header.files.items()} != sizes:
        raise UserError(f"{path}: file sizes must match dtype and counts ({_REPAIR})")
    return header


def check_files(path: Path, header: ShardHeader) -> None:
    """Compare the sizes of a shard's files with its header, which is at `path`.

    Raises:
        UserError: one is missing or has another size.
    """
    for name, entry in header.files.items():
        file = path.with_name(name)
        if not file.exists():
            raise UserError(f"{file}: missing ({_REPAIR})")
        if file.stat().st_size != entry.bytes:
            raise UserError(
                f"{file}: must have {entry.bytes} bytes, got {file.stat().st_size} ({_REPAIR})"
            )


def is_complete(path: Path) -> bool:
    """Whether a shard's header exists at `path`, and its files exist with the right sizes."""
    try:
        check_files(path, read_header(path))
    except UserError:
        return False
    return True


def seal(content: dict[str, Any]) -> str:
    """sha256 of plain values: the seal of index.json, and the fingerprint of a split."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_index(folder: Path) -> tuple[list[Path], str]:
    """Read the header paths of a split, in order, and its fingerprint."""
    path = folder / INDEX
    if not path.exists():
        has_shards = any(folder.glob("shard-*"))
        raise UserError(
            f"{path}: missing, since preparing did not finish (run prepare_data.py encode again)"
            if has_shards
            else f"{folder}: must contain shards (write them with launcher/prepare_data.py encode)"
        )
    try:
        index = json.loads(_read(path))
        fingerprint = index.pop("sha256")
        headers: dict[str, str] = index["headers"]
        found = (index["format"], index["version"], seal(index))
        is_whole = found == (FORMAT, VERSION, fingerprint)
        digests = {folder / name: str(digest) for name, digest in headers.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path}: damaged, or not of version {VERSION} ({_REPAIR})")
    for header, digest in digests.items():
        if not re.fullmatch(r"shard-\d{5,}\.json", header.name) or header.parent != folder:
            raise UserError(f"{path}: {header.name} is not the name of a shard ({_REPAIR})")
        if hashlib.sha256(_read(header)).hexdigest() != digest:
            raise UserError(f"{header}: differs from {INDEX} ({_REPAIR})")
    strangers = set(folder.glob("shard-*.json")) - set(digests)
    if strangers:
        raise UserError(
            f"{min(strangers)}: must be listed in {INDEX}; it may be from another data set (remove "
            "it, or prepare both together)"
        )
    return list(digests), fingerprint


def open_shards(folder: str | Path) -> tuple[list[Shard], str]:
    """Map every shard of a split, in order; returns them and the split's fingerprint.

    Checksums of index, headers and document ends are verified. Of token files, only the size is
    checked; `verify_shards` reads them.

    Raises:
        UserError: there is no shard, or one has changed; the message names the file.
    """
    folder = Path(folder)
    paths, fingerprint = _read_index(folder)
    shards = [_open_shard(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        for key in ("tokenizer_sha256", "vocab_size", "dtype", "bos_id", "eos_id"):
            if getattr(shard.header, key) != getattr(shards[0].header, key):
                raise UserError(
                    f"{path}: {key} must be the same as in {paths[0].name} (prepare different data "
                    "sets separately, and mix them with data.sources)"
                )
    return shards, fingerprint


def _open_shard(path: Path) -> Shard:
    header = read_header(path)
    check_files(path, header)
    ends_path = path.with_suffix(".ends")
    ends = np.fromfile(ends_path, dtype=np.uint64)
    if hashlib.sha256(ends.tobytes()).hexdigest() != header.files[ends_path.name].sha256:
        raise UserError(f"{ends_path}: checksum differs ({_REPAIR})")
    tokens = (
        np.memmap(path.with_suffix(".tokens"), dtype=header.dtype, mode="r").view(np.ndarray)
        if header.num_tokens
        else np.empty(0, header.dtype)
    )
    return Shard(header, tokens, ends)


def verify_shards(folder: str | Path) -> list[str]:
    """Read every byte of a split; one line for each file that does not match its checksum."""
    folder = Path(folder)
    paths, _ = _read_index(folder)
    files = [(folder / n, entry) for path in paths for n, entry in read_header(path).files.items()]
    return verify_files(files, f"verify {folder}")


def verify_files(
    files: Sequence[tuple[Path, FileEntry]],
    title: str,
    *,
    is_shown: bool = True,
    progress: Callable[[], object] = lambda: None,
) -> list[str]:
    """Read every byte of `files`; one line for each file that does not match its checksum.

    `progress` is called as bytes are read, and a bar with the title `title` shows them.
    """
    total = sum(entry.bytes for _, entry in files)
    with (
        byte_bar(total, title, is_shown=is_shown, progress=progress) as moved,
        ThreadPoolExecutor(_HASH_THREADS) as threads,
    ):

        def problem(file: tuple[Path, FileEntry]) -> str:
            path, entry = file
            try:
                _, sha256 = disk.file_sha256(path.resolve(), moved)
            except OSError as error:
                return f"{path}: cannot be read: {error.strerror} ({_REPAIR})"
            return "" if sha256 == entry.sha256 else f"{path}: checksum differs ({_REPAIR})"

        return [line for line in threads.map(problem, files) if line]


class Corpus:
    """All documents of a split as one indexed sequence of token arrays.

    `lengths` [D]: number of tokens of each document. `begins` [D]: its offset in its shard.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shards, self.fingerprint = open_shards(folder)
        if not any(shard.header.num_documents for shard in self.shards):
            raise UserError(
                f"{self.folder}: must contain documents, got none (prepare it with more text, or "
                "with --holdout)"
            )
        header = self.shards[0].header
        self.vocab_size = header.vocab_size
        self.tokenizer_sha256 = header.tokenizer_sha256
        ends = [shard.ends.astype(np.int64) for shard in self.shards]
        self.begins = np.concatenate([np.append(0, e)[:-1] for e in ends])
        self.lengths = np.concatenate(ends) - self.begins
        if int(self.lengths.min()) <= 0:
            raise UserError(f"{self.folder}: contains an empty document ({_REPAIR})")
        self.first_document = np.cumsum([0] + [len(e) for e in ends])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def name(self) -> str:
        """Name of the data set's folder."""
        return self.folder.absolute().parent.name

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return sum(shard.header.num_tokens for shard in self.shards)

    def shard_of(self, document: Any) -> Any:
        """Index of the shard that holds each document (an index, or an array of them)."""
        return self.first_document.searchsorted(document, side="right") - 1

    def tokens(self, document: int, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) of one document, clipped to its length."""
        begin, length = int(self.begins[document]), int(self.lengths[document])
        tokens = self.shards[int(self.shard_of(document))].tokens
        return tokens[begin + start : begin + min(stop, length)]

    def documents(self) -> Iterator[NDArray[Any]]:
        """All documents, one array each."""
        return (self.tokens(i, 0, int(self.lengths[i])) for i in range(len(self)))
