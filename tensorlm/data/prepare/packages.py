"""Long documents that every machine has: the source code of its installed Python packages.

A package is one long text whose parts depend on one another across many files, as a repository
is. Books can stand beside the packages. Packages and books that are held out are named, and whole.
"""

import json
import sys
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from tensorlm.runtime.errors import UserError

from .inputs import find_files, read_documents

LONGEST_PART = 200_000  # characters of a document; 32,768 tokens and more
_MOST_HELD_OUT = 16  # documents of one text, evenly spaced: evaluation encodes all of them
_SHORTEST_FILE, _LONGEST_FILE = 300, 300_000  # characters; longer ones are mostly tables
# A passage of 48 to 400 tokens or so comes again within the next 7,000, in every third row of
# 8,192 tokens: text that only a reader of distant tokens can predict.
_PASSAGE = (150, 1300)  # characters
_PERIOD = 75_000
_REACH = 20_000


@dataclass(frozen=True)
class LongText:
    """A package or book: its name and its whole text."""

    name: str
    text: str


def installed_packages() -> Iterator[LongText]:
    """Every importable package of this Python: its .py files in order of their paths, each after a
    comment that holds its path.

    Packages come in a random order that is always the same, so that the first bytes are a sample.
    """
    roots = map(Path, (*sys.path, *map(sysconfig.get_path, ("purelib", "stdlib"))))
    folders: dict[str, Path] = {}
    for root in roots:
        for path in root.iterdir() if root.is_dir() else ():
            # No package: site-packages, NAME.dist-info, __pycache__.
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
    """Each file of `patterns` (text, also .gz or .zst) as one text, named by its file.

    Raises:
        UserError: a file that cannot be read.
    """
    for file in find_files(patterns):
        name = Path(file).name.split(".")[0]
        yield LongText(name, "\n\n".join(read_documents([file], "text")))


def write_long_texts(texts: Iterator[LongText], held_out: Collection[str], folder: Path) -> str:
    """Write `folder/train.jsonl` and `folder/held_out.jsonl`, records {"name", "text"}.

    Texts are cut into documents of about `LONGEST_PART` characters at most. Those of train.jsonl
    repeat some of their passages.

    Args:
        texts: any order; that of the records.
        held_out: names of texts that train.jsonl must not contain.
        folder: made if missing; files in it are replaced.

    Returns:
        One line that says what was written.

    Raises:
        UserError: no text at all, or none on one of the two sides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "held_out": 0}
    names = {"train": 0, "held_out": 0}
    with (
        (folder / "train.jsonl").open("w", encoding="utf-8") as train,
        (folder / "held_out.jsonl").open("w", encoding="utf-8") as held,
    ):
        for found in texts:
            side = "held_out" if found.name in held_out else "train"
            text = found.text if side == "held_out" else repeat_passages(found.text, found.name)
            names[side] += 1
            parts = cut(text, LONGEST_PART)
            if side == "held_out":
                parts = parts[:: -(-len(parts) // _MOST_HELD_OUT)]
            for part in parts:
                record = {"name": found.name, "text": part}
                (held if side == "held_out" else train).write(json.dumps(record) + "\n")
                counts[side] += len(part)
    for side, name in (("train", "to train on"), ("held_out", "held out")):
        if not counts[side]:
            raise UserError(f"{folder}: no text {name} (change --hold-out or --text)")
    return (
        f"{folder}: texts to train on: {names['train']} ({counts['train'] / 1e6:,.1f} M characters)"
        f", held out: {names['held_out']} ({counts['held_out'] / 1e6:,.1f} M characters)"
    )


def cut(text: str, longest: int) -> list[str]:
    """`text` in the fewest parts of equal length, about `longest` characters at most.

    A part ends with a line, unless one line is longer than a part.
    """
    count = -(-len(text) // longest)
    ends = [0]
    for number in range(1, count):
        place = len(text) * number // count
        ends.append(max(text.rfind("\n", ends[-1], place) + 1, 0) or place)
    return [text[start:stop] for start, stop in pairwise([*ends, len(text)]) if start < stop]


def repeat_passages(text: str, seed: str) -> str:
    """`text` with a passage repeated in every `_PERIOD` characters, up to `_REACH` further on."""
    rng, parts, done = Random(seed), [], 0
    for period in range(0, len(text) - _PERIOD, _PERIOD):
        length = rng.randint(*_PASSAGE)
        distance = rng.randint(length, _REACH)
        start = period + rng.randrange(_PERIOD - _REACH - length)
        place = text.find("\n", start + distance) + 1
        if not done < place:
            continue
        parts += [text[done:place], text[start : start + length], "\n"]
        done = place
    return "".join([*parts, text[done:]])
