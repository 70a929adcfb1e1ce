"""Preparing again after a bad input: what is finished and unchanged stays, and nothing is mixed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from tensorlm.data.prepare import shard_writer
from tensorlm.data.prepare.encode import encode
from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.hub import open_dataset
from tensorlm.data.prepare.inputs import adjust_shards, plan_shards
from tensorlm.data.prepare.readers import read_part
from tensorlm.data.shards import Corpus, verify_shards
from tensorlm.data.tokenizer.tokenizers import load_tokenizer
from tensorlm.data.tokenizer.training import train_tokenizer
from tensorlm.runtime.errors import UserError

SHARD_BYTES = 4000
BAD = '{"text": 5}'


def lines(name: str) -> list[str]:
    return [json.dumps({"text": f"{name} {number} and more words " * 3}) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tokenizers."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for vocab_size in (300, 310):
        train_tokenizer(lines("abc"), vocab_size, folder / str(vocab_size))
    return [folder / "300", folder / "310"]


def write(folder: Path, **files: list[str]) -> list[str]:
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return find_files([str(folder / "*.jsonl")])


def prepare(files: list[str], tokenizer: Path, output: Path, **options: Any) -> str:
    return encode(files, tokenizer, output, **{"shard_bytes": SHARD_BYTES, **options})


def finished(output: Path) -> dict[str, int]:
    """The headers that are there, and which files they are."""
    paths = output.glob("train/shard-*.json")
    return {path.name: path.stat().st_ino for path in paths}


def texts(output: Path) -> list[str]:
    tokenizer = load_tokenizer(output / "tokenizer")
    documents = Corpus(output / "train").documents()
    return [tokenizer.decode(document[1:-1]) for document in documents]


def stopped_by_a_bad_row(folder: Path, tokenizer: Path, output: Path) -> list[str]:
    """Three inputs, the second of which has a bad row: the first ones' shards get finished."""
    rows = lines("b")
    files = write(folder, a=lines("a"), b=[*rows[:40], BAD, *rows[40:]], c=lines("c"))
    with pytest.raises(UserError, match=r"b\.jsonl: byte .* must be text"):
        prepare(files, tokenizer, output)
    assert finished(output)
    return files


@pytest.mark.parametrize("repair", ["adjusted", "shortened", "emptied", "left out"])
def test_after_a_bad_row_is_mended_only_its_file_is_encoded_again(
    tmp_path: Path, tokenizers: list[Path], repair: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "set"
    files = stopped_by_a_bad_row(tmp_path, tokenizers[0], output)
    plan = plan_shards(files, "text", SHARD_BYTES)
    holds_b = {
        f"shard-{number:05d}.json"
        for number, parts in enumerate(plan)
        if any(part.source.endswith("b.jsonl") for part in parts)
    }
    before = finished(output)
    rows = lines("b")
    if repair == "adjusted":
        rows.insert(40, json.dumps({"text": "a much longer line than it was " * 400}))
    elif repair == "shortened":
        rows = rows[:20]
    elif repair == "emptied":
        rows = []
    if repair == "left out":
        files, rows = [file for file in files if not file.endswith("b.jsonl")], []
    else:
        write(tmp_path, b=rows)
    summary = prepare(files, tokenizers[0], output, workers=2)
    assert (
        "note: inputs changed or removed: " + str(tmp_path / "b.jsonl") in capsys.readouterr().err
    )
    assert f"{len(before.keys() - holds_b)} shards existed" in summary
    after = finished(output)
    assert len(after) == len(plan)
    kept = {name: inode for name, inode in before.items() if name not in holds_b}
    assert kept
    assert {name: after[name] for name in kept} == kept
    wanted = [*lines("a"), *rows, *lines("c")]
    assert texts(output) == [json.loads(row)["text"] for row in wanted]
    # It is complete: from now on other inputs are refused.
    write(tmp_path, c=lines("d"))
    with pytest.raises(UserError, match=r"was begun with other inputs .* choose another --output"):
        prepare(files, tokenizers[0], output)
    assert finished(output) == after


def test_holding_out_every_document_is_explained_and_names_the_way_on(
    tmp_path: Path, tokenizers: list[Path]
) -> None:
    files, output = write(tmp_path, a=lines("a")), tmp_path / "set"
    rule = "train must have at least 1 document, got 0 of "
    with pytest.raises(UserError, match=rule + r"\d+, since all are held out \(add texts or lower"):
        encode(files, tokenizers[0], output, holdout=1.0 - 1e-9)
    with pytest.raises(UserError, match=r"was begun with other holdout .* or remove this one\)"):
        encode(files, tokenizers[0], output, holdout=0.1)


def test_an_input_that_was_empty_and_is_filled_is_encoded_too(
    tmp_path: Path, tokenizers: list[Path]
) -> None:
    output = tmp_path / "set"
    write(tmp_path, aa=[], d=[])
    stopped_by_a_bad_row(tmp_path, tokenizers[0], output)
    before = finished(output)
    files = write(tmp_path, aa=lines("aa"), b=lines("b"), d=lines("d"))
    prepare(files, tokenizers[0], output)
    rows = [row for name in ("a", "b", "c", "aa", "d") for row in lines(name)]
    assert texts(output) == [json.loads(row)["text"] for row in rows]
    assert before.items() & finished(output).items()


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_rows_of_a_data_set_that_has_changed_are_not_mixed(
    tmp_path: Path, tokenizers: list[Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, output = tmp_path / "rows", tmp_path / "set"
    old = [json.loads(line)["text"] for line in lines("old")]
    new = [text.replace("old", "new") for text in old]

    def save(rows: list[str | None]) -> None:
        if kind == "saved":
            Dataset.from_dict({"text": rows}).save_to_disk(folder)
        else:
            folder.mkdir(exist_ok=True)
            pq.write_table(pa.table({"text": rows}), folder / "train.parquet")

    def prepare_once_more() -> str:
        open_dataset.cache_clear()  # as in a process of its own
        return prepare([f"hf:{folder}"], tokenizers[0], output)

    save([*old, None])
    with pytest.raises(UserError, match="row 60: field 'text' must be text"):
        prepare_once_more()
    assert finished(output)
    save([*new, "and an end"])
    assert "nothing to do" not in prepare_once_more()
    assert texts(output) == [*new, "and an end"]
    assert "nothing to do" in prepare_once_more()
    save([*old, "and an end"])
    with pytest.raises(UserError, match="was begun with other inputs"):
        prepare_once_more()


@pytest.mark.parametrize("change", ["text_field", "holdout", "tokenizer", "shard_bytes", "inputs"])
def test_settings_are_never_mixed(tmp_path: Path, tokenizers: list[Path], change: str) -> None:
    output = tmp_path / "set"
    files = stopped_by_a_bad_row(tmp_path, tokenizers[0], output)
    before = finished(output)
    options: dict[str, Any] = {}
    if change == "inputs":
        files = write(tmp_path, d=lines("d"))
    elif change != "tokenizer":
        options = {change: {"text_field": "body", "holdout": 0.5, "shard_bytes": 9}[change]}
    with pytest.raises(UserError) as caught:
        prepare(files, tokenizers[change == "tokenizer"], output, **options)
    (line,) = caught.value.problems
    assert line.startswith(f"{output / 'prepare.json'}: was begun with other {change}")
    assert finished(output) == before


def test_before_the_first_shard_everything_may_change(
    tmp_path: Path, tokenizers: list[Path]
) -> None:
    output = tmp_path / "set"
    files = write(tmp_path, a=lines("a"), b=[BAD])
    with pytest.raises(UserError, match="must have a field 'body'"):
        prepare(files, tokenizers[0], output, text_field="body", holdout=0.5)
    with pytest.raises(UserError, match="must be text"):
        prepare(files[1:], tokenizers[0], output, holdout=0.5, shard_bytes=10**6)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=f"^{tmp_path / 'other'}: the tokenizer cannot be loaded"):
        prepare(files[:1], tmp_path / "other", output)
    prepare(files[:1], tokenizers[1], output)
    prepare(files[:1], tokenizers[1], tmp_path / "fresh")
    for path in (tmp_path / "fresh").rglob("*"):
        copy = output / path.relative_to(tmp_path / "fresh")
        assert path.is_dir() or copy.read_bytes() == path.read_bytes()
    assert not (output / "valid").exists()


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path, tokenizers: list[Path]) -> None:
    files = write(tmp_path, a=lines("a"))
    for folder in (tmp_path, tokenizers[0]):
        before = sorted(folder.rglob("*"))
        with pytest.raises(
            UserError,
            match=rf"^{folder}: must be empty or a data set, got other files .* another --output",
        ):
            prepare(files, tokenizers[0], folder)
        assert sorted(folder.rglob("*")) == before
    # Its own tokenizer may be made first.
    train_tokenizer(lines("abc"), 300, tmp_path / "set/tokenizer")
    prepare(files, tmp_path / "set/tokenizer", tmp_path / "set")
    (tmp_path / "empty").mkdir()
    prepare(files, tokenizers[0], tmp_path / "empty")


def test_a_damaged_plan_or_shards_without_one_are_left_alone(
    tmp_path: Path, tokenizers: list[Path]
) -> None:
    output = tmp_path / "set"
    files = stopped_by_a_bad_row(tmp_path, tokenizers[0], output)
    (output / "prepare.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match=r"prepare\.json: is damaged or of another version"):
        prepare(files, tokenizers[0], output)
    (output / "prepare.json").unlink()
    with pytest.raises(UserError, match="already contains shards"):
        prepare(files, tokenizers[0], output)
    assert finished(output)


def test_a_mended_file_ends_where_it_now_ends(tmp_path: Path) -> None:
    files = write(tmp_path, a=lines("a"), b=lines("b"))
    size = sum(Path(file).stat().st_size for file in files)
    shards = plan_shards(files, "text", 1000, max_bytes=size - 1500)
    write(tmp_path, b=lines("b") + lines("c"))
    adjusted = adjust_shards(shards, {files[1]}, files, "text", 1000, max_bytes=size - 1500)
    assert adjusted == shards  # --max-bytes cut it off, and still does
    adjusted = adjust_shards(shards, {files[1]}, files, "text", 1000, max_bytes=size + 1500)
    assert adjusted[:-1] == shards[:-1]
    read = [text for part in adjusted[-1] for text in read_part(part, "text")]
    assert read[-1] == json.loads(lines("c")[-1])["text"]


def test_a_file_that_was_empty_takes_what_max_bytes_leaves(tmp_path: Path) -> None:
    files = write(tmp_path, a=lines("a"), b=[], c=lines("c"))
    size = Path(files[0]).stat().st_size + Path(files[2]).stat().st_size
    write(tmp_path, b=lines("b"))
    for max_bytes, taken in ((size - 1, 0), (size, 0), (size + 1500, 1500), (0, size // 2)):
        shards = plan_shards([files[0], files[2]], "text", 1000, max_bytes)
        adjusted = adjust_shards(shards, {files[1]}, files, "text", 1000, max_bytes)
        assert adjusted[: len(shards)] == shards
        new = [part for parts in adjusted[len(shards) :] for part in parts]
        assert {part.source for part in new} <= {files[1]}
        assert sum(part.num_bytes for part in new) == taken
    assert max(sum(part.num_bytes for part in parts) for parts in adjusted) <= 1000


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


def test_a_second_call_on_an_output_is_refused_and_harms_nothing(
    tmp_path: Path, tokenizers: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write(tmp_path, a=lines("a"))
    prepare(files, tokenizers[0], tmp_path / "alone", holdout=0.3)
    output = tmp_path / "set"
    refusals: list[str] = []
    calls: list[Path] = []
    publish = shard_writer.write_atomically

    def disturbed(path: Path, content: bytes) -> Any:
        if path.name == "shard-00000.json" and not calls:  # its tokens are there already
            calls.append(path)
            with pytest.raises(UserError) as caught:
                prepare(files, tokenizers[1], output)  # it would begin the data set anew
            refusals.extend(caught.value.problems)
        return publish(path, content)

    monkeypatch.setattr(shard_writer, "write_atomically", disturbed)
    prepare(files, tokenizers[0], output, holdout=0.3)
    (line,) = refusals
    assert line.startswith(f"{output}: is in use by pid {os.getpid()} on ")
    assert contents(output) == contents(tmp_path / "alone")


def test_a_lock_that_a_killed_call_left_is_no_obstacle(
    tmp_path: Path, tokenizers: list[Path]
) -> None:
    files, output = write(tmp_path, a=lines("a")), tmp_path / "set"
    output.mkdir()
    (output / ".lock").write_text("pid 1 on another machine\n")
    prepare(files, tokenizers[0], output)
    assert not (output / ".lock").exists()


def test_a_call_that_fails_leaves_no_lock_and_no_folder(
    tmp_path: Path, tokenizers: list[Path]
) -> None:
    files = write(tmp_path, a=[])
    for folder in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="nothing to read"):
            prepare(files, tokenizers[0], folder)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "there").iterdir()) == []


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


DAMAGES: dict[str, list[Callable[[Any], object]]] = {
    "train/shard-00000.tokens": [Path.unlink, cut],
    "valid/shard-00000.ends": [Path.unlink, cut],
    "train/shard-00000.json": [Path.unlink, cut],
    "train/index.json": [Path.unlink, cut, lambda path: path.write_text("{}")],
    "valid": [shutil.rmtree],
    "train": [shutil.rmtree],
    "tokenizer": [shutil.rmtree],
}


def test_a_repeat_repairs_what_is_missing(tmp_path: Path, tokenizers: list[Path]) -> None:
    files, output = write(tmp_path, a=lines("a")), tmp_path / "set"
    assert "nothing to do" not in prepare(files, tokenizers[0], output, holdout=0.3)
    whole = contents(output)
    for name, damages in DAMAGES.items():
        for damage in damages:
            damage(output / name)
            assert contents(output) != whole
            before = finished(output)
            summary = prepare(files, tokenizers[0], output, holdout=0.3)
            assert contents(output) == whole
            assert verify_shards(output / "train") == []
            made_again = before.items() - finished(output).items()
            assert len(made_again) <= (1 if "shard" in name else 2), summary
    assert "nothing to do" in prepare(files, tokenizers[0], output, holdout=0.3)


def test_an_index_is_never_written_over_missing_files(
    tmp_path: Path, tokenizers: list[Path]
) -> None:
    files, output = write(tmp_path, a=lines("a")), tmp_path / "set"
    prepare(files, tokenizers[0], output)
    (output / "train/index.json").unlink()
    (output / "train/shard-00000.tokens").unlink()
    with pytest.raises(UserError, match=r"shard-00000\.tokens: missing"):
        shard_writer.write_index(output / "train", len(finished(output)))
    assert not (output / "train/index.json").exists()


def test_an_index_without_shards_is_not_kept(tmp_path: Path, tokenizers: list[Path]) -> None:
    output = tmp_path / "set"
    prepare(write(tmp_path, a=lines("a")), tokenizers[0], output)
    for path in output.glob("train/shard-*"):
        path.unlink()
    files = write(tmp_path, a=lines("b"))
    prepare(files, tokenizers[0], output)
    assert texts(output) == [json.loads(row)["text"] for row in lines("b")]
