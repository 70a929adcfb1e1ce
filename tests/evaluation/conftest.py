"""The model that finds passkeys, trained once."""

from pathlib import Path

import pytest
import torch

from tensorlm.config import load_config
from tests.evaluation.solver import save, train_solver, write_inputs


@pytest.fixture(scope="session")
def solver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a run whose checkpoint 0 finds passkeys in up to 3 lines of filler."""
    path = write_inputs(tmp_path_factory.mktemp("solver"))
    config = load_config(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: several threads only wait for each other
    save(train_solver(config), config)
    torch.set_num_threads(threads)
    return path
