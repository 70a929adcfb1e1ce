"""What saves memory changes no training: real runs under every ZeRO stage, with and without it."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from tensorlm.config import Config, load_config
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.preemption import StopRequest
from tensorlm.train import engine, loop
from tensorlm.train.loop import train
from tests.support.distributed import run_distributed

# Two micro-batches a step and rank.
PLAIN = ["train.steps=3", "checkpoint.every=3", "train.recompute=block"]
SAVING = {
    "plain": [],
    "offloaded": ["train.activation_offload=true"],
    "selective": ["train.recompute=selective"],
    "selective, offloaded": ["train.recompute=selective", "train.activation_offload=true"],
    "auto": ["train.recompute=auto"],
    "every second": ["train.recompute_interval=2"],
    "every second, offloaded": ["train.recompute_interval=2", "train.activation_offload=true"],
    "tiled": ["train.activation_offload=true", "train.mlp_chunk=48"],
}
EVALUATION = ["eval.every=2", "eval.lengths=[64]", "eval.max_tokens=256"]
deepspeed_config = engine.deepspeed_config


def partition_everything(config: Config) -> dict[str, Any]:
    """DeepSpeed's settings, but stage 3 partitions small weights too."""
    settings = deepspeed_config(config)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def train_all(config: Path, folder: Path, overrides: list[str]) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    launch = LaunchEnv(rank, size, rank, size, "127.0.0.1", 0)
    for name, settings in SAVING.items():
        chosen = [*PLAIN, *overrides, *settings, f"run.dir={folder / name}"]
        with patch.object(engine, "deepspeed_config", partition_everything):
            assert train(load_config(config, chosen), launch, StopRequest()) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["zero.stage=1", "train.dtype=bf16", "optim.state_dtype=bf16"],
        ["zero.stage=2", "model.tie_embeddings=true", "parallel.sp=2"],
        ["zero.stage=3", "model.tie_embeddings=true", *EVALUATION],
    ],
    ids=lambda overrides: overrides[0],
)
def test_runs_that_save_memory_have_the_losses_of_one_that_does_not(
    tmp_path: Path, config: Path, overrides: list[str]
) -> None:
    run_distributed(train_all, 2, config, tmp_path, overrides, time_limit=120)
    plain, *others, tiled = (losses_and_norms(tmp_path / name) for name in SAVING)
    assert len(plain) == 6
    assert all(other == plain for other in others)
    # Tiles add the gradients of weights in another order, and round them once.
    tolerance = 2e-3 if "train.dtype=bf16" in overrides else 1e-6
    assert tiled == pytest.approx(plain, rel=tolerance)


def losses_and_norms(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record[key] for key in ("train/loss", "train/grad_norm") for record in records]


def train_in_float8(config: Path, folder: Path) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    launch = LaunchEnv(rank, size, rank, size, "127.0.0.1", 0)
    common = ["train.steps=3", "checkpoint.every=3", "train.dtype=bf16", *FLOAT8]
    with (
        patch.object(engine, "deepspeed_config", partition_everything),
        patch.object(loop, "check_linear"),  # PyTorch multiplies float8 on CPUs too, slowly
    ):
        for name, settings in IN_FLOAT8.items():
            chosen = [*common, *settings, f"run.dir={folder / name}"]
            assert train(load_config(config, chosen), launch, StopRequest()) == 0


FLOAT8 = ["train.linear=float8_rowwise"]
IN_FLOAT8 = {
    "1": ["zero.stage=1"],
    "1, block": ["zero.stage=1", "train.recompute=block"],
    "3": ["zero.stage=3"],
    "3, selective": ["zero.stage=3", "train.recompute=selective", "train.activation_offload=true"],
    "2, tiled, sp": ["zero.stage=2", "train.recompute=block", "train.mlp_chunk=32",
                     "parallel.sp=2"],
    "1, bf16": ["zero.stage=1", "train.linear=bf16"],
}  # fmt: skip


def test_float8_trains_under_every_zero_stage(tmp_path: Path, config: Path) -> None:
    run_distributed(train_in_float8, 2, config, tmp_path, time_limit=120)
    runs = {name: losses_and_norms(tmp_path / name) for name in IN_FLOAT8}
    assert len(runs["1"]) == 6
    assert runs["1, block"] == runs["1"] != runs["1, bf16"]
    assert runs["3, selective"] == runs["3"]
    for run in runs.values():
        assert run == pytest.approx(runs["1"], rel=0.02)
