"""Long documents available on every machine: the source code of installed Python packages.

A package is one long text whose parts depend on one another across many files, like a repository.
Books can be written in the same way. Packages and books are held out by name, as a whole.
"""

import json
import sys
import sysconfig
from collections.abc import Collection, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

from tensorlm.runtime import disk
from tensorlm.runtime.errors import UserError

from .files import find_files
from .inputs import read_documents
from .recurrence import ask_for_facts, repeat_passages

LONGEST_PART = 200_000  # characters per document, at least 32,768 tokens
_MOST_HELD_OUT = 16  # documents per text, evenly spaced: evaluation encodes all of them
_SHORTEST_FILE, _LONGEST_FILE = 300, 300_000  # characters; longer ones are mostly tables


class LongText(NamedTuple):
    """A package or book: its name and text."""

    name: str
    text: str


def installed_packages() -> Iterator[LongText]:
    """Each importable package of this Python: its .py files sorted by path, each after a comment
    with its path.

    Packages are in a fixed random order, so that the first bytes are a sample.
    """
    roots = map(Path, (*sys.path, *map(sysconfig.get_path, ("purelib", "stdlib"))))
    folders: dict[str, Path] = {}
    for root in roots:
        for path in root.iterdir() if root.is_dir() else ():
            # Not packages: site-packages, NAME.dist-info, __pycache__.
            if path.is_dir() and path.name.isidentifier() and path.name != "__pycache__":
                folders.setdefault(path.name, path)
    for name in sorted(folders, key=lambda name: Random(name).random()):
        if text := "\n".join(_files(folders[name])):
            yield LongText(name, text)


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if _SHORTEST_FILE < len(text) < _LONGEST_FILE:
            yield f"# {path.relative_to(folder.parent)}\n{text}"


def books(patterns: list[str]) -> Iterator[LongText]:
    """Each file of `patterns` (text, also .gz or .zst) as one text, named after the file.

    Raises:
        UserError: a file cannot be read.
    """
    for file in find_files(patterns):
        name = Path(file).name.split(".")[0]
        yield LongText(name, "\n\n".join(read_documents([file], "text")))


def write_long_texts(texts: Iterator[LongText], held_out: Collection[str], folder: Path) -> str:
    """Write `folder/train.jsonl` and `folder/held_out.jsonl`, records {"name", "text"}.

    Texts are cut into documents of about `LONGEST_PART` characters at most. In train.jsonl, some
    passages are repeated, and some facts are inserted and asked for later. Both files appear when
    they are complete, held_out.jsonl last.

    Args:
        texts: texts to write, in this order.
        held_out: names of texts that are written to held_out.jsonl only.
        folder: created if missing; existing files are replaced.

    Returns:
        One line with the numbers of texts and characters written.

    Raises:
        UserError: one of the files would be empty.
    """
    disk.make_folder(folder)
    counts = {"train": 0, "held_out": 0}
    names = {"train": 0, "held_out": 0}
    files = {side: disk.AtomicFile(folder / f"{side}.jsonl") for side in counts}
    try:
        for found in texts:
            if found.name in held_out:
                side, parts = "held_out", cut(found.text, LONGEST_PART)
                parts = parts[:: -(-len(parts) // _MOST_HELD_OUT)]
            else:
                side = "train"
                text = ask_for_facts(repeat_passages(found.text, found.name), found.name)
                parts = cut(text, LONGEST_PART)
            names[side] += 1
            counts[side] += sum(map(len, parts))
            for part in parts:
                record = json.dumps({"name": found.name, "text": part})
                files[side].write(f"{record}\n".encode())
        for side, name in (("train", "to train on"), ("held_out", "held out")):
            if not counts[side]:
                raise UserError(f"{folder}: no text {name} (change --hold-out or --text)")
        for file in files.values():
            file.publish()
    finally:
        for file in files.values():
            file.discard()
    return (
        f"{folder}: texts to train on: {names['train']} ({counts['train'] / 1e6:,.1f} M characters)"
        f", held out: {names['held_out']} ({counts['held_out'] / 1e6:,.1f} M characters)"
    )


def cut(text: str, longest: int) -> list[str]:
    """Split `text` into the fewest parts of about equal length, at most about `longest` characters.

    A part ends at the end of a line, unless one line is longer than a part.
    """
    count = -(-len(text) // longest)
    ends = [0]
    for number in range(1, count):
        place = len(text) * number // count
        ends.append(max(text.rfind("\n", ends[-1], place) + 1, 0) or place)
    return [text[start:stop] for start, stop in pairwise([*ends, len(text)]) if start < stop]
