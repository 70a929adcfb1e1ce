"""What a process holds stays the same, however long it trains and however often it saves."""

import ctypes
import gc
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from tensorlm.train.engine import Engine
from tests.reliability.conftest import TinyRuns
from tests.reliability.harness import Job

WARM, LAST = 155, 455  # steps; saves are at multiples of 10
MOST_GROWTH = 4 << 20  # bytes; the gradients of each step, kept, would be five times as much


class Malloc(ctypes.Structure):
    """glibc's account of memory: `uordblks` and `hblkhd` are bytes in use."""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def held(temporary: Path) -> dict[str, int]:
    """Bytes in memory, descriptors, threads, and files that this process has made elsewhere."""
    for thread in threading.enumerate():
        if thread.name.startswith("save-"):  # the save that is in flight
            thread.join()
    gc.collect()
    malloc = ctypes.CDLL(None).mallinfo2
    malloc.restype = Malloc
    return {
        "bytes": malloc().uordblks + malloc().hblkhd,
        "objects": sys.getallocatedblocks(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared memory": sum(str(os.getpid()) in name for name in os.listdir("/dev/shm")),
        "temporary files": sum(len(files) for _, _, files in os.walk(temporary)),
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_training_and_saving_leak_nothing(tiny: TinyRuns) -> None:
    def prepare(rank: int) -> None:
        temporary = tiny.folder / "temporary"
        temporary.mkdir()
        tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
        real, calls = Engine.step, [0]

        def step(self: Engine, lr: float) -> float:
            calls[0] += 1
            if calls[0] in (WARM, LAST):
                (tiny.folder / f"{calls[0]}.json").write_text(json.dumps(held(temporary)))
            return real(self, lr)

        Engine.step = step  # type: ignore[method-assign]

    config = tiny("run", "train.steps=460", "checkpoint.every=10", "checkpoint.background=true")
    job = Job(config, 1, prepare)
    assert job.wait() == [0], job.output()
    warm, last = (json.loads((tiny.folder / f"{n}.json").read_text()) for n in (WARM, LAST))
    assert last.pop("bytes") - warm.pop("bytes") < MOST_GROWTH
    assert last.pop("objects") - warm.pop("objects") < LAST - WARM  # less than one a step
    assert last == warm
