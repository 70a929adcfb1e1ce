"""Thousands of training runs for the price of forks: the ranks are children of the test process.

The test process imports torch and DeepSpeed once (`warm_up`). A `Job` then forks its ranks, which
run the real `train` over gloo and a file store. A test may `prepare` them, kill them at any time,
and compares what is left in the run's folder.
"""

import ctypes
import functools
import gc
import importlib
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import torch.distributed as dist

from tensorlm.checkpoint import newest_checkpoint
from tensorlm.config import Config
from tensorlm.model.flops import peak_flops
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.preemption import StopRequest
from tests.support.launching import losses

_PR_SET_PDEATHSIG = 1
# What DeepSpeed and torch import late: seconds, in each rank, if they were not here already.
_LATE_IMPORTS = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
)

Prepare = Callable[[int], object]
Run = Callable[[Config, LaunchEnv, StopRequest], int]


@functools.cache
def warm_up(accelerator: str = "cpu") -> None:
    """Import and measure once what every rank would."""
    os.environ["DS_ACCELERATOR"] = accelerator
    torch.set_num_threads(1)
    importlib.import_module("tensorlm.train.loop")
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    importlib.import_module("tensorlm.train.engine").import_muon()
    if accelerator == "cpu":
        peak_flops(torch.device("cpu"))


class Job:
    """One start of a run: its ranks begin at once."""

    def __init__(
        self,
        config: Config,
        world: int = 1,
        prepare: Prepare = lambda rank: None,
        run: Run | None = None,
        port: int | None = None,
    ) -> None:
        """The ranks meet over a file; with `port`, as real ones do."""
        self.config = config
        self.dir = Path(config.run.dir)
        self.scratch = self.dir.with_name(f"{self.dir.name}.job")
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        self.pids = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                self._run_rank(rank, world, prepare, run, port)
            self.pids.append(pid)
        self._ends = [os.pidfd_open(pid) for pid in self.pids]
        self._codes: dict[int, int] = {}

    def wait_for(self, *paths: Path, limit: float = 120.0) -> None:
        """Until all of them exist; no rank may have ended before."""
        deadline = time.monotonic() + limit
        while not all(path.exists() for path in paths):
            assert set(self.poll()) == {None}, self.output()
            assert time.monotonic() < deadline, f"not in {limit:.0f} s: {paths}\n{self.output()}"
            time.sleep(0.005)

    def wait_for_listeners(self) -> None:
        """Until every rank has taken its signals over, the first thing that it does."""
        self.wait_for(*(self.scratch / f"{rank}.listens" for rank in range(len(self.pids))))

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, if it is still there."""
        if self.poll()[rank] is None:
            os.kill(self.pids[rank], number)

    def poll(self) -> list[int | None]:
        """Exit codes so far, -9 for killed by SIGKILL, None where a rank is still there."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
                    os.close(self._ends[rank])
        return [self._codes.get(rank) for rank in range(len(self.pids))]

    def wait(self, limit: float = 120.0) -> list[int | None]:
        """Exit codes of all ranks when all have ended; at the limit the rest is killed."""
        return self.wait_for_ranks(range(len(self.pids)), limit)

    def wait_for_ranks(self, ranks: Collection[int], limit: float = 120.0) -> list[int | None]:
        """Exit codes of all ranks when `ranks` have ended; then, or at the limit, kill the rest."""
        self.watch(ranks, time.monotonic() + limit)
        self.end()
        return self.poll()

    def watch(self, ranks: Collection[int], deadline: float) -> None:
        """Wait until all of `ranks` have ended, or for the deadline (of time.monotonic())."""
        while alive := [r for r, code in enumerate(self.poll()) if code is None and r in ranks]:
            seconds = deadline - time.monotonic()
            if seconds <= 0:
                return
            ends = select.poll()
            for rank in alive:
                ends.register(self._ends[rank], select.POLLIN)
            ends.poll(seconds * 1000)

    def end(self) -> None:
        """Kill what is left, as a launcher does when a rank has failed."""
        for pid, code in zip(self.pids, self.poll(), strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)
        self.watch(range(len(self.pids)), time.monotonic() + 60)
        assert None not in self.poll(), f"SIGKILL does not end it\n{self.output()}"

    def output(self) -> str:
        """What the ranks printed, and their errors."""
        paths = sorted(self.scratch.glob("*.log"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def errors(self) -> list[str]:
        """The `error:` lines."""
        return [line for line in self.output().splitlines() if line.startswith("error: ")]

    def _run_rank(
        self, rank: int, world: int, prepare: Prepare, run: Run | None, port: int | None
    ) -> None:
        gc.freeze()  # a collection, such as ZeRO-3's, would copy all that the parent has imported
        # Nobody outlives the test process.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        log = os.open(self.scratch / f"{rank}.log", os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        launch = LaunchEnv(rank, world, rank, world, "127.0.0.1", port or 1)
        launch.export()
        from tensorlm.train.loop import train

        def main() -> int:
            stop = StopRequest().listen()
            (self.scratch / f"{rank}.listens").touch()
            prepare(rank)
            if port is None:
                store = dist.FileStore(str(self.scratch / "store"), world)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            return (run or train)(self.config, launch, stop)

        def is_told() -> bool:
            return "error: " in (self.scratch / "0.log").read_text()

        try:
            run_launcher(main, leave_at_once=True, is_told=is_told)
        finally:
            os._exit(1)  # not back into the test


def final_state(config: Config) -> tuple[list[float], list[str]]:
    """All that a run comes to: every loss, and sha256 of all ranks' weights and Adam state."""
    found = newest_checkpoint(Path(config.run.dir))
    assert found is not None
    assert found.step == config.train.steps
    hashes = [entry["sha256"] for entry in found.manifest["files"]]
    return losses(Path(config.run.dir)), hashes


def kill_sweep(config: Config, world: int, num_kills: int, seed: int) -> int:
    """Kill runs at random instants, continue them, compare each that comes to its end.

    Every run must end with the losses and the final state of the undisturbed one.

    Returns:
        How many runs were compared.
    """
    rng = random.Random(seed)
    folder = Path(config.run.dir)
    started = time.monotonic()
    undisturbed = Job(config, world)
    assert undisturbed.wait() == [0] * world, undisturbed.output()
    seconds = time.monotonic() - started
    expected = final_state(config)
    num_kills_left, num_compared = num_kills, 0
    shutil.rmtree(folder)
    while num_kills_left:
        job = Job(config, world)
        job.watch(range(world), time.monotonic() + rng.uniform(0, seconds))
        if None in job.poll():
            job.kill(rng.randrange(world))
            time.sleep(rng.uniform(0, 0.05) if world > 1 else 0)  # launchers need a while, too
            job.end()
        codes = job.poll()
        # The machine may be slower or faster now: some runs are to come to their end, most not.
        if set(codes) == {0}:
            seconds *= 0.8
            assert final_state(config) == expected
            shutil.rmtree(folder)
            num_compared += 1
        else:
            seconds *= 1.05
            assert -signal.SIGKILL in codes, job.output()
            num_kills_left -= 1
    job = Job(config, world)
    assert job.wait() == [0] * world, job.output()
    assert final_state(config) == expected
    return num_compared + 1
