"""Asked to stop: all ranks save the same step and exit with 75; asked twice, they leave at once."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tensorlm.checkpoint import newest_checkpoint
from tensorlm.config import Config
from tensorlm.runtime import disk
from tensorlm.runtime.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER_ERROR
from tensorlm.runtime.preemption import StopRequest
from tensorlm.runtime.watchdog import Watchdog
from tests.reliability.conftest import TinyRuns
from tests.reliability.harness import Job, final_state
from tests.support.launching import ROOT, launch_environment, losses


def interrupt_sweep(config: Config, world: int, num_signals: int, seed: int) -> None:
    """Signal random ranks at random instants and continue, until so many signals were obeyed.

    Each run that comes to its end must have the losses and the state of the undisturbed one.
    """
    rng = random.Random(seed)
    run, num_obeyed = Path(config.run.dir), 0
    undisturbed = Job(config, world)
    undisturbed.wait_for_listeners()
    started = time.monotonic()
    assert undisturbed.wait() == [EXIT_DONE] * world, undisturbed.output()
    seconds = time.monotonic() - started
    expected = final_state(config)
    shutil.rmtree(run)
    while True:
        job = Job(config, world)
        job.wait_for_listeners()
        if num_obeyed < num_signals:
            time.sleep(rng.uniform(0, seconds))
            job.kill(rng.randrange(world), rng.choice([signal.SIGUSR1, signal.SIGTERM]))
        codes = job.wait()
        assert len(set(codes)) == 1, job.output()
        newest = newest_checkpoint(run)
        assert newest is not None
        assert newest.step == len(losses(run))  # nothing is computed again
        if codes[0] == EXIT_PREEMPTED:
            num_obeyed += 1
            continue
        assert codes[0] == EXIT_DONE, job.output()
        assert final_state(config) == expected
        if num_obeyed == num_signals:
            return
        shutil.rmtree(run)
        seconds *= 0.8  # the machine may be faster now: some signals are to come in time


@pytest.mark.parametrize("world", [1, 2])
def test_signal_to_any_rank_at_any_time_loses_no_step(tiny: TinyRuns, world: int) -> None:
    config = tiny("run", f"checkpoint.background={'true' if world == 1 else 'false'}")
    interrupt_sweep(config, world, num_signals=2, seed=world)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 51))
def test_signals_to_many_runs(tiny: TinyRuns, seed: int) -> None:
    config = tiny("run", f"zero.stage={seed % 4}")
    interrupt_sweep(config, world=1 + seed % 2, num_signals=4, seed=seed)


class SlowDisk(disk.Disk):
    """A disk whose writes into checkpoints take long."""

    def write(self, descriptor: int, data: memoryview) -> int:
        if ".tmp-step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
            time.sleep(100)
        return super().write(descriptor, data)


def insist(job: Job, rank: int, limit: float = 60.0) -> None:
    """Ask again and again, until the rank has ended."""
    deadline = time.monotonic() + limit
    while job.poll()[rank] is None and time.monotonic() < deadline:
        job.kill(rank, signal.SIGTERM)
        time.sleep(0.1)


def test_echo_of_a_signal_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler and a launcher may both pass on the same request."""
    times = iter([50.0, 50.9, 51.1])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    monkeypatch.setattr(os, "_exit", sys.exit)
    reader, writer = os.pipe()
    os.write(writer, bytes([signal.SIGCHLD, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM]))
    stop = StopRequest()
    with pytest.raises(SystemExit) as left:
        stop._read(reader)
    assert (left.value.code, list(times)) == (EXIT_PREEMPTED, [])


def test_second_signal_ends_at_once_in_the_middle_of_a_save(tiny: TinyRuns) -> None:
    config = tiny("run", "train.stop_at=4")
    tiny.finish(config)
    longer = tiny("run")

    def prepare(rank: int) -> None:
        disk.use(SlowDisk())

    job = Job(longer, 1, prepare)
    job.wait_for(Path(config.run.dir) / ".tmp-step-00000006")
    insist(job, 0)
    assert job.poll() == [EXIT_PREEMPTED], job.output()
    found = newest_checkpoint(Path(config.run.dir))
    assert found is not None
    assert found.step == 4
    tiny.finish(longer)
    tiny.finish(tiny("undisturbed"))
    assert final_state(longer) == final_state(tiny("undisturbed"))


def test_second_signal_ends_a_rank_that_waits_for_another_for_ever(tiny: TinyRuns) -> None:
    def prepare(rank: int) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)  # never joins

    job = Job(tiny("run"), 2, prepare)
    job.wait_for_listeners()
    insist(job, 0)
    assert job.poll() == [EXIT_PREEMPTED, None], job.output()
    job.end()


@pytest.mark.parametrize(
    ("every", "said"),
    [(100000, ": saving after"), (0, ", nothing is saved (checkpoint.every = 0)")],
)
def test_stop_file_ends_all_ranks_and_is_gone(tiny: TinyRuns, every: int, said: str) -> None:
    config = tiny("run", "train.steps=100000", f"checkpoint.every={every}")
    job = Job(config, 2)
    run = Path(config.run.dir)
    job.wait_for(run / "metrics.jsonl")
    (run / "STOP").touch()
    assert job.wait() == [EXIT_PREEMPTED] * 2
    assert not (run / "STOP").exists()
    (line,) = [line for line in job.output().splitlines() if "stop requested" in line]
    assert said in line
    found = newest_checkpoint(run)
    assert (found and found.step) == (len(losses(run)) if every else None)


def test_signals_are_listened_to_before_anything_slow_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, "launcher/train.py", "--config", str(tmp_path / "none.toml")]
    with subprocess.Popen(
        command, cwd=ROOT, env=launch_environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        proc, bit = Path(f"/proc/{process.pid}"), 1 << (signal.SIGTERM - 1)
        deadline = time.monotonic() + 60
        while not int(re.findall(r"SigCgt:\s*(\w+)", (proc / "status").read_text())[0], 16) & bit:
            assert time.monotonic() < deadline
        assert "libtorch" not in (proc / "maps").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60)[1].startswith("error: ")
    assert process.returncode == EXIT_USER_ERROR


LONG_EVALUATION = (
    "train.stop_at=4", "checkpoint.every=100", "eval.every=2", "eval.lengths=[32]",
    "eval.max_tokens=100000", "eval.near=0", "eval.slide=1",
)  # fmt: skip
PROMPTS = ('eval.tasks=["passkey"]', "eval.lengths=[512]", "eval.depths=9", "eval.repeats=99")


def tell_of_passes(rank: int) -> None:
    """A file appears when this rank has made three passes of an evaluation."""
    progress, passes = Watchdog.progress, []

    def counted(self: Watchdog, *part: str) -> None:
        progress(self, *part)
        if self._phase == "eval":
            passes.append(part)
            if len(passes) == 3:
                (self._folder.parent.with_name("run.job") / f"{rank}.passes").touch()

    Watchdog.progress = counted  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize(
    ("world", "ask", "settings"),
    [
        (1, "signal", ("checkpoint.background=true",)),
        (1, "signal", PROMPTS),
        (2, "signal", ("parallel.sp=2",)),
        (2, "file", ("zero.stage=3",)),
        (2, "file", PROMPTS),
    ],
    ids=["one rank", "prompts", "shared windows", "shared weights", "stop file"],
)
def test_request_to_stop_leaves_an_evaluation_and_loses_nothing(
    tiny: TinyRuns, world: int, ask: str, settings: tuple[str, ...]
) -> None:
    config = tiny("run", *LONG_EVALUATION, *settings)
    job, run = Job(config, world, tell_of_passes), Path(config.run.dir)
    job.wait_for(job.scratch / f"{world - 1}.passes")
    if ask == "signal":
        job.kill(world - 1, signal.SIGTERM)
    else:
        (run / "STOP").touch()
    asked_at = time.monotonic()
    assert job.wait() == [EXIT_PREEMPTED] * world, job.output()
    assert time.monotonic() - asked_at < 20, job.output()
    newest = newest_checkpoint(run)
    assert newest is not None
    assert newest.step == len(losses(run)) == 2
    assert not (run / "eval").exists()
    # The next start begins with what was left out, and trains on as if nothing had been.
    short = "eval.max_tokens=32", "eval.depths=1", "eval.repeats=1"
    tiny.finish(tiny("run", *LONG_EVALUATION, *settings, *short), world)
    assert [path.parent.name for path in sorted(run.glob("eval/*/report.json"))] == [
        "step-00000002", "step-00000004",
    ]  # fmt: skip
    assert len(losses(run)) == 4


def test_nothing_is_lost_when_an_evaluation_is_killed(tiny: TinyRuns) -> None:
    config = tiny("run", *LONG_EVALUATION)
    job = Job(config, 1, tell_of_passes)
    job.wait_for(job.scratch / "0.passes")
    job.kill(0)
    assert job.wait() == [-signal.SIGKILL]
    newest = newest_checkpoint(Path(config.run.dir))
    assert newest is not None
    assert newest.step == 2
