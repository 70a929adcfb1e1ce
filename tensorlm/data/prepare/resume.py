"""Resuming the preparation of a data set with the settings in `prepare.json`.

Until a shard is finished, each call starts over. After that, settings and the division into shards
are fixed, and a call with others is rejected. Until the data set is complete, inputs may be changed
or removed: their shards are encoded again, and all others stay.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from tensorlm.config import Section
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.lock import locked

from ..shards import INDEX, shard_name
from .hub import HUB, dataset_identity
from .inputs import adjust_shards, plan_shards
from .readers import Part
from .shard_writer import make_folder, write_atomically

PLAN = "prepare.json"
_LOCK = ".lock"
_SPLITS = ("train", "valid")
_ENTRIES = {PLAN, "tokenizer", *_SPLITS}
_CHOOSE = "choose another --output"


class Settings(Section):
    """Settings that must not change once a shard is finished."""

    tokenizer_sha256: str
    text_field: str
    holdout: float
    max_bytes: int
    shard_bytes: int

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits to write."""
        return _SPLITS if self.holdout > 0 else _SPLITS[:1]


class Begun(Section):
    """The content of `prepare.json`.

    sources: (name, bytes, time of the last change) of each file; (name, rows, number derived from
    its fingerprint) of each data set. shards: the parts of each shard, as (index of the source,
    start, stop, bytes).
    """

    settings: Settings
    sources: list[tuple[str, int, int]]
    shards: list[list[tuple[int, int, int, int]]]

    @classmethod
    def of(cls, settings: Settings, files: list[str], shards: list[list[Part]]) -> "Begun":
        """Make the content of the file for `shards` of `files`."""
        index = {file: number for number, file in enumerate(files)}
        parts = [
            [(index[part.source], part.start, part.stop, part.num_bytes) for part in shard]
            for shard in shards
        ]
        return cls(settings=settings, sources=[_identity(file) for file in files], shards=parts)

    @property
    def parts(self) -> list[list[Part]]:
        """The parts of each shard."""
        return [
            [Part(self.sources[source][0], *extent) for source, *extent in shard]
            for shard in self.shards
        ]


@contextlib.contextmanager
def output_locked(output: Path) -> Iterator[None]:
    """Lock a data set against other calls; create its folder if needed.

    Raises:
        UserError: another call is working there, or the folder cannot be written or contains other
            files.
    """
    _check_output(output)
    is_new = not output.exists()
    make_folder(output)
    try:
        with locked(output / _LOCK, f"{output}:"):
            yield
    except OSError as error:
        if error.filename != str(output / _LOCK):
            raise
        raise UserError(f"{output}: cannot be written ({error.strerror})") from None
    finally:
        if is_new:  # remove it again if it is still empty
            with contextlib.suppress(OSError):
                output.rmdir()


def _check_output(output: Path) -> None:
    there = [entry.name for entry in output.glob("[!.]*")]
    if there and not _ENTRIES.intersection(there):
        raise UserError(f"{output}: must be empty or a data set, got other files ({_CHOOSE})")


def begin(output: Path, settings: Settings, files: list[str]) -> list[list[Part]]:
    """Begin or resume a data set; returns the parts of each shard.

    Raises:
        UserError: the folder has shards with other settings or inputs, or other files, or there is
            nothing to read.
    """
    path = output / PLAN
    _check_output(output)
    if not path.exists() and any(any((output / split).glob("shard-*")) for split in _SPLITS):
        raise UserError(f"{output}: already contains shards ({_CHOOSE})")
    if _has_finished(output):
        now = _go_on(path, settings, files)
    else:
        shards = plan_shards(files, settings.text_field, settings.shard_bytes, settings.max_bytes)
        if not shards:
            raise UserError(
                f"{files[0]}: must contain text within --max-bytes, got nothing to read (the input "
                "is empty, or --max-bytes is too small)"
            )
        now = Begun.of(settings, files, shards)
        _remove(output, "shard-*")
        _remove(output, INDEX)
        with contextlib.suppress(OSError):
            (output / _SPLITS[-1]).rmdir()  # left by a call with --holdout
    for split in settings.splits:
        make_folder(output / split)
    _remove(output, "*.tmp")
    write_atomically(path, now.model_dump_json().encode())
    return now.parts


def _go_on(path: Path, settings: Settings, files: list[str]) -> Begun:
    try:
        begun = Begun.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{path}: is damaged or of another version ({_CHOOSE})") from None
    before = {source[0]: source for source in begun.sources}
    now = {file: _identity(file) for file in files}
    changed = {file for file in before if now.get(file) != before[file]}
    is_complete = any((path.parent / split / INDEX).exists() for split in _SPLITS)
    other = [k for k in Settings.model_fields if getattr(settings, k) != getattr(begun.settings, k)]
    if now.keys() - before.keys() or (changed and is_complete):
        other.append("inputs")
    if other:
        raise UserError(
            f"{path}: was begun with other {', '.join(other)} (repeat the first command, "
            f"{_CHOOSE}, or remove this one)"
        )
    if not changed:
        return begun
    shards = adjust_shards(
        begun.parts, changed, files, settings.text_field, settings.shard_bytes, settings.max_bytes
    )
    again = [n for n, parts in enumerate(begun.parts) if any(p.source in changed for p in parts)]
    for number in again:
        _remove(path.parent, f"{shard_name(number)}.json")
    names = ", ".join(sorted(changed)[:3]) + (", ..." if len(changed) > 3 else "")
    print(
        f"note: inputs changed or removed: {names} ({len(again)} of {len(shards)} shards are "
        "encoded again)",
        file=sys.stderr,
    )
    return Begun.of(settings, files, shards)


def _has_finished(output: Path) -> bool:
    """Whether any shard is finished in all splits."""
    splits = [output / split for split in _SPLITS if (output / split).is_dir()]
    headers = [{path.name for path in split.glob("shard-*.json")} for split in splits]
    return bool(headers and set.intersection(*headers))


def _remove(output: Path, pattern: str) -> None:
    for split in _SPLITS:
        for path in (output / split).glob(pattern):
            path.unlink(missing_ok=True)


def _identity(file: str) -> tuple[str, int, int]:
    if file.startswith(HUB):
        rows, fingerprint = dataset_identity(file)
        digest = hashlib.sha256(fingerprint.encode()).digest()
        return file, rows, int.from_bytes(digest[:7])
    stat = Path(file).stat()
    return file, stat.st_size, stat.st_mtime_ns
