"""Long documents from installed packages and books: what is held out stays out, nothing is lost."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorlm.data.prepare import packages
from tensorlm.data.prepare.packages import (
    LongText,
    books,
    cut,
    installed_packages,
    write_long_texts,
)
from tensorlm.data.prepare.recurrence import ask_for_facts, repeat_passages
from tensorlm.runtime.errors import UserError
from tests.support.hf_models import launcher_here


def records(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@given(
    st.text(alphabet="ab\n", max_size=400),
    st.integers(min_value=1, max_value=50),
)
def test_parts_are_the_text(text: str, longest: int) -> None:
    parts = cut(text, longest)
    assert "".join(parts) == text
    assert all(parts)
    assert len(parts) == -(-len(text) // longest)


def test_parts_end_with_lines() -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    parts = cut(text, 500)
    assert all(part.endswith("\n") for part in parts)
    assert max(map(len, parts)) < 520


def test_passages_come_again_within_reach() -> None:
    text = "".join(f"{number:07d} of a text without repetition\n" for number in range(12_000))
    repeated = repeat_passages(text, "name")
    assert repeated == repeat_passages(text, "name")
    assert repeated != repeat_passages(text, "another")
    periods = len(text) // 75_000
    added = len(repeated) - len(text)
    assert 150 * periods <= added <= 1301 * periods
    lines = repeated.splitlines()
    again = [i for i, line in enumerate(lines) if len(line) > 30 and line in lines[:i]]
    assert len(again) >= 3 * periods  # whole lines of each passage
    width = len(lines[0]) + 1
    assert all((i - lines.index(lines[i])) * width < 22_000 for i in again)


def test_facts_are_asked_for_after_they_stand_there() -> None:
    text = "".join(f"{number:07d} of a text without repetition\n" for number in range(12_000))
    asked = ask_for_facts(text, "name")
    assert asked == ask_for_facts(text, "name")
    assert asked != ask_for_facts(text, "another")
    own = set(text.splitlines())
    inserted = [(i, line) for i, line in enumerate(asked.splitlines()) if line not in own]
    assert [line for line in asked.splitlines() if line in own] == text.splitlines()
    found: dict[str, list[int]] = {}
    for i, line in inserted:
        found.setdefault(max(re.findall(r"\d{3,8}", line), key=len), []).append(i)
    pairs = [places for places in found.values() if len(places) == 2]
    assert len(pairs) > 0.9 * len(text) / 4_000  # the last ones are not asked for
    assert all(len(places) <= 2 for places in found.values())
    width = len(text.splitlines()[0]) + 1
    distances = [(second - first) * width for first, second in pairs]
    assert 0 < min(distances) < 2_000
    assert 18_000 < max(distances) < 21_500


def test_texts_that_are_held_out_are_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "LONGEST_PART", 1000)
    texts = [LongText(name, f"{name} has lines\n" * 2000) for name in ("one", "two", "three")]
    said = write_long_texts(iter(texts), {"two"}, tmp_path)
    assert said == (
        f"{tmp_path}: texts to train on: 2 (0.1 M characters), held out: 1 (0.0 M characters)"
    )
    train, held_out = records(tmp_path / "train.jsonl"), records(tmp_path / "held_out.jsonl")
    assert {record["name"] for record in train} == {"one", "three"}
    assert {record["name"] for record in held_out} == {"two"}
    trained = "".join(r["text"] for r in train if r["name"] == "one").splitlines(keepends=True)
    assert "".join(line for line in trained if line == "one has lines\n") == texts[0].text
    assert len(trained) > 2000  # facts and their questions
    assert not any(
        line != "two has lines\n" for r in held_out for line in r["text"].splitlines(True)
    )
    assert 8 < len(held_out) <= 16  # evenly spaced: evaluation reads all of them


@pytest.mark.parametrize(("held_out", "missing"), [({"no"}, "held out"), ({"a"}, "to train on")])
def test_both_sides_must_have_text(tmp_path: Path, held_out: set[str], missing: str) -> None:
    with pytest.raises(UserError, match=f"no text {missing}"):
        write_long_texts(iter([LongText("a", "text\n")]), held_out, tmp_path)
    assert not list(tmp_path.iterdir())  # otherwise a later call would use incomplete texts


def test_packages_are_those_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "mine" / "inner"
    package.mkdir(parents=True)
    (package.parent / "a.py").write_text("x = 1\n" * 100)
    (package / "b.py").write_text("y = 2\n" * 100)
    (package / "short.py").write_text("z = 3\n")
    (package / "latin.py").write_bytes(b"# \xe9\n" * 100)
    (tmp_path / "site" / "mine-1.0.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), str(tmp_path / "missing")])
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda _: str(tmp_path / "missing"))
    [found] = installed_packages()
    assert found.name == "mine"
    first, second = "x = 1\n" * 100, "y = 2\n" * 100
    assert found.text == f"# mine/a.py\n{first}\n# mine/inner/b.py\n{second}"


def test_books_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("emma", "ulysses"):
        with gzip.open(tmp_path / f"{name}.txt.gz", "wt") as file:
            file.write(f"{name}\n" * 100)
    [first, _] = books([str(tmp_path / "*.gz")])
    assert (first.name, first.text) == ("emma", "emma\n" * 100)
    arguments = ("packages", "--text", tmp_path / "*.gz", "--hold-out", "emma", "--output")
    assert launcher_here("prepare_data.py", *arguments, tmp_path / "out") == 0
    assert "held out: 1 (0.0 M characters)" in capsys.readouterr().out
    assert records(tmp_path / "out" / "held_out.jsonl")[0]["name"] == "emma"
    assert launcher_here("prepare_data.py", *arguments[:-2], "no", "--output", tmp_path / "o") == 2
    assert "no text held out (change --hold-out or --text)" in capsys.readouterr().err
