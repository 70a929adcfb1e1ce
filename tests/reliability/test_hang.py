"""One rank stands still: every rank ends with 70, and one line says which it was, and where."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tensorlm.data.loader import PackedRows
from tensorlm.runtime import disk
from tensorlm.runtime.errors import EXIT_INTERNAL
from tensorlm.runtime.watchdog import Watchdog, describe_hang
from tensorlm.train.engine import Engine
from tensorlm.train.metrics import read_metrics
from tests.reliability.conftest import TinyRuns
from tests.reliability.harness import Job, Prepare, final_state
from tests.support.launching import ROOT, launch_command, launch_environment

HANGING_RANK = 1
FIRST_CALLS = 6  # steps before the hang, so that the usual length of a step is known
LIMIT = 4.0


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)


def spin() -> None:
    while True:
        pass


def sleep() -> None:
    time.sleep(1000)


SILENT = "stopped, or stuck in native code"
KINDS: dict[str, tuple[type, str, Any, str, bool]] = {
    # name: (what hangs, how, what the line says of the rank, does the rank itself notice)
    "loader": (PackedRows, "micro_batches", sleep, 'in phase "data" of step 7', True),
    "forward": (Engine, "forward", sleep, 'in phase "forward" of step 7', True),
    "loop": (Engine, "step", spin, 'in phase "step" of step 7', True),
    "stopped": (Engine, "forward", stop, SILENT, False),
    "interpreter": (Engine, "step", hold_the_interpreter, SILENT, False),
    "save": (disk.Disk, "write", sleep, 'in phase "save" of step 20', True),
    "background save": (disk.Disk, "write", sleep, 'in phase "save" of step 40', True),
}


def hang(kind: str, begun: Path) -> Prepare:
    """The hanging rank stands still some calls into the run, and the file `begun` appears.

    Only then do the limits become short, and those of the ranks very different: the hanging rank
    has to be told by the others' reports.
    """
    owner, name, how, *_ = KINDS[kind]

    def prepare(rank: int) -> None:
        usual_limit = Watchdog.limit

        def limit(self: Watchdog) -> float:
            if not begun.exists():
                return usual_limit(self)
            return 1000.0 if rank == HANGING_RANK else LIMIT

        Watchdog.limit = limit  # type: ignore[method-assign]
        if rank != HANGING_RANK:
            return
        real, calls = getattr(owner, name), [0]

        def call(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] > FIRST_CALLS:
                begun.touch()
                how()
            return real(*args, **options)

        setattr(owner, name, call)

    return prepare


def leave_old_reports(run: Path) -> None:
    """What an earlier hang has left, of more ranks."""
    (run / "hang").mkdir(parents=True)
    for rank in range(4):
        report = {"rank": rank, "phase": "eval", "step": 3, "waits": False, "seconds": 31.0}
        (run / f"hang/rank-{rank:05d}.json").write_text(json.dumps(report))


def check_hang(tiny: TinyRuns, kind: str, world: int) -> None:
    *_, where, notices = KINDS[kind]
    steps = ["train.steps=40", "train.rows_per_step=6", f"train.micro_batch={6 // world}"]
    saves = ["checkpoint.every=20", f"checkpoint.background={str('background' in kind).lower()}"]
    config = tiny("run", *steps, *saves)
    leave_old_reports(Path(config.run.dir))
    job = Job(config, world, hang(kind, tiny.folder / "begun"))
    able = [rank for rank in range(world) if notices or rank != HANGING_RANK]
    codes = job.wait_for_ranks(able)
    assert [codes[rank] for rank in able] == [EXIT_INTERNAL] * len(able), job.output()
    (line,) = job.errors()
    assert line.startswith(f"error: rank {HANGING_RANK}: no progress for "), line
    assert where in line, line
    stacks = (Path(config.run.dir) / "hang" / f"rank-{able[-1]:05d}.stacks").read_text()
    assert "in train_step" in stacks or "in save" in stacks
    # The run goes on as if nothing had been.
    tiny.finish(config, world)
    undisturbed = tiny("undisturbed", *steps)
    tiny.finish(undisturbed, world)
    assert final_state(config) == final_state(undisturbed)


@pytest.mark.parametrize("kind", ["loader", "stopped", "background save"])
def test_hang_of_one_rank_of_two_ends_both(tiny: TinyRuns, kind: str) -> None:
    check_hang(tiny, kind, 2)


@pytest.mark.faults
@pytest.mark.parametrize("trial", range(10))
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_hang(tiny: TinyRuns, kind: str, world: int, trial: int) -> None:
    check_hang(tiny, kind, world)


@pytest.mark.faults  # torchrun waits for 30 s before it kills a rank
def test_launcher_leaves_no_process_behind_when_a_rank_is_stopped(tiny: TinyRuns) -> None:
    config = tiny("run", "train.steps=100000")
    command = [*launch_command("torchrun", 2), "--config", str(tiny.folder / "run.toml")]
    command += ["train.steps=100000", "checkpoint.every=0", f"guards.hang_seconds={LIMIT}"]
    with subprocess.Popen(
        command, cwd=ROOT, env=launch_environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    ) as launcher:  # fmt: skip
        deadline = time.monotonic() + 120
        while len(read_metrics(Path(config.run.dir))) < FIRST_CALLS:
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks = {p.environ()["RANK"]: p for p in psutil.Process(launcher.pid).children()}
        ranks[str(HANGING_RANK)].suspend()
        _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert lines[0].startswith(f"error: rank {HANGING_RANK}: no progress for ")
    assert SILENT in lines[0]
    assert not [rank for rank, process in ranks.items() if process.is_running()]


def test_data_that_takes_longer_than_the_limit_to_verify_is_no_hang(tiny: TinyRuns) -> None:
    hashed = tiny.folder / "hashed"

    def prepare(rank: int) -> None:
        usual_limit, usual_hash = Watchdog.limit, disk.file_sha256

        def hash_slowly(path: Path, progress: Callable[[int], object]) -> tuple[int, str]:
            Watchdog.limit = lambda self: LIMIT  # type: ignore[method-assign]
            for _ in range(10):
                time.sleep(LIMIT / 8)
                progress(0)
            Watchdog.limit = usual_limit  # type: ignore[method-assign]
            hashed.touch()
            return usual_hash(path, progress)

        disk.file_sha256 = hash_slowly  # type: ignore[assignment]

    job = Job(tiny("run", "train.stop_at=1"), 2, prepare)
    assert job.wait() == [0, 0], job.output()
    assert hashed.exists()


def test_limit_follows_the_median_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watchdog = Watchdog(tmp_path, 0, 1, hang_seconds=30, slow_phase_seconds=900)
    watchdog.stop()
    assert watchdog.limit() == 900  # starting
    for step, seconds in enumerate([500.0, 2.0, 3.0, 2.5, 2.0, 50.0], 1):
        watchdog.enter("data", step)
        now[0] += seconds / 2
        watchdog.enter("forward", step)
        now[0] += seconds / 2
    watchdog.enter("data", 7)
    assert watchdog.limit() == 30  # 5 medians are 13.75 s
    for step in range(8, 30):
        now[0] += 20
        watchdog.enter("data", step)
    assert watchdog.limit() == 100
    watchdog.enter("save", 30)
    assert watchdog.limit() == 900
    now[0] += 400
    watchdog.enter("data", 31)
    assert watchdog.limit() == 100  # the save was no step


@pytest.mark.parametrize(
    ("places", "world", "line"),
    [
        # (step, phase, inside a collective) of each rank that left a report
        ({0: (7, "forward", 0), 1: (7, "data", 0), 2: (7, "forward", 0), 3: (7, "forward", 0)}, 4,
         'rank 1: no progress for 31 s, in phase "data" of step 7; '
         'rank 0, 2, 3 in phase "forward" of step 7'),
        ({0: (7, "step", 1), 2: (7, "step", 1)}, 3,
         "rank 1: no progress for 31 s, stopped, or stuck in native code; "
         'rank 0, 2 in phase "step" of step 7'),
        ({0: (8, "forward", 0), 1: (7, "save", 0)}, 2,
         'rank 1: no progress for 31 s, in phase "save" of step 7; '
         'rank 0 in phase "forward" of step 8'),
        ({0: (7, "step", 0), 1: (7, "step", 1), 2: (7, "step", 1)}, 3,
         'rank 0: no progress for 31 s, in phase "step" of step 7; '
         'rank 1, 2 in phase "step" of step 7'),
        ({0: (7, "step", 1), 1: (7, "step", 1)}, 2,
         'rank 0, 1: no progress for 31 s, in phase "step" of step 7'),
    ],
)  # fmt: skip
def test_line_names_the_odd_rank(
    places: dict[int, tuple[int, str, int]], world: int, line: str
) -> None:
    reports = [
        {"rank": rank, "step": step, "phase": phase, "waits": bool(waits)}
        for rank, (step, phase, waits) in places.items()
    ]
    assert describe_hang(reports, world, 31.2) == line


def test_longer_rows_of_a_new_phase_are_no_hang(tiny: TinyRuns) -> None:
    forward = Engine.forward

    def slow_if_long(engine: Engine, tokens: Any, *rest: Any) -> Any:
        time.sleep(1.5 if tokens.shape[1] == 64 else 0)
        return forward(engine, tokens, *rest)

    config = tiny(
        "run", "guards.hang_seconds=1", "data.seq_len=64", "train.rows_per_step=2",
        "train.earlier_stages=[{steps=6,seq_len=32,rows_per_step=4,micro_batch=2}]",
    )  # fmt: skip
    job = Job(config, 1, lambda rank: setattr(Engine, "forward", slow_if_long))
    assert job.wait() == [0], job.output()
    assert len(read_metrics(job.dir)) == 8


SUSPENDED = """
import sys, time
from pathlib import Path
from tensorlm.runtime.watchdog import Watchdog

limits = {"hang_seconds": 3.0, "slow_phase_seconds": 3.0}
watchdog = Watchdog(Path(sys.argv[1]), 0, 1, **limits)
for step in range(1, 6):  # short ones first, so that their usual length is known
    watchdog.enter("data", step)
    watchdog.enter(sys.argv[2], step)
    print(step, flush=True)
    for _ in range(50 if step < 5 else 1000):  # after a stop, most of it is still to be done
        time.sleep(0.002)
        if sys.argv[3] == "reports":
            watchdog.progress()
watchdog.stop()
"""


@pytest.mark.parametrize(
    ("phase", "progress"), [("forward", "none"), ("save", "none"), ("eval", "reports")]
)
def test_process_that_was_suspended_and_continued_is_no_hang(
    tmp_path: Path, phase: str, progress: str
) -> None:
    command = [sys.executable, "-c", SUSPENDED, str(tmp_path), phase, progress]
    with subprocess.Popen(
        command, cwd=ROOT, env=launch_environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while process.stdout.readline().strip() != "5":
            assert process.poll() is None
        for seconds in (5, 1):
            time.sleep(0.3)
            process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_hang_after_a_suspension_is_found_as_soon_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now: list[float] = [1000.0]
    ended: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watchdog = Watchdog(tmp_path, 0, 1, hang_seconds=30, slow_phase_seconds=60)
    watchdog.stop()
    ticks = [1.0] * 20 + [7200.0] + [1.0] * 60  # suspended for two hours in the 21st

    def wait(period: float) -> bool:
        if len(ticks) == 60:  # continued: the main thread is the first to run
            watchdog.enter("save", 1)
        now[0] += ticks.pop(0) if ticks else 1.0
        return bool(ended)

    monkeypatch.setattr(watchdog._is_done, "wait", wait)
    monkeypatch.setattr(watchdog, "_end", ended.append)
    watchdog.enter("resume", 0)
    watchdog._watch()
    assert ended == [pytest.approx(61.0, abs=1.5)]
    assert not ticks
