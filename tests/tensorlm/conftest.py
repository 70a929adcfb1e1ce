"""A tiny prepared data set and a way to run the real launchers on it."""

import email
import subprocess
from pathlib import Path

import pytest

from tensorlm.data.prepare import encode, find_files, read_documents
from tensorlm.data.tokenizers import train_tokenizer
from tests.tensorlm.launching import ROOT, RunTraining, launch_command, launch_environment

TINY = """
[run]
dir = "{run}"
[model]
vocab_size = 512
hidden_size = 32
intermediate_size = 64
num_layers = 2
num_heads = 4
num_kv_heads = 2
rope_theta = 10000.0
fold = [16]
hop_bias_init = -1.0
[data]
path = "{data}"
seq_len = 128
[optim]
lr = 3e-3
warmup_steps = 2
[train]
steps = 8
rows_per_step = 4
dtype = "fp32"
[checkpoint]
every = 3
keep_last = 3
"""


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
