"""A tiny run for fault tests, on the data set of the training tests."""

from pathlib import Path

import pytest

from tensorlm.config import Config, load_config
from tests.reliability.harness import Job, warm_up

TINY = """
[run]
dir = "{run}"
[model]
vocab_size = 512
hidden_size = 16
intermediate_size = 32
num_layers = 1
num_heads = 2
num_kv_heads = 1
rope_theta = 10000.0
fold = [8]
hop_bias_init = -1.0
[data]
path = "{data}"
seq_len = 32
[optim]
lr = 3e-3
warmup_steps = 2
[train]
steps = 8
rows_per_step = 4
micro_batch = 2
dtype = "fp32"
[checkpoint]
every = 2
keep_last = 2
"""


class TinyRuns:
    """Configurations of tiny runs: `tiny("name", "key.sub=value", ...)` has the folder `name`."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self._data = data

    def __call__(self, name: str, *overrides: str) -> Config:
        path = self.folder / f"{name}.toml"
        path.write_text(TINY.format(run=self.folder / name, data=self._data))
        return load_config(path, overrides)

    def finish(self, config: Config, world: int = 1) -> Job:
        """Train to the end, undisturbed."""
        job = Job(config, world)
        assert job.wait() == [0] * world, job.output()
        return job


@pytest.fixture
def tiny(tmp_path: Path, data: Path) -> TinyRuns:
    warm_up()
    return TinyRuns(tmp_path, data)
