"""Inputs: every format gives the same documents, however it is cut; bad ones are one line."""

import codecs
import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.inputs import plan_shards, read_documents
from tensorlm.data.prepare.readers import read_part
from tensorlm.runtime.errors import UserError

TEXTS = [f"document {i}, ünïcode\r\nand a second line\n" * (1 + i % 7) for i in range(40)]
LINES = "".join(json.dumps({"id": i, "body": t}) + "\n" for i, t in enumerate(TEXTS)).encode()


def write_compressed(path: Path, content: bytes, kind: str) -> None:
    with pa.OSFile(str(path), "wb") as raw, pa.CompressedOutputStream(raw, kind) as file:
        file.write(content)


def write_texts(folder: Path) -> str:
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.txt").write_bytes(text.encode())
    return str(folder / "*.txt")


def write_packed_texts(folder: Path) -> str:
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.txt.gz").write_bytes(gzip.compress(text.encode()))
    return str(folder / "*.gz")


def write_lines(folder: Path) -> str:
    (folder / "a.jsonl").write_bytes(LINES)
    return str(folder / "a.jsonl")


def write_ndjson(folder: Path) -> str:
    (folder / "a.NDJSON").write_bytes(LINES)
    return str(folder / "a.NDJSON")


def write_gzip(folder: Path) -> str:
    (folder / "a.JSONL.gz").write_bytes(gzip.compress(LINES[:500]) + gzip.compress(LINES[500:]))
    return str(folder / "a.JSONL.gz")


def write_zstandard(folder: Path) -> str:
    write_compressed(folder / "a.jsonl.zst", LINES, "zstd")
    return str(folder / "a.jsonl.zst")


def write_array(folder: Path) -> str:
    (folder / "a.json").write_text(json.dumps([{"body": text} for text in TEXTS]))
    return str(folder / "a.json")


def write_array_with_mark(folder: Path) -> str:
    content = " \n" + json.dumps([{"body": text} for text in TEXTS])
    (folder / "a.json").write_bytes(codecs.BOM_UTF8 + content.encode())
    return str(folder / "a.json")


def write_json_lines(folder: Path) -> str:
    (folder / "a.json").write_bytes(LINES)
    return str(folder / "a.json")


def table() -> pa.Table:
    return pa.table({"id": list(range(len(TEXTS))), "body": TEXTS})


def write_parquet(folder: Path) -> str:
    pq.write_table(table(), folder / "a.parquet", row_group_size=7)
    return str(folder / "a.parquet")


def write_arrow(folder: Path) -> str:
    with pa.OSFile(str(folder / "a.arrow"), "wb") as f, pa.ipc.new_stream(f, table().schema) as w:
        w.write_table(table(), 6)
    return str(folder / "a.arrow")


def write_feather(folder: Path) -> str:
    with pa.OSFile(str(folder / "a.arrow"), "wb") as f, pa.ipc.new_file(f, table().schema) as w:
        w.write_table(table(), 6)
    return str(folder / "a.arrow")


def write_saved_dataset(folder: Path) -> str:
    Dataset.from_dict({"body": TEXTS}).save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


def write_saved_splits(folder: Path) -> str:
    splits = {
        "train": Dataset.from_dict({"body": ["no"]}),
        "all": Dataset.from_dict({"body": TEXTS}),
    }
    DatasetDict(splits).save_to_disk(folder / "splits")
    return f"hf:{folder / 'splits'}::all"


def write_dataset_folder(folder: Path) -> str:
    (folder / "name").mkdir()
    pq.write_table(table(), folder / "name/train.parquet")
    return f"hf:{folder / 'name'}"


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    "write",
    [
        write_texts, write_packed_texts, write_lines, write_ndjson, write_gzip, write_zstandard,
        write_array, write_array_with_mark, write_json_lines, write_parquet, write_arrow,
        write_feather, write_saved_dataset, write_saved_splits, write_dataset_folder,
    ],
)  # fmt: skip
def test_every_format_gives_the_same_documents_however_it_is_cut(
    tmp_path: Path, write: Callable[[Path], str]
) -> None:
    files = find_files([write(tmp_path)])
    assert list(read_documents(files, "body")) == TEXTS
    for shard_bytes in (1, 100, 777, 10**9):
        shards = plan_shards(files, "body", shard_bytes)
        texts = [text for parts in shards for part in parts for text in read_part(part, "body")]
        assert texts == TEXTS
        for part in (part for parts in shards for part in parts):
            counts: list[int] = []
            assert list(read_part(part, "body", counts.append)) is not None
            assert sum(counts) == part.num_bytes
            assert min(counts) >= 0
    assert len(shards) == 1
    cut = plan_shards(files, "body", 10**9, max_bytes=200)
    texts = [text for parts in cut for part in parts for text in read_part(part, "body")]
    assert texts == TEXTS[: len(texts)]
    assert len(texts) < len(TEXTS)


@pytest.mark.parametrize("write", [write_lines, write_gzip, write_zstandard, write_parquet])
def test_progress_is_where_reading_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], str]
) -> None:
    rng = random.Random(0)
    long = [rng.randbytes(10_000).hex() for _ in range(600)]  # 12 MB, 6 MB when compressed
    lines = "".join(json.dumps({"body": text}) + "\n" for text in long).encode()
    monkeypatch.setitem(globals(), "LINES", lines)
    monkeypatch.setitem(globals(), "TEXTS", long)
    ((part,),) = plan_shards([write(tmp_path)], "body", 10**9)
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes

    for number, _ in enumerate(read_part(part, "body", count), 1):
        assert done / part.num_bytes == pytest.approx(number / len(long), abs=0.2)
    assert done == part.num_bytes


def test_limit_ends_before_the_document_that_would_exceed_it(tmp_path: Path) -> None:
    files = find_files([write_texts(tmp_path)])
    limit = len("".join(TEXTS[:3]).encode())
    assert list(read_documents(files, "body", limit)) == TEXTS[:3]
    assert list(read_documents(files, "body", limit - 1)) == TEXTS[:2]
    (parts,) = plan_shards(files, "body", 10**9, limit)
    assert len(parts) == 3


def test_patterns_are_sorted_and_excluded(tmp_path: Path) -> None:
    write_texts(tmp_path)
    files = find_files([str(tmp_path / "0*.txt"), str(tmp_path / "*.txt")], ["*/00*"])
    assert [Path(file).name for file in files] == [f"{i:03}.txt" for i in range(10, 40)]


@pytest.mark.parametrize(
    ("pattern", "exclude", "words"),
    [
        ("*.doc", "", "no such file"),
        ("", "", r": must be files, got a folder \(write '.*/\*\*/\*\.txt'\)"),
        ("*.txt", "*.txt", "--exclude: must leave at least 1 file, got 0 of 40"),
        ("more/*", "", r"b\.CSV\.gz: \.csv files cannot be read \(convert it to \.jsonl"),
        ("more/*", "*.gz", r"c\.pt: \.pt files cannot be read"),
    ],
)
def test_patterns_that_name_nothing_to_read_are_one_line(
    tmp_path: Path, pattern: str, exclude: str, words: str
) -> None:
    write_texts(tmp_path)
    (tmp_path / "more").mkdir()
    for name in ("a.unknown", "b.CSV.gz", "c.pt"):
        (tmp_path / "more" / name).touch()
    with pytest.raises(UserError, match=words) as caught:
        find_files([str(tmp_path / pattern)], [exclude])
    assert len(caught.value.problems) == 1
    assert len(find_files([str(tmp_path / "more/*")], ["*.gz", "*.pt"])) == 1


def test_a_file_is_found_by_its_name_even_if_that_is_a_pattern(tmp_path: Path) -> None:
    for name in ("x[1].jsonl", "x1.jsonl", "x2.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    assert find_files([str(tmp_path / "x[1].jsonl")]) == [str(tmp_path / "x[1].jsonl")]
    assert find_files([str(tmp_path / "x[2].jsonl")]) == [str(tmp_path / "x2.jsonl")]


def test_a_name_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    write_texts(tmp_path)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).touch()
    with pytest.raises(UserError) as caught:
        find_files([str(tmp_path / "*.txt")])
    (line,) = caught.value.problems
    assert line.startswith(rf"{tmp_path}/caf\xe9.txt: the name must be UTF-8 (rename it")
    assert len(find_files([str(tmp_path / "*.txt")], ["*/caf*"])) == len(TEXTS)


def damaged(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


def truncated_parquet(folder: Path) -> str:
    path = Path(write_parquet(folder))
    path.write_bytes(path.read_bytes()[:-9])
    return str(path)


def corrupt_parquet(folder: Path) -> str:
    path = Path(write_parquet(folder))
    content = bytearray(path.read_bytes())
    content[10:200] = b"\xff" * 190
    path.write_bytes(content)
    return str(path)


def numbers(folder: Path) -> str:
    pq.write_table(pa.table({"body": [1, 2, 3]}), folder / "numbers.parquet")
    return str(folder / "numbers.parquet")


@pytest.mark.parametrize(
    ("write", "word"),
    [
        (damaged("a.jsonl", LINES[:300] + b"{broken\n" + LINES[300:]), "must be JSON"),
        (damaged("a.jsonl", b'{"body": "x"}\n["x"]\n'), "byte 14: must have a field 'body'"),
        (damaged("a.jsonl", b'{"text": "x"}\n'), "must have a field 'body' (text fields: text"),
        (damaged("a.jsonl", b'{"body": null}\n'), "byte 0: field 'body' must be text"),
        (damaged("a.jsonl", b'{"body": "\xff"}\n'), "must be JSON"),
        (
            damaged("a.jsonl", b'{"body": "x"}\n{"body": "\\ud800 x"}'),
            "byte 14: contains an unpaired surrogate",
        ),
        (damaged("a.json", b'[{"body": "\\udfff"}]'), "record 0: contains an unpaired surrogate"),
        (damaged("a.jsonl", b'{"body": ' + b"[" * 100_000 + b"}"), "byte 0: must be JSON: nested"),
        (damaged("a.json", b"[" * 100_000), "content: must be JSON: nested too deeply"),
        (damaged("a.json", b'[{"body": "x"}'), "must be JSON"),
        (damaged("a.jsonl.gz", gzip.compress(LINES)[:-20]), "cannot be read"),
        (damaged("a.jsonl.gz", LINES), "cannot be read"),
        (damaged("a.jsonl.zst", LINES), "cannot be read"),
        (damaged("a.txt", b"caf\xe9"), "cannot be read"),
        (damaged("a.parquet", LINES), "cannot be read as parquet"),
        (damaged("a.arrow", LINES), "cannot be read as arrow"),
        (truncated_parquet, "cannot be read as parquet"),
        (corrupt_parquet, "cannot be read"),
        (numbers, "row 0: field 'body' must be text"),
        (lambda folder: f"hf:{folder / 'nowhere'}", "cannot be loaded by datasets"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], str], word: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    source = write(tmp_path)
    with pytest.raises(UserError) as caught:
        list(read_documents([source], "body"))
    (line,) = caught.value.problems
    assert line.startswith(source)
    assert word in line
    assert "\n" not in line
