"""The files named by the inputs, each only once, and the kind of each file."""

import fnmatch
import glob
import os
import stat
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from tensorlm.runtime.errors import UserError

from .hub import HUB, parse_hub_name
from .input_errors import PREPARE, Advice

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


def find_files(
    patterns: list[str], exclude: list[str] | None = None, advice: Advice = PREPARE
) -> list[str]:
    """Find the files that match any glob pattern (`**` includes sub-folders), without `exclude`.

    The result is sorted. A pattern that is the name of a file means that file only. Names that
    start with `hf:` are passed through. A file with several names (links, `./`) is listed once.

    Raises:
        UserError: a pattern matches nothing, no file is left, or a file is of an unsupported kind
            or has a name that is not UTF-8.
    """
    found: set[str] = set()
    for pattern in patterns:
        if pattern.startswith(HUB) or os.path.isfile(pattern):
            found.add(pattern)
            continue
        files = [f for f in glob.glob(pattern, recursive=True) if Path(f).is_file()]
        if not files and Path(pattern).is_dir():
            raise UserError(
                f"{pattern}: must be files, got a folder (write '{Path(pattern) / '**' / '*.txt'}')"
            )
        if not files:
            raise UserError(f"{pattern}: no such file")
        found.update(files)
    kept = [file for file in found if not any(_matches(file, e) for e in exclude or [])]
    if not kept:
        raise UserError(
            f"--exclude: must leave at least 1 file, got 0 of {len(found)} (exclude fewer)"
        )
    kept = _each_once(kept)
    for file in kept:
        _check(file, advice)
    return kept


def kind_of(source: str) -> str:
    """The kind of a source: text, json, jsonl, parquet, arrow or dataset."""
    if source.startswith(HUB):
        return "dataset"
    kind = _KINDS.get(_suffix(source), "text")
    return "json" if kind == "jsonl" and compression_of(source) else kind  # cannot be divided


def compression_of(source: str) -> str | None:
    """The compression given by a file's suffix, under pyarrow's name."""
    return _COMPRESSIONS.get(os.path.splitext(source.lower())[1])


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded in UTF-8, which an unpaired surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _suffix(source: str) -> str:
    """The suffix in lower case, without that of a compression."""
    name, suffix = os.path.splitext(source.lower())
    return os.path.splitext(name)[1] if suffix in _COMPRESSIONS else suffix


def _matches(file: str, pattern: str) -> bool:
    """Whether a name matches a pattern, as written or with both normalized (`./`, `//`)."""
    if fnmatch.fnmatch(file, pattern):
        return True
    is_name = not file.startswith(HUB)
    return is_name and fnmatch.fnmatch(str(Path(file)), str(Path(pattern)))


def _each_once(names: Iterable[str]) -> list[str]:
    """One name for each file, sorted: not a link if possible, then the shortest."""
    names_of: dict[object, list[str]] = {}
    identity = _identifier()
    for name in names:
        names_of.setdefault(identity(name), []).append(name)
    return sorted(min(names, key=_preference) for names in names_of.values())


def _preference(name: str) -> tuple[bool, int, str]:
    return os.path.realpath(name) != os.path.abspath(name), len(name), name


def _identifier() -> Callable[[str], object]:
    """A function that maps names to identities, which are equal for the same file or data set.

    File systems without real inode numbers may give two files the same one. So inodes are compared
    only if a file has several names; otherwise paths are compared.
    """
    real_folder = cache(os.path.realpath)  # many files are in few folders

    def identity(name: str) -> object:
        if name.startswith(HUB):
            folder, *part = parse_hub_name(name)
            return HUB, real_folder(folder) if Path(folder).exists() else folder, *part
        path = os.path.join(real_folder(os.path.dirname(name)), os.path.basename(name))
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            path = os.path.realpath(path)
            status = os.stat(path)
        return (status.st_dev, status.st_ino) if status.st_nlink > 1 else path

    return identity


def _check(file: str, advice: Advice) -> None:
    if not is_unicode(file):
        shown = os.fsencode(file).decode(errors="backslashreplace")
        raise UserError(f"{shown}: the name must be UTF-8 (rename it, or {advice.skip})")
    if not file.startswith(HUB) and _suffix(file) in _NOT_READ:
        raise UserError(
            f"{file}: {_suffix(file)} files cannot be read (convert it to .jsonl or .parquet, or "
            f"{advice.skip})"
        )
