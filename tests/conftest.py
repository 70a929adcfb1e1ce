"""For all tests: the interpreter where no GPU is, examples that repeat, a tiny data set and run."""

import email
import gc
import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Triton reads it when kernels, its own too, are defined: before anything below imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tensorlm.config import load_config
from tensorlm.data.prepare.encode import encode
from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.inputs import read_documents
from tensorlm.data.tokenizer.training import train_tokenizer
from tests.reliability.harness import Job, warm_up
from tests.support.huge_pages import use_huge_pages
from tests.support.interpreter import speed_up_interpreter
from tests.support.launching import (
    ROOT,
    TINY,
    RunTraining,
    TrainRanks,
    launch_command,
    launch_environment,
)

# Nothing that modules define is garbage: the collector looks at it neither during imports nor in
# tests that collect, for which it took more than half a second each time.
gc.disable()

if os.environ.get("TRITON_INTERPRET") == "1":
    speed_up_interpreter()

# No example has a deadline, for a loaded machine is no bug. The same ones are tried every time, so
# that a change is not blamed for what another run happened to find.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

# Long files first, short ones last: all workers end at about the same time. Slurm's tests mostly
# wait: one file at a time, beside others that need the cores.
LONG = (
    "tests/slurm/test_train_job.py", "tests/plan/test_plan_memory.py",
    "tests/evaluation/test_solver.py", "tests/train/", "tests/slurm/", "tests/reliability/",
    "tests/hf/", "tests/tensor_attention/",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in LONG])
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    use_huge_pages()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Triton's bindings would report what is left at the end as leaked


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and tokenizer made of the standard library's email package."""
    folder = tmp_path_factory.mktemp("data")
    files = find_files([str(Path(email.__file__).parent / "*.py")])
    train_tokenizer(read_documents(files, "text"), 512, folder / "tokenizer")
    encode(files, folder / "tokenizer", folder / "set", holdout=0.3)
    return folder / "set"


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
