"""What users' files are like: several names, byte order marks, nested fields, endless documents."""

import codecs
import gzip
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.inputs import plan_shards, read_documents
from tensorlm.data.prepare.readers import read_part
from tensorlm.runtime.errors import UserError
from tests.support.launching import ROOT, launch_environment

RECORDS: list[Any] = [
    {"id": n, "meta": {"lang": "en", "page": {"text": f"text {n}"}}, "tags": ["a"]}
    for n in range(30)
]


def texts(source: Path | str, field: str = "text") -> list[str]:
    """The documents of a source: read at once and, the same, cut into parts."""
    files = find_files([str(source)])
    whole = list(read_documents(files, field))
    assert read_parts(files, field) == whole
    return whole


def read_parts(files: list[str], field: str) -> list[str]:
    parts = [part for shard in plan_shards(files, field, 100) for part in shard]
    return [text for part in parts for text in read_part(part, field)]


def problem(source: Path | str, field: str = "text") -> str:
    """The one line that a source which cannot be read gives, both when it is cut and when not."""
    files = find_files([str(source)])
    with pytest.raises(UserError) as caught:
        list(read_documents(files, field))
    (line,) = caught.value.problems
    with pytest.raises(UserError) as caught:
        read_parts(files, field)
    assert list(caught.value.problems) == [line]
    assert line.startswith(str(source))
    return line.removeprefix(str(source)).removeprefix(": ")


# --------------------------------------------------------------------------------- names of a file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a/x.txt and b/y.txt."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.txt", "b/y.txt"):
        Path(name).parent.mkdir()
        Path(name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    "names",
    [
        ["a/x.txt", "./a/x.txt"],
        ["a/*.txt", ".//a/../a/x.txt"],
        ["a/x.txt", "link/x.txt"],
        ["link/*.txt", "a/x.txt"],
        ["*/x.txt"],
        ["a/x.txt", "linked.txt"],
        ["a/x.txt", "hard.txt"],
        ["a/x.txt", "{here}/a/x.txt", "loop/loop/loop/a/*.txt"],
    ],
)
def test_a_file_of_several_names_is_read_once(folder: Path, names: list[str]) -> None:
    Path("link").symlink_to("a")
    Path("loop").symlink_to(".")
    Path("linked.txt").symlink_to("link/x.txt")
    os.link("a/x.txt", "hard.txt")
    for order in (names, names[::-1]):
        files = find_files([name.format(here=folder) for name in order])
        assert len(files) == 1
        assert list(read_documents(files, "text")) == ["a/x.txt"]
    # Its own name, whatever links there are.
    assert find_files([*(n.format(here=folder) for n in names), "a/x.txt"]) == ["a/x.txt"]


def test_a_link_may_be_excluded_and_a_file_with_a_link_too(folder: Path) -> None:
    Path("link").symlink_to("a")
    assert find_files(["*/*.txt"], ["link/*"]) == ["a/x.txt", "b/y.txt"]
    assert find_files(["*/*.txt"], ["a/*"]) == ["b/y.txt", "link/x.txt"]
    assert find_files(["./a/x.txt", "b/y.txt"], ["a/x.txt"]) == ["b/y.txt"]
    assert find_files(["a/x.txt", "b/y.txt"], ["./a/*"]) == ["b/y.txt"]


def test_copies_are_files_of_their_own(folder: Path) -> None:
    Path("copy.txt").write_bytes(Path("a/x.txt").read_bytes())
    os.utime("copy.txt", ns=(0, Path("a/x.txt").stat().st_mtime_ns))
    assert find_files(["**/*.txt"]) == ["a/x.txt", "b/y.txt", "copy.txt"]


def test_a_data_set_of_several_names_is_read_once(folder: Path) -> None:
    Dataset.from_dict({"text": ["x"]}).save_to_disk("saved")
    Path("link").symlink_to("saved")
    assert find_files(["hf:saved", "hf:./saved", "hf:link::train", f"hf:{folder}/saved"]) == [
        "hf:saved"
    ]
    assert len(find_files(["hf:saved::train", "hf:saved::test"])) == 2
    assert len(find_files(["hf:some/name", "hf:other/name", "hf:some/name:"])) == 2


# -------------------------------------------------------------------------------- byte order marks


def compressed(name: str, content: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(content)
    if not name.endswith(".zst"):
        return content
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


NAMES = [
    f"a{kind}{stored}" for kind in (".txt", ".jsonl", ".json") for stored in ("", ".gz", ".zst")
]


def content_of(name: str, *rows: str) -> str:
    return (
        "".join(rows) if ".txt" in name else "".join(json.dumps({"text": r}) + "\n" for r in rows)
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = codecs.BOM_UTF8 + content_of(name, "\ufeffünï\ufeff\n").encode()
    (tmp_path / name).write_bytes(compressed(name, content))
    assert texts(tmp_path / name) == ["\ufeffünï\ufeff\n"]  # only the first is a mark
    (tmp_path / name).write_bytes(compressed(name, codecs.BOM_UTF8))
    assert texts(tmp_path / name) == []


def test_files_that_were_joined_may_each_have_a_mark(tmp_path: Path) -> None:
    line = codecs.BOM_UTF8 + b'{"text": "x"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 20 + codecs.BOM_UTF8)
    assert texts(tmp_path / "a.jsonl") == ["x"] * 20


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_utf16_is_one_clear_line(tmp_path: Path, name: str, encoding: str) -> None:
    content = content_of(name, *(f"some words {n}\n" for n in range(20))).encode(encoding)
    (tmp_path / name).write_bytes(compressed(name, content))
    line = problem(tmp_path / name)
    assert line.startswith("must be UTF-8, got what looks like UTF-16 or UTF-32 (convert it,")


def test_zeros_in_utf8_are_text(tmp_path: Path) -> None:
    for number, text in enumerate(("\0", "a\0", "\0a", "a\0b", "a\0\0b", "ab\0\0", "\0\0\0\0")):
        (tmp_path / f"{number}.txt").write_text(text)
        assert texts(tmp_path / f"{number}.txt") == [text]


# ------------------------------------------------------------------------------------ nested fields


def write_lines(folder: Path, records: list[Any]) -> str:
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder / "a.jsonl")


def write_array(folder: Path, records: list[Any]) -> str:
    (folder / "a.json").write_text(json.dumps(records, indent=1))
    return str(folder / "a.json")


def write_parquet(folder: Path, records: list[Any]) -> str:
    pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet", row_group_size=7)
    return str(folder / "a.parquet")


def write_arrow(folder: Path, records: list[Any]) -> str:
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(folder / "a.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as w:
        w.write_table(table, 6)
    return str(folder / "a.arrow")


def write_saved(folder: Path, records: list[Any]) -> str:
    Dataset.from_list(records).save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


FORMATS = [write_lines, write_array, write_parquet, write_arrow, write_saved]
Write = Callable[[Path, list[Any]], str]


@pytest.mark.parametrize("write", FORMATS)
def test_a_field_inside_others_is_named_with_dots(tmp_path: Path, write: Write) -> None:
    source = write(tmp_path, RECORDS)
    assert texts(source, "meta.page.text") == [f"text {n}" for n in range(30)]
    assert texts(source, "meta.lang") == ["en"] * 30


@pytest.mark.parametrize("write", FORMATS)
def test_every_field_that_is_offered_can_be_chosen_and_no_other_is_offered(
    tmp_path: Path, write: Write
) -> None:
    source = write(tmp_path, RECORDS)
    line = problem(source)
    assert (
        "must have a field 'text' (text fields: meta.lang, meta.page.text; choose --text-field)"
        in line
    )
    line = problem(source, "meta")
    assert "field 'meta' must be text, got an object (has meta." in line
    assert problem(source, "meta.page.body").count("meta.page.text") == 1
    assert "field 'tags' must be text, got a list (choose" in problem(source, "tags")
    assert "must have a field 'id.x'" in problem(source, "id.x")


@pytest.mark.parametrize("write", FORMATS)
def test_a_name_with_a_dot_comes_before_a_nested_field(tmp_path: Path, write: Write) -> None:
    records = [{"a": {"b": "nested", "c.d": "deep"}, "a.b": "flat"}]
    source = write(tmp_path, records)
    assert texts(source, "a.b") == ["flat"]
    assert texts(source, "a.c.d") == ["deep"]


@pytest.mark.parametrize("write", FORMATS)
def test_nothing_inside_nothing_is_one_line(tmp_path: Path, write: Write) -> None:
    records = [{"meta": {"text": "x"}}, {"meta": None}]
    assert "field 'meta.text'" in problem(write(tmp_path, records), "meta.text")


def test_very_many_fields_are_not_all_offered(tmp_path: Path) -> None:
    line = problem(write_lines(tmp_path, [{f"field {n}": "x" for n in range(1000)}]))
    assert "field 19, ...; choose" in line
    assert len(line) < 400


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as w:
        w.write_table(table)
    assert texts(tmp_path / "a.parquet") == texts(tmp_path / "a.arrow") == ["x"]


# ------------------------------------------------------------------------------- endless documents


def test_an_array_is_read_record_by_record(tmp_path: Path) -> None:
    values = [f'{"ü" * n} "]}},[{{ \\ {n}' for n in (*range(50), 700_000, 2_000_000, 3)]
    for separators in ((",", ":"), (" ,\n\t ", " : ")):
        content = json.dumps([{"text": value} for value in values], separators=separators)
        (tmp_path / "a.json").write_text(f"\n {content} \n")
        assert texts(tmp_path / "a.json") == values
    for content in ("[]", " [ \n ] "):
        (tmp_path / "a.json").write_text(content)
        assert texts(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "x"},]', "content: must be JSON: Expecting value in record 1"),
        ('[{"text": "x"} {"text": "y"}]', "content: must be JSON: expecting , or ] after record 0"),
        ('[{"text": "x"}] x', "content: must be JSON: extra data"),
        ('[{"text": "x"}', "content: must be JSON: expecting , or ] after record 0"),
        ('[{"text": "x"}, {"text": "y', "content: must be JSON: Unterminated string"),
        ('[{"text": "x"}, {"text" "y"}' + " " * 3_000_000, "record 1 (fix or remove it"),
        ('[{"text": "x"}, 7]', "record 1: must have a field 'text' (text fields: none;"),
        ("[", "content: must be JSON"),
    ],
)
def test_an_array_that_is_not_json_is_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert words in problem(tmp_path / "a.json")


def test_documents_without_end_are_one_line_each_and_little_memory(tmp_path: Path) -> None:
    lines, array = '{"text": "fine"}\n{"text": "', '[{"text": "fine"}, {"text": "'
    begins = {"txt": "", "txt.gz": "", "txt.zst": "", "jsonl": lines, "jsonl.gz": lines}
    begins |= {"json": lines, "json.gz": array, "json.zst": array}
    for suffix, begin in begins.items():
        write_endless(tmp_path / f"a.{suffix}", begin, 3 << 30)
    code = (
        "import resource, sys\n"
        "from tensorlm.data.prepare.inputs import *\n"
        "from tensorlm.runtime.errors import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in sys.argv[1:]:\n"
        "    try: list(read_documents([name], 'text', longest=1 << 24))\n"
        "    except UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    names = [str(tmp_path / f"a.{suffix}") for suffix in begins]
    result = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, env=launch_environment(),
        capture_output=True, text=True, check=True, timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )  # fmt: skip
    *problems, kibibytes = result.stdout.splitlines()
    for name, line in zip(names, problems, strict=True):
        assert line.startswith(f"{name}: ")
        assert "must have at most 16,777,216 bytes (split it, or raise --max-document" in line
    assert int(kibibytes) < 128 << 10


def write_endless(path: Path, begin: str, size: int) -> None:
    """A file that is small on the disk and has `size` characters more than `begin`."""
    if path.suffix not in (".gz", ".zst"):
        path.write_text(begin)
        os.truncate(path, len(begin) + size)
        return
    kind = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    with pa.OSFile(str(path), "wb") as raw, pa.CompressedOutputStream(raw, kind) as file:
        file.write(begin.encode())
    block, count = path.read_bytes(), size >> 24
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as file:
        file.write(b" " * (1 << 24))
    path.write_bytes(block + sink.getvalue().to_pybytes() * count)  # members one after the other


def test_the_limit_can_be_set_and_holds_for_every_format(tmp_path: Path) -> None:
    for number, write in enumerate(FORMATS):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = write(folder, [{"text": "x" * 100}, {"text": "y" * 300}])
        assert len(list(read_documents([source], "text", longest=400))) == 2
        with pytest.raises(UserError, match="must have at most 200 bytes"):
            list(read_documents([source], "text", longest=200))
    (tmp_path / "a.txt").write_text("ü" * 100)
    assert list(read_documents([str(tmp_path / "a.txt")], "text", longest=200)) == ["ü" * 100]
    with pytest.raises(UserError, match="content: must have at most 199 bytes"):
        list(read_documents([str(tmp_path / "a.txt")], "text", longest=199))


def test_a_part_that_begins_within_a_long_line_reads_the_lines_behind_it(tmp_path: Path) -> None:
    values = ["x" * 3_000_000, "y", "z" * 5]
    source = write_lines(tmp_path, [{"text": value} for value in values])
    shards = plan_shards([source], "text", 1_000_000)
    assert len(shards) > 2
    found = [[t for part in shard for t in read_part(part, "text")] for shard in shards]
    assert [text for shard in found for text in shard] == values
