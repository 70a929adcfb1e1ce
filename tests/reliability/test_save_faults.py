"""Every I/O operation of a save killed, refused, or cut short."""

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tensorlm.checkpoint import Saver
from tensorlm.config import Config
from tensorlm.runtime import disk
from tensorlm.runtime.errors import EXIT_CRASH, EXIT_USER_ERROR
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.preemption import StopRequest
from tests.reliability.conftest import TinyRuns
from tests.reliability.harness import Job
from tests.reliability.saves import LAST_STEP, check_newest, save_all

OPERATIONS = [name for name in vars(disk.Disk) if not name.startswith("_")]


class FaultyDisk(disk.Disk):
    """Does `fault` at the `at`-th operation: "kill", "torn" (half a write, then killed), "short"
    (every write takes half of what it is given), or raises the error of that number."""

    def __init__(self, at: int, fault: str | int) -> None:
        self.at = at
        self.fault = fault
        self.count = 0


def _add_fault(name: str) -> None:
    real = getattr(disk.Disk, name)

    def operation(self: FaultyDisk, *args: Any) -> Any:
        self.count += 1
        if name == "write" and self.fault == "short":
            return real(self, args[0], args[1][: -(-len(args[1]) // 2)])
        if self.count != self.at:
            return real(self, *args)
        if name == "write" and self.fault != "kill":
            real(self, args[0], args[1][: len(args[1]) // 2])
        if isinstance(self.fault, int):
            if name == "close":
                real(self, *args)
            raise OSError(self.fault, os.strerror(self.fault))
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(FaultyDisk, name, operation)


for _name in OPERATIONS:
    _add_fault(_name)


def run_with_fault(
    config: Config, world: int, rank: int, at: int, fault: str | int
) -> tuple[Job, int]:
    """One trial: a save with a fault at operation `at` of `rank`, then a start without.

    Returns:
        The job with the fault, and how many operations its faulty rank came to.
    """
    folder = Path(config.run.dir)
    shutil.rmtree(folder, ignore_errors=True)
    for path in folder.parent.glob("acknowledged-*"):
        path.unlink()
    faulty = FaultyDisk(at, fault)

    def prepare(this_rank: int) -> None:
        if this_rank == rank:
            disk.use(faulty)

    def run(config: Config, launch: LaunchEnv, stop: StopRequest) -> int:
        code = save_all(config, launch, stop)
        if launch.rank == rank:
            folder.with_name("count").write_text(str(faulty.count))
        return code

    job = Job(config, world, prepare, run)
    codes = job.wait(20)
    check_newest(folder)
    if isinstance(fault, int):
        # Told in one line that names the rank, by which all ranks agree to end; or of no harm.
        assert set(codes) <= {0, EXIT_USER_ERROR}, job.output()
        assert len(set(codes)) == 1
        told = [f"error: rank {rank}: "] if set(codes) == {EXIT_USER_ERROR} else []
        assert [line[: len(told[0])] for line in job.errors()] == told, job.output()
        assert "Traceback" not in job.output()
        if told:
            assert os.strerror(fault) in job.errors()[0]
            assert not list(folder.glob(".tmp-*"))
    elif fault == "short":
        assert set(codes) == {0}, job.output()
    else:
        assert codes[rank] == (-signal.SIGKILL if at else 0), job.output()

    again = Job(config, world, run=save_all)
    assert set(again.wait(20)) == {0}, again.output()
    assert check_newest(folder) == LAST_STEP
    left = {path.name for path in folder.iterdir()}
    kept = {f"step-{step:08d}" for step in (LAST_STEP - 1, LAST_STEP)}
    # A removal that failed is tried again with the next one; here there is none any more.
    assert kept <= left <= kept | {"checkpoints.jsonl"} | {"step-00000001"}
    return job, int(folder.with_name("count").read_text()) if at == 0 else 0


def sweep_operations(
    config: Config, world: int, faults: tuple[str | int, ...], every: int = 1
) -> int:
    """Each fault at every `every`-th operation of each rank; returns the number of trials."""
    num_trials = 0
    for rank in range(world):
        _, num_operations = run_with_fault(config, world, rank, 0, "kill")
        assert num_operations > 20
        for at in range(1, num_operations + 1, every):
            for fault in faults:
                run_with_fault(config, world, rank, at, fault)
                num_trials += 1
    return num_trials


@pytest.mark.parametrize(
    ("fault", "every"), [("kill", 1), (errno.ENOSPC, 1), (errno.EIO, 4), ("torn", 4)]
)
def test_operations_of_one_process(tiny: TinyRuns, fault: str | int, every: int) -> None:
    assert sweep_operations(tiny("run"), 1, (fault,), every) * every > 60


def test_operations_of_two_ranks(tiny: TinyRuns) -> None:
    assert sweep_operations(tiny("run"), 2, ("kill", errno.ENOSPC), every=12) >= 10


def test_short_writes_are_completed(tiny: TinyRuns) -> None:
    run_with_fault(tiny("run", "checkpoint.background=true"), 2, 1, 0, "short")


class FullMemory(disk.Disk):
    """Refuses to write, and not with an error of the operating system."""

    def write(self, descriptor: int, data: memoryview) -> int:
        raise MemoryError("no room for a buffer")


@pytest.mark.parametrize("background", ["false", "true"])
def test_save_that_fails_in_an_unexpected_way_ends_all_ranks(
    tiny: TinyRuns, background: str
) -> None:
    def prepare(rank: int) -> None:
        if rank == 1:
            disk.use(FullMemory())

    config = tiny("run", f"checkpoint.background={background}")
    job = Job(config, 2, prepare)
    assert job.wait(20) == [EXIT_USER_ERROR] * 2, job.output()
    assert job.errors() == ["error: rank 1: MemoryError: no room for a buffer"]
    assert not list(Path(config.run.dir).glob("step-*"))


def test_background_save_whose_ranks_cannot_agree_is_no_success(tiny: TinyRuns) -> None:
    def agree(*_: Any) -> None:
        raise RuntimeError("connection reset by peer")

    def prepare(rank: int) -> None:
        Saver._agree = agree  # type: ignore[assignment]

    config = tiny("run", "checkpoint.background=true", "checkpoint.every=40", "train.steps=100000")
    job = Job(config, 2, prepare)
    assert job.wait() == [EXIT_CRASH] * 2, job.output()
    assert "a background save has failed: ending after this step" in job.output()
    assert "connection reset by peer" in job.output()


@pytest.mark.faults
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("background", ["false", "true"])
@pytest.mark.parametrize("fault", ["kill", "torn", errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_every_operation(tiny: TinyRuns, fault: str | int, background: str, world: int) -> None:
    config = tiny("run", f"checkpoint.background={background}")
    assert sweep_operations(config, world, (fault,)) > 60
