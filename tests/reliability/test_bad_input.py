"""Mistakes in the configuration, the environment and the run's folder: one line each, exit 2."""

import errno
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from tensorlm.checkpoint import manifest_text
from tensorlm.config import Config, load_config
from tensorlm.runtime import ranks
from tensorlm.runtime.errors import EXIT_CRASH, EXIT_USER_ERROR, UserError
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.launch_env import LaunchEnv, free_port, read_launch_env
from tensorlm.runtime.lock import lock_run
from tensorlm.runtime.preemption import StopRequest
from tensorlm.train import loop as train
from tests.reliability.conftest import TINY, TinyRuns
from tests.reliability.harness import Job

# ------------------------------------------------------------------------------- configuration


def settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every plain setting of a configuration, by its dotted key."""
    for name, info in section.model_fields.items():
        options = [info.annotation, *get_args(info.annotation)]
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if sections and prefix == "" and sections[0] is info.annotation:
            yield from settings(sections[0], f"{name}.")
        elif not sections and not any(
            isinstance(o, type) and issubclass(o, BaseModel)
            for option in options
            for o in get_args(option)
        ):
            yield prefix + name, info


def config_faults() -> list[tuple[str, str]]:
    """(override, the key that the line must name): each setting misspelt, and of another type."""
    faults = []
    for key, info in settings(Config):
        misspelt = f"{key[:-1]}{'x' if key[-1] != 'x' else 'y'}"
        faults.append((f"{misspelt}=1", misspelt))
        if info.annotation is not str:
            faults.append((f'{key}="nonsense"', key))
        if info.annotation in (int, float, str, bool):
            faults.append((f"{key}=[1]", key))
        if info.annotation in (int, float):
            faults.append((f"{key}=-1", key))
        if info.annotation is float:
            faults.append((f"{key}=nan", key))
    free = ("model.hop_bias_init=-1",)  # any sign is right
    return [fault for fault in faults if fault[0] not in free]


@pytest.mark.parametrize(("override", "key"), config_faults())
def test_wrong_setting_is_one_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, override: str, key: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TINY.format(run=tmp_path / "run", data=tmp_path / "data"))

    def main() -> None:
        load_config(path, [override])

    with pytest.raises(SystemExit) as left:
        run_launcher(main)
    assert left.value.code == EXIT_USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert key in lines[0]


def test_there_are_many_configuration_faults() -> None:
    assert len(config_faults()) >= 120


# ---------------------------------------------------------------- environment and the run's folder


def every_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes each manifest of a run, and seals it again."""

    def fault(run: Path) -> None:
        for path in run.glob("step-*/manifest.json"):
            manifest = json.loads(path.read_text())
            del manifest["sha256"]
            change(manifest)
            path.write_text(manifest_text(manifest))

    return fault


def every_file(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def fault(run: Path) -> None:
        for folder in run.glob("step-*"):
            change(folder / name)

    return fault


def folder_instead(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def exchange_steps(run: Path) -> None:
    (run / "step-00000006").rename(run / "x")
    (run / "step-00000008").rename(run / "step-00000006")
    (run / "x").rename(run / "step-00000008")


def remove_checkpoints(run: Path) -> None:
    for folder in run.glob("step-*"):
        shutil.rmtree(folder)


def link_lock(run: Path) -> None:
    (run / "lock").rename(run / "x")
    (run / "lock").symlink_to("x")


RANK = "rank-00000.safetensors"
RUN_FAULTS: dict[str, Callable[[Path], object]] = {
    "checkpoints removed": remove_checkpoints,
    "manifests removed": every_file("manifest.json", Path.unlink),
    "manifests empty": every_file("manifest.json", lambda p: p.write_text("")),
    "manifests cut": every_file("manifest.json", lambda p: os.truncate(p, 100)),
    "manifests of text": every_file("manifest.json", lambda p: p.write_text("hello")),
    "manifests of null": every_file("manifest.json", lambda p: p.write_text("null")),
    "manifests of a list": every_file("manifest.json", lambda p: p.write_text("[]")),
    "manifests edited": every_file(
        "manifest.json", lambda p: p.write_text(p.read_text().replace('"step": ', '"step":  '))
    ),
    "manifests are folders": every_file("manifest.json", folder_instead),
    "files removed": every_file(RANK, Path.unlink),
    "files empty": every_file(RANK, lambda p: os.truncate(p, 0)),
    "files cut": every_file(RANK, lambda p: os.truncate(p, p.stat().st_size - 1)),
    "files longer": every_file(RANK, lambda p: p.write_bytes(p.read_bytes() + b"\0")),
    "files changed": every_file(RANK, lambda p: p.write_bytes(p.read_bytes()[::-1])),
    "files are folders": every_file(RANK, folder_instead),
    "file too many": every_file("notes.txt", Path.touch),
    "steps exchanged": exchange_steps,
    "format of the future": every_manifest(lambda m: m.update(version=99)),
    "format of another tool": every_manifest(lambda m: m.update(format="other")),
    "no state": every_manifest(lambda m: m.pop("state")),
    "state of another kind": every_manifest(lambda m: m.update(state=3)),
    "state with more in it": every_manifest(lambda m: m["state"].update(more=1)),
    "no Adam step": every_manifest(lambda m: m.pop("adam_step")),
    "no data fingerprint": every_manifest(lambda m: m.pop("data_fingerprint")),
    "another data fingerprint": every_manifest(lambda m: m.update(data_fingerprint="0" * 64)),
    "guard of another kind": every_manifest(lambda m: m.update(guard=[])),
    "guard half there": every_manifest(lambda m: m["guard"].pop("losses")),
    "lock is a folder": lambda run: folder_instead(run / "lock"),
    "lock is a link": link_lock,
    "leftover is a file": lambda run: (run / ".tmp-step-00000001").touch(),
    "metrics are a folder": lambda run: folder_instead(run / "metrics.jsonl"),
    "configuration is a folder": lambda run: folder_instead(run / "config.toml"),
    "TensorBoard is a file": lambda run: file_instead(run / "tensorboard"),
    "list of checkpoints is a folder": lambda run: folder_instead(run / "checkpoints.jsonl"),
    "run is a file": file_instead,
}  # fmt: skip

CHANGED_SETTINGS = [
    "run.seed=5", "data.path=/nowhere", "data.path=/etc/passwd", "data.path=/tmp",
    "data.seq_len=64", 'data.packing="concat"', "model.hidden_size=32", "model.num_layers=2",
    "model.intermediate_size=48", "model.vocab_size=100", "model.vocab_size=1024",
    "model.tie_embeddings=true", "model.num_kv_heads=2", "parallel.sp=2",
    "train.rows_per_step=5", "train.attention=triton", "train.fused_layers=liger",
    "model.fold=[4]", "model.rope_theta=5.0",
]  # fmt: skip

ENVIRONMENTS: list[dict[str, str]] = [
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "zero", "WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "one"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "first"},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"},
    {"RANK": "0", "WORLD_SIZE": "0"},
    {"RANK": "2", "WORLD_SIZE": "2"},
    {"RANK": "-1", "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The folder of a run that ended, made in a folder of its own; faults work on copies."""
    tiny = TinyRuns(tmp_path_factory.mktemp("finished"), data)
    tiny.finish(tiny("run"))
    return tiny.folder / "run"


def check_refused(config: Config) -> None:
    """One line, exit 2, no traceback."""
    job = Job(config, 1)
    assert job.wait(60) == [EXIT_USER_ERROR], job.output()
    assert "Traceback" not in job.output()
    (line,) = job.errors()
    assert len(line.replace(config.run.dir, "")) < 300, line


@pytest.mark.parametrize("kind", RUN_FAULTS)
def test_damaged_run_is_one_line(tiny: TinyRuns, finished: Path, kind: str) -> None:
    config = tiny("run", "train.steps=9")
    shutil.copytree(finished, config.run.dir)
    RUN_FAULTS[kind](Path(config.run.dir))
    check_refused(config)


def test_damaged_data_is_one_line(tiny: TinyRuns, data: Path) -> None:
    shutil.copytree(data, tiny.folder / "data")
    path = sorted((tiny.folder / "data/train").glob("*.tokens"))[-1]
    path.write_bytes(path.read_bytes()[::-1])
    job = Job(tiny("run", f"data.path={tiny.folder / 'data'}"), 2)
    assert job.wait() == [EXIT_USER_ERROR] * 2, job.output()
    (line,) = job.errors()
    assert line.startswith(f"error: {path}: checksum differs (")


@pytest.mark.parametrize("override", CHANGED_SETTINGS)
def test_setting_that_does_not_fit_the_run_is_one_line(
    tiny: TinyRuns, finished: Path, override: str
) -> None:
    shutil.copytree(finished, tiny.folder / "run")
    check_refused(tiny("run", override))


@pytest.mark.parametrize("path", ["/proc/no/such", "/dev/null/run", f"/tmp/{'x' * 300}"])
def test_folder_that_cannot_be_made_is_one_line(path: str) -> None:
    with pytest.raises(UserError, match=r"^run\.dir: /") as caught:
        lock_run(Path(path))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
def test_unusable_environment_is_one_line(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def main() -> None:
        read_launch_env()

    with pytest.raises(SystemExit) as left:
        run_launcher(main)
    assert left.value.code == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("port taken", "EADDRINUSE"),
        ("rank missing", "1/2 clients"),
        ("host unknown", "resolution|known"),
    ],
)
def test_ranks_that_do_not_meet_are_told_why_soon(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, kind: str, reason: str
) -> None:
    monkeypatch.setattr(ranks, "_MEETING_LIMIT", timedelta(seconds=1))

    def prepare(rank: int) -> None:
        if rank == 1:
            os._exit(0)

    def find(config: Config, launch: LaunchEnv, stop: StopRequest) -> int:
        host = "no.such.host.invalid" if kind == "host unknown" else launch.master_addr
        ranks.join_ranks(replace(launch, master_addr=host))
        return 0

    port = free_port()
    with socket.socket() as other:
        if kind == "port taken":
            other.bind(("0.0.0.0", port))
            other.listen()
        job = Job(tiny("run"), 2, prepare, find, port=port)
        assert job.wait(30) == [EXIT_USER_ERROR, 0], job.output()
    (line,) = job.errors()
    assert line.startswith("error: MASTER_ADDR, MASTER_PORT: ")
    assert re.search(reason, line), line
    assert "Traceback" not in job.output()


# ------------------------------------------------------------------------------- who tells an error


def test_error_of_one_rank_is_told_by_it(tiny: TinyRuns) -> None:
    def open_no_rows(*_: Any, **options: Any) -> None:
        raise UserError("/data/train: missing")

    def prepare(rank: int) -> None:
        if rank == 1:
            train.open_rows = open_no_rows  # type: ignore[assignment]

    job = Job(tiny("run"), 2, prepare)
    assert job.wait() == [EXIT_CRASH, EXIT_USER_ERROR], job.output()
    assert job.errors() == ["error: rank 1: /data/train: missing"]


FAILING_RANK = """
import os, signal, sys
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.preemption import StopRequest

def main():
    if "ended" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    raise UserError("data.path: missing")

stop = StopRequest().listen()
run_launcher(main, leave_at_once=True, is_told=lambda: stop.is_asked)
"""


@pytest.mark.parametrize(
    ("rank", "how", "told"),
    [
        ("0", "", "error: data.path: missing\n"),
        ("1", "", "error: rank 1: data.path: missing\n"),
        ("1", "ended", ""),  # by the launcher, since rank 0 has told the same and left
    ],
)
def test_error_of_all_ranks_is_told_once(rank: str, how: str, told: str) -> None:
    environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", FAILING_RANK, how]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (EXIT_USER_ERROR, told)


# ---------------------------------------------------------------------------------- the full disk


def check_disk_is_named(job: Job) -> None:
    assert job.wait() == [EXIT_USER_ERROR], job.output()
    (line,) = job.errors()
    assert line.startswith("error: disk: ")


@pytest.mark.parametrize("room", [1_500, 10_000], ids=["config.toml", "metrics.jsonl"])
def test_full_disk_under_the_metrics_is_one_line(tiny: TinyRuns, room: int) -> None:
    """A limit on the size of a file stands for a full disk: the error has no file name either."""

    def prepare(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    job = Job(tiny("run", "train.steps=1000", "checkpoint.every=0"), 1, prepare)
    check_disk_is_named(job)
    assert "Traceback" not in job.output()


@pytest.mark.parametrize("num_events", [1, 40], ids=["at once", "later"])
def test_full_disk_under_tensorboard_is_one_line(tiny: TinyRuns, num_events: int) -> None:
    def prepare(rank: int) -> None:
        real, calls = RecordWriter.write, [0]

        def write(self: RecordWriter, data: bytes) -> None:
            calls[0] += 1
            if calls[0] > num_events:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(self, data)

        RecordWriter.write = write

    check_disk_is_named(Job(tiny("run", "checkpoint.every=0"), 1, prepare))
