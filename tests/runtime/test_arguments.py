"""Command lines: settings anywhere, what cannot be measured refused, a reader that has left."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tensorlm.runtime.arguments import Option, Parser, add_options, parse_args
from tensorlm.runtime.errors import EXIT_BROKEN_PIPE, EXIT_USER_ERROR
from tests.support.forked import run_forked
from tests.support.launching import ROOT


def parse(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    convert, other = commands.add_parser("convert"), commands.add_parser("other")
    convert.add_argument("--dtype")
    convert.add_argument("overrides", nargs="*")
    other.add_argument("--dtype")
    monkeypatch.setattr(sys, "argv", ["launcher", *words])
    return parse_args(parser)


def test_settings_may_stand_anywhere_behind_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, "convert", "a.b=1", "--dtype", "bf16", "c.d=2", "e.f=3")
    assert (args.dtype, args.overrides) == ("bf16", ["a.b=1", "c.d=2", "e.f=3"])


def test_type_and_shown_default_of_an_option_are_those_of_its_default_or_metavar() -> None:
    parser = argparse.ArgumentParser()
    options = {
        "--bytes N": Option("bytes to read", 20_000),
        "--share S": Option("share (0: none; default: 0.5)", 0.5),
        "--all": Option("read all", default=False),
        "--files FILE": Option("files to skip", [], nargs="*"),
        "--rows N": Option("rows to read (default: all)"),
        "folder DIR": Option("where to read"),
    }
    add_options(parser, options)
    args = parser.parse_args(["--bytes", "7", "--all", "--rows", "2", "x"])
    assert vars(args) == {
        "bytes": 7, "share": 0.5, "all": True, "files": [], "rows": 2, "folder": Path("x"),
    }  # fmt: skip
    text = parser.format_help()
    assert "bytes to read (default: 20,000)" in text
    assert text.count("default:") == 3


@pytest.mark.parametrize("words", [("convert", "a.b=1", "--strange"), ("other", "a.b=1")])
def test_what_is_no_setting_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit):
        parse(monkeypatch, *words)
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("data --documents 0", "--documents: must be above 0, got 0"),
        ("train --config configs/demo.toml --repeats 0", "--repeats: must be above 0, got 0"),
        ("train --config configs/demo.toml --lengths 8,0", "--lengths: must be integers above 0"),
        ("train --config configs/demo.toml --plot x.svgz", "--plot: must end in .png, got x.svgz"),
        ("sp --config configs/demo.toml --overlap 2 --only-project", "--overlap: must be from 0"),
    ],
)
def test_benchmarks_refuse_what_they_cannot_measure(words: str, problem: str) -> None:
    result = run_forked("benchmark.py", *words.split())
    assert result.returncode == EXIT_USER_ERROR
    assert result.stderr.splitlines()[-1].startswith(f"error: {problem}")


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_reader_that_has_left_is_no_error(size: int) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    code = "from tensorlm.runtime.exit import run_launcher\n"
    code += f"run_launcher(lambda: print('x' * {size}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, timeout=60
    )
    os.close(theirs)
    assert result.returncode == EXIT_BROKEN_PIPE
    assert result.stderr == b""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", "x"], "--gpus: must be an integer, got x"),
        (["--gpus", "1", "--share", "all"], "--share: must be a number, got all"),
        (["--gpus", "1", "--kind", "c"], "--kind: must be one of 'a', 'b', got c"),
        (["--gpus"], "--gpus: must have a value, got none"),
        ([], "--gpus: missing (see --help)"),
        (["--gpus", "1", "--old"], "unrecognized arguments: --old (see --help)"),
    ],
)
def test_a_wrong_option_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    parser = Parser()
    kind = Option("a kind", choices=("a", "b"))
    gpus = Option("number of GPUs", required=True)
    add_options(parser, {"--gpus N": gpus, "--share X": Option("a share", 0.5), "--kind": kind})
    with pytest.raises(SystemExit) as left:
        parser.parse_args(words)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"
