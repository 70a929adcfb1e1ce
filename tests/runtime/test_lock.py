"""Locks: one writer for each run and each exported folder."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tensorlm.runtime.errors import UserError
from tensorlm.runtime.lock import lock_run, locked, take_lock
from tests.support.launching import ROOT

HOLD = """
import sys, time
from pathlib import Path
from tensorlm.runtime.lock import locked
with locked(Path(sys.argv[1]), "somewhere"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that holds `tmp_path / "lock"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_holder_is_refused_until_the_first_is_gone(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    path = tmp_path / "lock"
    line = (
        rf"^--output: out is in use by pid {holder.pid} on \S+ \(wait for it, or choose another\)$"
    )
    with pytest.raises(UserError, match=line):
        take_lock(path, "--output: out", patience=0.0)
    holder.send_signal(signal.SIGKILL)
    with locked(path, "--output: out"):  # it waits for what is about to end
        assert path.read_text().startswith(f"pid {os.getpid()} on ")
    assert not path.exists()
    holder.wait()


def test_a_lock_that_its_holder_removed_is_not_taken_for_one(tmp_path: Path) -> None:
    """Whoever opened the file before it was removed takes the new one, as all later ones do."""
    path = tmp_path / "lock"
    first = take_lock(path, "here")
    code = f"{HOLD.split('with')[0]}with locked(Path({str(path)!r}), 'here'): print('got it')"
    waiter = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    time.sleep(1.0)  # by now, as a rule, it has the file open
    path.unlink()
    second = take_lock(path, "here")
    os.close(first)
    time.sleep(0.5)
    assert waiter.poll() is None, "it holds a file that is gone"
    path.unlink()
    os.close(second)
    assert waiter.communicate()[0] == "got it\n"


def test_outside_slurm_the_holder_has_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorlm.runtime.lock.PATIENCE_SECONDS", 0.0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    descriptor = lock_run(tmp_path)
    with pytest.raises(UserError) as refused:
        lock_run(tmp_path)
    os.close(descriptor)
    wanted = rf"run\.dir: {re.escape(str(tmp_path))} is in use by pid {os.getpid()} on \S+ \("
    assert re.match(wanted, str(refused.value))
