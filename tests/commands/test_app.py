"""The command `tensorlm` runs what the files of launcher/ run."""

import importlib
import subprocess
import sys
import tomllib

import pytest

from tensorlm import __version__
from tensorlm.commands import app
from tensorlm.runtime.errors import EXIT_DONE, EXIT_USER_ERROR
from tests.support.launching import ROOT, launch_environment


def run_app(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `tensorlm WORDS` in this process; for commands that leave with sys.exit."""
    monkeypatch.setattr(sys, "argv", ["tensorlm", *words])
    with pytest.raises(SystemExit) as left:
        app.main()
    return int(left.value.code or 0)


def run_process(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env=launch_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_help_lists_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(monkeypatch, "--help") == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(app.COMMANDS)
    assert run_app(monkeypatch) == EXIT_USER_ERROR
    assert run_app(monkeypatch, "--version") == EXIT_DONE
    assert __version__ in capsys.readouterr().out


def test_an_unknown_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(monkeypatch, "tain") == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: tensorlm: tain: must be one of ")


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_a_module_with_a_door(name: str) -> None:
    module = importlib.import_module(f"tensorlm.commands.{app.COMMANDS[name].module}")
    assert callable(module.run)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("compare", "DIR [DIR ...] --output DIR"),
        ("convert", "[-h] {export,import} ..."),
        ("generate", "[-h] --model DIR --prompt TEXT "),
        ("plan", "[-h] --config FILE --gpus N "),
        ("prepare", "[-h] {tokenizer,encode,packages,verify,inspect} ..."),
        ("replay", "STEP --config FILE [key.sub=value ...]"),
        ("tokenizer", "[-h] --input GLOB [GLOB ...] "),
    ],
)
def test_help_of_a_command_shows_its_own_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, first: str
) -> None:
    assert run_app(monkeypatch, name, "--help") == EXIT_DONE
    assert capsys.readouterr().out.startswith(f"usage: tensorlm {name} {first}")


def test_commands_and_launchers_say_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", "configs/demo.toml", "--gpus", "2", "train.steps=200"]
    monkeypatch.chdir(ROOT)
    assert run_app(monkeypatch, "plan", *arguments) == EXIT_DONE
    assert capsys.readouterr().out == run_process("launcher/plan.py", *arguments).stdout


def test_commands_and_launchers_fail_alike() -> None:
    arguments = ["--config", "configs/demo.toml", "train.stepz=200", "optim.lr=fast"]
    ours = run_process("-m", "tensorlm", "train", *arguments)
    theirs = run_process("launcher/train.py", *arguments)
    assert ours.returncode == theirs.returncode == EXIT_USER_ERROR
    assert ours.stderr == theirs.stderr
    assert len(ours.stderr.splitlines()) == 2


def test_installing_brings_the_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["tensorlm"].partition(":")
    assert getattr(importlib.import_module(module), function) is app.main
