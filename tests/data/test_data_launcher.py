"""launcher/prepare_data.py: what a user gets to read, and what is left behind."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tensorlm.data.tokenizer.tokenizers import tokenizer_sha256
from tensorlm.data.tokenizer.training import train_tokenizer
from tests.support.hf_models import launcher_here
from tests.support.launching import ROOT, launch_environment

Capture = pytest.CaptureFixture[str]


def error(capsys: Capture, *arguments: str | Path) -> str:
    """The one line that a call which must fail says."""
    assert launcher_here("prepare_data.py", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {n} " * 40}) for n in range(200)))
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_tokenizer(["row 0123456789"] * 9, 275, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--samples", "-1"], "--samples: must be at least 0, got -1"),
        (["--seq-len", "4096", "0"], "--seq-len: must be at least 1, got 0"),
        (["--plot", "lengths.foo"], "--plot: must end in .png, got lengths.foo"),
    ],
)
def test_inspect_is_asked_for_what_makes_sense(
    data: Path, capsys: Capture, arguments: list[str], line: str
) -> None:
    assert error(capsys, "inspect", data, *arguments) == line


def test_training_a_tokenizer_is_asked_for_what_makes_sense(
    tmp_path: Path, corpus: Path, capsys: Capture
) -> None:
    source: list[str | Path] = ["tokenizer", "--input", corpus, "--output", tmp_path / "new"]
    assert error(capsys, *source, "--vocab-size", "0") == "--vocab-size: must be at least 1, got 0"
    line = error(capsys, *source, "--vocab-size", "300", "--max-bytes", "-3")
    assert line == "--max-bytes: must be at least 0, got -3"
    assert " for these texts, got 32000" in error(capsys, *source, "--vocab-size", "32000")
    corpus.write_text('{"text": "fine"}\n{"text": "\\ud800"}')
    assert error(capsys, *source, "--vocab-size", "300").startswith(
        f"{corpus}: byte 17: contains an unpaired surrogate"
    )
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_is_never_overwritten(
    tmp_path: Path, corpus: Path, tokenizer: Path, capsys: Capture
) -> None:
    def command(output: Path) -> list[str | Path]:
        return ["tokenizer", "--input", corpus, "--output", output, "--vocab-size", "275"]

    sha256 = tokenizer_sha256(tokenizer)
    line = f"{tokenizer}: already contains a tokenizer (choose another --output)"
    assert error(capsys, *command(tokenizer)) == line
    assert tokenizer_sha256(tokenizer) == sha256
    exported = tmp_path / "hf"
    exported.mkdir()
    (exported / "tokenizer_config.json").write_text("{}")
    assert error(capsys, *command(exported)).startswith(f"{exported}: already contains a tokenizer")
    assert (
        error(capsys, *command(corpus)) == f"{corpus}: must be a folder (choose another --output)"
    )
    assert launcher_here("prepare_data.py", *command(tmp_path / "new")) == 0
    assert error(capsys, *command(tmp_path / "new")).startswith(f"{tmp_path / 'new'}: already")


def test_no_held_out_documents_are_told_and_are_no_error(
    tmp_path: Path, corpus: Path, tokenizer: Path, capsys: Capture
) -> None:
    output = tmp_path / "set"
    there: list[str | Path] = ["--output", output, "--holdout", "1e-9"]
    options: list[str | Path] = ["--input", corpus, "--tokenizer", tokenizer, "--workers", "1"]
    assert launcher_here("prepare_data.py", "encode", *options, *there) == 0
    summary, note = capsys.readouterr().out.splitlines()
    assert "valid 0 documents" in summary
    assert note == f"note: {output / 'valid'} is empty (raise --holdout)"
    assert launcher_here("prepare_data.py", "verify", output) == 0
    assert f"{output / 'valid'}: all shards are intact (1)" in capsys.readouterr().out
    assert launcher_here("prepare_data.py", "inspect", output, "--seq-len", "512") == 0
    shown = capsys.readouterr().out
    assert f"{output / 'valid'}: empty" in shown
    assert "200 documents" in shown


def test_verify_compares_the_tokenizer(tmp_path: Path, data: Path, capsys: Capture) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    train_tokenizer(["other words"] * 9, 270, copy / "tokenizer")
    line = error(capsys, "verify", copy)
    assert line.startswith(
        f"{copy / 'tokenizer'}: must be the tokenizer with which the data was encoded"
    )
    shutil.rmtree(copy / "tokenizer")
    assert error(capsys, "verify", copy).startswith(
        f"{copy / 'tokenizer'}: must contain tokenizer.json"
    )


def test_a_disk_that_fills_up_with_the_tokenizer_is_one_line(
    tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    output = tmp_path / "set"
    largest = max(path.stat().st_size for path in tokenizer.iterdir())
    command = [
        "prlimit", f"--fsize={largest - 1}", sys.executable, "launcher/prepare_data.py", "encode",
        "--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(output),
    ]  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, env=launch_environment(), capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {output / 'tokenizer/tokenizer'}")
    assert "cannot be written: File too large" in line
    assert tokenizer_sha256(tokenizer)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_is_one_line_and_leaves_no_process(
    tmp_path: Path, tokenizer: Path, workers: str
) -> None:
    # Two shards: one worker soon has nothing to do, the other would work for long.
    output, row = tmp_path / "set", json.dumps({"text": "row 0123456789 " * 2000}) + "\n"
    (tmp_path / "a.jsonl").write_text(row)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(row.encode() * 3000))
    command = [
        sys.executable, "launcher/prepare_data.py", "encode", "--input", str(tmp_path / "*.jsonl*"),
        "--tokenizer", str(tokenizer), "--output", str(output), "--workers", workers,
        "--shard-bytes", str(len(row)),
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, env=launch_environment(), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 100
        while not (output / "train/shard-00000.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
        _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in stderr
    assert not list(tmp_path.rglob("*.tmp"))
    while _members(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _members(group: int) -> list[str]:
    """Processes of a group that still are."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


@pytest.mark.parametrize(
    ("launcher", "words", "option"),
    [
        ("prepare_data.py", ["encode", "--text-field", "caf\udce9"], "--text-field"),
        ("prepare_data.py", ["encode", "--text-field=caf\udce9"], "--text-field"),
        ("prepare_data.py", ["encode", "--input", "a.txt", "caf\udce9"], "--input"),
        ("prepare_data.py", ["encode", "--exclude", "caf\udce9"], "--exclude"),
        ("prepare_data.py", ["encode", "--tokenizer", "caf\udce9"], "--tokenizer"),
        ("prepare_data.py", ["encode", "--output", "caf\udce9"], "--output"),
        ("prepare_data.py", ["tokenizer", "--output", "caf\udce9"], "--output"),
        ("prepare_data.py", ["inspect", "caf\udce9"], "command line"),
        ("prepare_data.py", ["inspect", "x", "--plot", "caf\udce9.png"], "--plot"),
        ("convert.py", ["export", "--output", "caf\udce9"], "--output"),
        ("generate.py", ["--hf", "caf\udce9"], "--hf"),
        ("plan.py", ["caf\udce9"], "command line"),
    ],
)
def test_an_argument_that_is_not_utf8_is_one_line(
    capsys: Capture, launcher: str, words: list[str], option: str
) -> None:
    assert launcher_here(launcher, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option}: must be UTF-8, got ")
    assert r"caf\xe9" in line


def test_a_setting_that_is_not_utf8_is_one_line() -> None:
    result = subprocess.run(
        [sys.executable, "launcher/train.py", "--config", "configs/demo.toml", b"run.dir=\xe9"],
        cwd=ROOT, env=launch_environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(r"error: run.dir: must be UTF-8, got run.dir=\xe9 (")


def test_a_decompression_bomb_is_one_line(tmp_path: Path, tokenizer: Path, capsys: Capture) -> None:
    bomb = tmp_path / "bomb.txt.gz"
    bomb.write_bytes(gzip.compress(bytes(1 << 24)) * 64)
    output = tmp_path / "set"
    encode: list[str | Path] = ["encode", "--input", bomb, "--tokenizer", tokenizer]
    encode += ["--output", output, "--workers", "1"]
    for words, limit in (([], "268,435,456"), (["--max-document-bytes", "1000"], "1,000")):
        assert launcher_here("prepare_data.py", *encode, *words) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: {bomb}: content: must have at most {limit} bytes (split it, or raise "
            "--max-document-bytes)"
        )
    assert not list(output.rglob("shard-*"))
    bomb.write_bytes(gzip.compress(b"row " * 300))
    assert launcher_here("prepare_data.py", *encode) == 0
