"""Trials of `nccl_trials.py`: every one must end as docs/reliability.md promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.launching import ROOT

NUM_TRIALS = 40


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("gloo", marks=pytest.mark.faults),
        pytest.param("nccl", marks=pytest.mark.multi_gpu),
    ],
)
def test_every_fault_ends_as_promised(tmp_path: Path, data: Path, backend: str) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    options = ["--backend", backend, "--trials", str(NUM_TRIALS), "--at-once", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if backend == "nccl":
        options[-1] = "8"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "tests.reliability.nccl_trials", str(tmp_path / "runs")]
    done = subprocess.run(
        [*command, str(data), *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    *trials, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert [trial for trial in trials if trial["problem"]] == []
    assert len(trials) == NUM_TRIALS
    assert done.returncode == 0, (summary, done.stderr[-2000:])
