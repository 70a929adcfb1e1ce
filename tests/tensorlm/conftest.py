"""A tiny configuration and a way to run the real launchers on it."""

import subprocess
from pathlib import Path

import pytest

from tensorlm.config import load_config
from tests.reliability.harness import Job, warm_up
from tests.tensorlm.launching import (
    ROOT,
    TINY,
    RunTraining,
    TrainRanks,
    launch_command,
    launch_environment,
)


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    """A configuration file whose run is `tmp_path / "run"`."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(run=tmp_path / "run", data=data))
    return path


@pytest.fixture
def run_training(config: Path) -> RunTraining:
    """Run the training launcher to its end: `run_training(*overrides, ranks=2, ...)`."""

    def run(
        *overrides: str, ranks: int = 2, launcher: str = "torchrun", code: int = 0
    ) -> "subprocess.CompletedProcess[str]":
        command = [*launch_command(launcher, ranks), "--config", str(config), *overrides]
        result = subprocess.run(
            command, cwd=ROOT, env=launch_environment(), capture_output=True, text=True, timeout=120
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result

    return run


@pytest.fixture
def train_ranks(config: Path) -> TrainRanks:
    """Train to the end on forked ranks, without a launcher: `train_ranks(*overrides, ranks=2)`."""
    warm_up()

    def train(*overrides: str, ranks: int = 2, code: int = 0) -> str:
        job = Job(load_config(config, overrides), ranks)
        assert job.wait() == [code] * ranks, job.output()
        return job.output()

    return train
