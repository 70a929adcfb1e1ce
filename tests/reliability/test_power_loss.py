"""The power goes out at every operation of a save, and takes what was not synced with it.

A recorder notes what the disk was asked to do. From each prefix of its notes a file system is
rebuilt as it may be found afterwards. Each must load, exactly, as some saved step that is not older
than the last one that `save` had returned from.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorlm.checkpoint import newest_checkpoint
from tensorlm.config import Config
from tensorlm.runtime import disk
from tensorlm.runtime.launch_env import LaunchEnv
from tests.reliability.conftest import TinyRuns
from tests.reliability.saves import holds_its_step, save_steps
from tests.support.distributed import run_distributed
from tests.support.power_cut import Folder, Notes, Recorder, rebuild, write_out


def record(config: Config) -> tuple[Notes, list[int]]:
    """The notes of a run of saves in one process, and where in them each `save` returned."""
    recorder, marks = Recorder(), []

    def on_rank() -> tuple[Notes, list[int]]:
        disk.use(recorder)
        launch = LaunchEnv(0, 1, 0, 1, "127.0.0.1", 1)
        save_steps(config, launch, lambda step: marks.append(len(recorder.notes)))
        return recorder.notes, marks

    (result,) = run_distributed(on_rank, 1)
    return result


def crash_states(config: Config, num_mixed: int) -> Iterator[tuple[Folder, int, str, int]]:
    """(file system, last step that `save` returned from, mode, seed) of every possible crash."""
    root = Path(config.run.dir).parent
    notes, marks = record(config)
    assert len(marks) >= 3
    for length in range(len(notes) + 1):
        returned = sum(mark <= length for mark in marks)
        top = rebuild(notes[:length], root)
        for mode in ("lost", "kept", "empty", "zeros", *["mixed"] * num_mixed):
            yield top, returned, mode, length


def check_crash_states(config: Config, num_mixed: int) -> int:
    """All of them load as a whole saved step; returns how many there were."""
    run = Path(config.run.dir)
    found_at = run.with_name("after")
    rng = random.Random(0)
    num_states = 0
    for top, returned, mode, length in crash_states(config, num_mixed):
        write_out(top, found_at, rng, mode)
        newest = newest_checkpoint(found_at / run.name)
        assert (newest.step if newest else 0) >= returned, (mode, length)
        assert newest is None or holds_its_step(newest)
        shutil.rmtree(found_at)
        num_states += 1
    return num_states


def test_every_state_that_a_power_cut_can_leave_loads(tiny: TinyRuns) -> None:
    assert check_crash_states(tiny("run"), num_mixed=3) > 400


@pytest.mark.faults
def test_many_mixed_states_that_a_power_cut_can_leave_load(tiny: TinyRuns) -> None:
    assert check_crash_states(tiny("run"), num_mixed=100) > 5000
