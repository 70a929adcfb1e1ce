"""For all tests: Triton's interpreter where no GPU is, examples that repeat, a tiny data set."""

import email
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Triton reads it when kernels, its own too, are defined: before anything below imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tensorlm.data.prepare import encode, find_files, read_documents
from tensorlm.data.tokenizers import train_tokenizer

# No example has a deadline, for a loaded machine is no bug. The same ones are tried every time, so
# that a change is not blamed for what another run happened to find.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

# Long files first, short ones last: all workers end at about the same time.
LONG = ("tests/slurm/", "tests/reliability/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in LONG])


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and tokenizer made of the standard library's email package."""
    folder = tmp_path_factory.mktemp("data")
    files = find_files([str(Path(email.__file__).parent / "*.py")])
    train_tokenizer(read_documents(files, "text"), 512, folder / "tokenizer")
    encode(files, folder / "tokenizer", folder / "set", holdout=0.3)
    return folder / "set"
