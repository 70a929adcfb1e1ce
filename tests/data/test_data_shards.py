"""Shards: written whole or not at all, and every kind of damage is one line that names the file."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorlm.data.prepare.shard_writer import ShardWriter, Vocabulary, token_dtype, write_index
from tensorlm.data.shards import Corpus, open_shards, seal, verify_shards
from tensorlm.runtime.errors import UserError
from tests.support.documents import write_split

LENGTHS = [30, 5, 64, 17, 90, 1]


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Two shards whose token ids tell document and place: id = 100 * document + place."""
    documents = [100 * d + np.arange(n) for d, n in enumerate(LENGTHS)]
    return write_split(tmp_path / "set/train", [documents[:3], documents[3:]], 1000)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), (128_256, "uint32")])
def test_documents_come_back_as_they_were_written(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, n) for n in LENGTHS]
    corpus = Corpus(write_split(tmp_path, [documents[:1], [], documents[1:]], vocab_size))
    assert corpus.shards[0].tokens.dtype == dtype == token_dtype(vocab_size)
    assert corpus.lengths.tolist() == LENGTHS
    assert corpus.num_tokens == sum(LENGTHS)
    for held, document in zip(corpus.documents(), documents, strict=True):
        assert np.array_equal(held, document)
    assert np.array_equal(corpus.tokens(2, 10, 1000), documents[2][10:])


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bos_id": 1, "eos_id": 2, "tokenizer_sha256": "tokenizer"}

    def write() -> None:
        with ShardWriter(tmp_path, 0, Vocabulary(vocab_size=12, **options)) as shard:
            shard.add([np.arange(12)])
            shard.add([np.arange(5), np.arange(13)])

    with pytest.raises(UserError, match="token ids must be below the vocabulary size 12, got 12"):
        write()
    assert list(tmp_path.iterdir()) == []


def flip(file: str, place: float, bit: int) -> Callable[[Path], None]:
    """Change one bit, `place` of the way through a file."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[int(place * (len(content) - 1))] ^= 1 << bit
        (folder / file).write_bytes(content)

    return damage


def resize(file: str, change: int) -> Callable[[Path], None]:
    """Cut bytes off the end, or add zeros to it."""

    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        content = content + bytes(change) if change > 0 else content[:change]
        (folder / file).write_bytes(content)

    return damage


def overwrite(file: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return damage


def zero(file: str) -> Callable[[Path], None]:
    """Zeros of the same length: what a file system may leave after a power cut."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(bytes((folder / file).stat().st_size))

    return damage


def remove(pattern: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return damage


def exchange(one: str, other: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        contents = (folder / one).read_bytes(), (folder / other).read_bytes()
        (folder / other).write_bytes(contents[0])
        (folder / one).write_bytes(contents[1])

    return damage


def folder_instead(file: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def header(**changes: Any) -> Callable[[Path], None]:
    """Another header of shard 1, with an index that vouches for it."""

    def damage(folder: Path) -> None:
        path = folder / "shard-00001.json"
        content = json.loads(path.read_text())
        for key, value in changes.items():
            if value is None:
                del content[key]
            else:
                content[key] = value
        path.write_text(json.dumps(content))
        index = json.loads((folder / "index.json").read_text())
        del index["sha256"]
        index["headers"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        index["sha256"] = seal(index)
        (folder / "index.json").write_text(json.dumps(index))

    return damage


def stranger(folder: Path) -> None:
    """A shard of another data set, copied in."""
    for suffix in ("tokens", "ends", "json"):
        shutil.copy(folder / f"shard-00000.{suffix}", folder / f"shard-00007.{suffix}")


def unfinished(folder: Path) -> None:
    """What a killed `encode` leaves."""
    (folder / "index.json").unlink()
    (folder / "shard-00001.json").unlink()


def rewritten(**options: Any) -> Callable[[Path], None]:
    """Shard 1 is one that was prepared in another way, and the index was made for both."""

    def damage(folder: Path) -> None:
        values = {"vocab_size": 1000, "bos_id": 1, "eos_id": 2, "tokenizer_sha256": "tokenizer"}
        with ShardWriter(folder, 1, Vocabulary(**{**values, **options})) as shard:
            shard.add([np.arange(7)])
        write_index(folder, 2)

    return damage


def no_documents(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    write_split(folder, [[], []], 1000)


FILES = [f"shard-0000{n}.{suffix}" for n in (0, 1) for suffix in ("tokens", "ends", "json")]
MUTATIONS: dict[str, Callable[[Path], None]] = {
    **{f"flip {f} at {p}": flip(f, p, i) for f in FILES for i, p in enumerate((0.0, 0.3, 0.77))},
    **{f"flip index.json at {p}": flip("index.json", p, 3) for p in (0.0, 0.4, 0.6, 1.0)},
    **{f"truncate {f}": resize(f, -1) for f in [*FILES, "index.json"]},
    **{f"lengthen {f}": resize(f, 2) for f in FILES},
    **{f"empty {f}": overwrite(f, b"") for f in FILES},
    **{f"zero {f}": zero(f) for f in FILES},
    **{f"remove {f}": remove(f) for f in [*FILES, "index.json"]},
    "other content in the header": overwrite("shard-00000.json", b"[1, 2]"),
    "other content in the index": overwrite("index.json", b'{"headers": []}'),
    "shards exchanged": exchange("shard-00000.tokens", "shard-00001.tokens"),
    "headers exchanged": exchange("shard-00000.json", "shard-00001.json"),
    "a folder for a file": folder_instead("shard-00000.tokens"),
    "a folder for the header": folder_instead("shard-00000.json"),
    "dtype": header(dtype="uint32"),
    "unknown dtype": header(dtype="int8"),
    "version": header(version=1),
    "format": header(format="other"),
    "vocabulary below the largest id": header(vocab_size=400),
    "negative count": header(num_tokens=-3),
    "wrong count": header(num_documents=2),
    "count as text": header(num_tokens="108"),
    "key missing": header(max_id=None),
    "key unknown": header(comment="x"),
    "files missing": header(files={}),
    "stranger": stranger,
    "unfinished": unfinished,
    "another tokenizer": rewritten(tokenizer_sha256="other"),
    "another vocabulary": rewritten(vocab_size=2000),
    "another end of text": rewritten(eos_id=3),
    "no documents": no_documents,
    "nothing": remove("*"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_damage_is_one_line_that_names_the_file_and_the_fix(split: Path, name: str) -> None:
    assert verify_shards(split) == []
    MUTATIONS[name](split)
    try:
        Corpus(split)
        problems = tuple(verify_shards(split))
    except UserError as error:
        problems = error.problems
    assert problems
    for line in problems:
        assert line.startswith(str(split))
        assert line.endswith(")")
        assert "\n" not in line
        assert len(line) < 200 + len(str(split))
    # Only the content of token files is beyond the quick look at start.
    if "tokens" not in name or name.startswith(("truncate", "lengthen", "empty", "remove")):
        with pytest.raises(UserError):
            Corpus(split)


def test_there_are_enough_mutations() -> None:
    assert len(MUTATIONS) >= 60


def test_a_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"must contain shards \(write them with launcher/prepare_data.py"
    ):
        open_shards(tmp_path / "nowhere")


def test_verify_names_every_bad_file(split: Path) -> None:
    assert verify_shards(split) == []
    flip("shard-00000.tokens", 0.1, 0)(split)
    flip("shard-00001.tokens", 0.9, 7)(split)
    lines = verify_shards(split)
    assert [line.split(":")[0] for line in lines] == [
        str(split / f"shard-0000{n}.tokens") for n in (0, 1)
    ]


def test_verify_goes_on_after_a_file_that_cannot_be_read(split: Path) -> None:
    (split / "shard-00000.tokens").unlink()
    flip("shard-00001.tokens", 0.9, 7)(split)
    missing, damaged = verify_shards(split)
    assert missing.startswith(f"{split}/shard-00000.tokens: cannot be read: No such file")
    assert damaged.startswith(f"{split}/shard-00001.tokens: checksum differs (")


def test_equal_data_has_an_equal_fingerprint_wherever_it_is(tmp_path: Path, split: Path) -> None:
    copy = shutil.copytree(split, tmp_path / "copy")
    assert Corpus(copy).fingerprint == Corpus(split).fingerprint
    other = write_split(tmp_path / "other", [[np.arange(5)]], 1000)
    assert Corpus(other).fingerprint != Corpus(split).fingerprint
