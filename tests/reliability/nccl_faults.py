"""Faults for runs over NCCL, each with what must be left of the run that it hits."""

import importlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorlm.checkpoint import Saver, newest_checkpoint
from tensorlm.config import Config, load_config
from tensorlm.runtime import disk
from tensorlm.runtime.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_PREEMPTED, EXIT_USER_ERROR
from tensorlm.runtime.watchdog import Watchdog
from tests.reliability.conftest import TINY
from tests.reliability.harness import Job, Prepare, final_state
from tests.support.launching import losses, rendezvous_port

STEPS = 8
_EVALUATION = (
    "eval.every=2", "eval.lengths=[32]", "eval.near=0", "eval.slide=1", "eval.max_tokens=4000",
)  # fmt: skip
_forking = threading.Lock()


class Trials:
    """Runs in `folder` on `ranks` ranks."""

    def __init__(self, folder: Path, data: Path, ranks: int, over_nccl: bool) -> None:
        self.folder, self.data, self.ranks, self.over_nccl = folder, data, ranks, over_nccl
        self.pids: set[int] = set()  # of all ranks so far
        self._expected: dict[int, Any] = {}

    def config(self, name: str, stage: int, *more: str) -> Config:
        """The run `name` with this ZeRO stage."""
        path = self.folder / f"{name}.toml"
        path.write_text(TINY.format(run=self.folder / name, data=self.data))
        batch = f"train.rows_per_step={2 * self.ranks}", f"train.steps={STEPS}"
        return load_config(path, [*batch, f"zero.stage={stage}", "guards.hang_seconds=8", *more])

    def job(self, config: Config, prepare: Prepare = lambda rank: None, ranks: int = 0) -> Job:
        """Start a run; forking is for one thread at a time."""
        with _forking:
            port = rendezvous_port() if self.over_nccl else None
            job = Job(config, ranks or self.ranks, prepare, port=port)
            self.pids |= set(job.pids)
            return job

    def finish(self, config: Config, ranks: int = 0) -> None:
        """Train to the end, undisturbed."""
        job = self.job(config, ranks=ranks)
        codes = job.wait()
        assert set(codes) == {EXIT_DONE}, (codes, job.output()[-2000:])

    def expected(self, stage: int) -> Any:
        """Losses and final state of the undisturbed run."""
        config = self.config(f"undisturbed-{stage}", stage)
        if stage not in self._expected:
            self.finish(config)
            self._expected[stage] = final_state(config)
        return self._expected[stage]


def once(at: int, act: Callable[[], None], real: Callable[..., Any]) -> Any:
    """`real`, which at its `at`-th call does `act` first."""
    calls = [0]

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            act()
        return real(*args, **options)

    return call


def wrap(owner: Any, name: str, at: int, act: Callable[[], None], rank: int) -> Prepare:
    """On one rank, let the `at`-th call of `owner.name` do `act` first."""

    def prepare(this: int) -> None:
        if this == rank:
            setattr(owner, name, once(at, act, getattr(owner, name)))

    return prepare


def send(number: int) -> Callable[[], None]:
    """Send a signal to the own process."""
    return lambda: os.kill(os.getpid(), number)


def end_like_a_launcher(job: Job, code: int, rank: int) -> None:
    """When `rank` has ended with `code`, wait a moment and kill the others."""
    codes = job.wait_for_ranks([rank])
    assert codes[rank] == code, (codes, job.output()[-2000:])


def killed(trials: Trials, config: Config, rank: int, owner: Any, name: str, at: int) -> None:
    job = trials.job(config, wrap(owner, name, at, send(signal.SIGKILL), rank))
    end_like_a_launcher(job, -signal.SIGKILL, rank)


def kill_in_forward(trials: Trials, config: Config, rank: int, rng: random.Random) -> None:
    killed(trials, config, rank, _engine().Engine, "forward", rng.randint(2, STEPS))


def kill_in_backward(trials: Trials, config: Config, rank: int, rng: random.Random) -> None:
    killed(trials, config, rank, _engine().Engine, "backward", rng.randint(2, STEPS))


def kill_in_save(trials: Trials, config: Config, rank: int, rng: random.Random) -> None:
    killed(trials, config, rank, disk.Disk, "write", rng.randint(2, 6))


def stopped(trials: Trials, config: Config, rank: int, rng: random.Random) -> None:
    """SIGSTOP of one rank: the others end with 70, and name it."""
    act = wrap(_engine().Engine, "forward", 6, send(signal.SIGSTOP), rank)
    job = trials.job(config, act)
    others = [other for other in range(trials.ranks) if other != rank]
    codes = job.wait_for_ranks(others)
    assert {codes[other] for other in others} == {EXIT_INTERNAL}, (codes, job.output()[-2000:])
    (line,) = job.errors()
    assert line.startswith(f"error: rank {rank}: no progress for "), line


def term_in_save(trials: Trials, config: Config, rank: int, rng: random.Random) -> None:
    """SIGTERM during a save: no step is lost or done twice."""
    term(
        trials,
        config,
        wrap(disk.Disk, "write", 3, send(signal.SIGTERM), rank),
    )


def term_in_evaluation(trials: Trials, config: Config, rank: int, rng: random.Random) -> None:
    """SIGTERM during an evaluation."""
    config = trials.config(Path(config.run.dir).name, config.zero.stage, *_EVALUATION)

    def prepare(this: int) -> None:
        progress, passes = Watchdog.progress, [0]

        def counted(self: Watchdog, *part: str) -> None:
            progress(self, *part)
            passes[0] += self._phase == "eval"
            if this == rank and passes[0] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        Watchdog.progress = counted  # type: ignore[assignment,method-assign]

    term(trials, config, prepare)


def term(trials: Trials, config: Config, prepare: Prepare) -> None:
    job, run = trials.job(config, prepare), Path(config.run.dir)
    codes = job.wait()
    assert set(codes) == {EXIT_PREEMPTED}, (codes, job.output()[-2000:])
    found = newest_checkpoint(run)
    assert found is not None
    assert found.step == len(losses(run)) < STEPS, (found.step, len(losses(run)))


def full_disk(trials: Trials, config: Config, rank: int, rng: random.Random) -> None:
    """A disk that is full at the second save: exit code 2, and the first checkpoint stays."""
    run = Path(config.run.dir)
    with small_disk(run) as fill:
        job = trials.job(config, wrap(Saver, "save", 2, fill, rank))
        codes = job.wait()
        assert set(codes) == {EXIT_USER_ERROR}, (codes, job.output()[-2000:])
        errors = job.errors()  # one of each rank that met it
        assert errors, job.output()
        assert all(line.endswith("No space left on device") for line in errors), errors
        found = newest_checkpoint(run)
        assert found is not None
        assert found.step == 2
        (run / "filler").unlink()
        trials.finish(config)
        assert final_state(config) == trials.expected(config.zero.stage)


@contextmanager
def small_disk(run: Path) -> Iterator[Callable[[], None]]:
    """A small file system at `run`; yields a function that fills it."""
    run.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(run)], check=True)

    def fill() -> None:
        with open(run / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(run)], check=True)


def moved(trials: Trials, config: Config, rank: int, rng: random.Random) -> None:
    """Two steps on all ranks, three on one, the rest on all: the losses of the undisturbed run."""
    name, stage = Path(config.run.dir).name, config.zero.stage
    trials.finish(trials.config(name, stage, "train.stop_at=2"))
    trials.finish(trials.config(name, stage, "train.stop_at=5"), ranks=1)
    trials.finish(config)
    expected, found = trials.expected(stage)[0], losses(Path(config.run.dir))
    assert found[:2] == expected[:2]
    assert all(abs(a - b) <= 2e-6 * b for a, b in zip(found, expected, strict=True)), found


FULL_DISK, MOVE = "full disk", "N ranks, 1 rank, N ranks"
KINDS = {
    "kill -9 in forward": kill_in_forward, "kill -9 in backward": kill_in_backward,
    "kill -9 in a save": kill_in_save, "SIGSTOP of a rank": stopped,
    "SIGTERM in a save": term_in_save, "SIGTERM in an evaluation": term_in_evaluation,
    FULL_DISK: full_disk, MOVE: moved,
}  # fmt: skip


def _engine() -> Any:
    return importlib.import_module("tensorlm.train.engine")
