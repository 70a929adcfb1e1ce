"""Training and evaluation with `parallel.sp`: the figures of one rank, also across two nodes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fold_parallel import Grid
from tensorlm.config import load_config
from tensorlm.evaluation.model import open_checkpoint_model
from tensorlm.evaluation.results import read_report
from tensorlm.evaluation.run import evaluate
from tensorlm.evaluation.text import held_out_documents
from tensorlm.launch_env import LaunchEnv, free_port
from tensorlm.preemption import StopRequest
from tensorlm.train import train
from tests.distributed import run_distributed
from tests.fold_parallel.backends import ranks_and_backends
from tests.tensorlm.launching import ROOT, TINY, launch_environment, losses

# Tensorized and full layers in turn.
OVERRIDES = ["train.steps=20", "train.micro_batch=4", "model.full_every=2", "checkpoint.every=20"]
LENGTHS = [64, 256]


def train_rank(config: Path, overrides: list[str]) -> None:
    """The trainer, on ranks that exist already."""
    rank, size = dist.get_rank(), dist.get_world_size()
    launch = LaunchEnv(rank, size, rank, size, "127.0.0.1", 0)
    assert train(load_config(config, overrides), launch, StopRequest()) == 0


def train_on_ranks(config: Path, sp: int, *overrides: str, backend: str = "gloo") -> None:
    """Train, or go on, with rows that are shared by `sp` ranks."""
    run_distributed(
        train_rank, sp, config, [*OVERRIDES, f"parallel.sp={sp}", *overrides],
        backend=backend, time_limit=300,
    )  # fmt: skip


Trained = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Trained:
    """`trained(sp, backend)`: run directory after 20 steps in which sp ranks shared each row."""
    folder = tmp_path_factory.mktemp("sp")

    @cache
    def run(sp: int, backend: str) -> Path:
        run_dir = folder / f"{backend}-{sp}"
        config = folder / f"{backend}-{sp}.toml"
        config.write_text(TINY.format(run=run_dir, data=data))
        train_on_ranks(config, sp, backend=backend)
        return run_dir

    return run


@ranks_and_backends(2, 4)
def test_twenty_steps_have_the_losses_of_one_rank(
    world_size: int, backend: str, trained: Trained
) -> None:
    ours, expected = (losses(trained(sp, backend)) for sp in (world_size, 1))
    assert len(expected) == 20
    assert expected[-1] < expected[0] - 0.3  # it learns
    assert ours == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_weights_have_bitwise_equal_losses(world_size: int, trained: Trained) -> None:
    # Before the first step. Later weights differ by the order in which gradients were added.
    assert losses(trained(world_size, "gloo"))[0] == losses(trained(1, "gloo"))[0]


@ranks_and_backends(4)
def test_a_run_goes_on_with_another_number_of_ranks_to_a_row(
    tmp_path: Path, world_size: int, backend: str, config: Path, trained: Trained
) -> None:
    train_on_ranks(config, 2, "train.stop_at=7", backend=backend)
    train_on_ranks(config, world_size, "train.stop_at=10", backend=backend)
    expected = losses(trained(1, backend))[:10]
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-6)


def test_rows_shared_by_two_nodes_have_the_losses_of_one_node(
    tmp_path: Path, trained: Trained
) -> None:
    one_node = trained(2, "gloo")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(hosts), "--no_ssh",
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
    ]  # fmt: skip
    job = [
        "launcher/train.py", "--config", f"{one_node}.toml", *OVERRIDES, "parallel.sp=2",
        f"run.dir={tmp_path / 'run'}", "train.stop_at=6",
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [*command, "--node_rank", str(node), *job], cwd=ROOT, env=launch_environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        for node in nodes:
            output, _ = node.communicate(timeout=300)
            assert node.returncode == 0, output
            assert "nnodes=2, num_local_procs=1" in output
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    assert losses(tmp_path / "run") == losses(one_node)[:6]


def test_ranks_that_share_windows_write_the_report_of_one_rank(
    tmp_path: Path, trained: Trained
) -> None:
    run_dir = trained(4, "gloo")
    command = [
        str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node=2",
        f"--master_port={free_port()}", "launcher/evaluate.py", "--config", f"{run_dir}.toml",
        "--lengths", ",".join(map(str, LENGTHS)), "eval.max_tokens=8192", "eval.near=128",
        "--output", str(tmp_path / "eval"), "parallel.sp=2",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env=launch_environment(), check=True, timeout=300)
    report = read_report(tmp_path / "eval/report.json")

    settings = [f"eval.lengths={LENGTHS}", "eval.max_tokens=8192", "eval.near=128"]
    config = load_config(f"{run_dir}.toml", [*OVERRIDES, *settings])
    model = open_checkpoint_model(config, None, torch.device("cpu"), Grid())
    documents = held_out_documents(config, model.tokenizer, Path(config.data.path) / "tokenizer")
    expected = evaluate(config.eval, model, documents)
    assert [entry.length for entry in report.perplexity] == LENGTHS
    for ours, one in zip(report.perplexity, expected.perplexity, strict=True):
        assert ours.num_tokens == one.num_tokens == 8192
        assert ours.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    slid = [found.perplexity[0].sliding_perplexity for found in (report, expected)]
    assert slid[0] is not None
    assert slid[0] == pytest.approx(slid[1], rel=1e-6)
    (ours_gain,), (one_gain,) = report.attribution, expected.attribution
    assert ours_gain.total.near_loss == pytest.approx(one_gain.total.near_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            ["train.py", "parallel.sp=3"],
            "sp = 3 cannot share rows with seq_len = 128, fold = [16] (legal: sp in [1, 2, 4, 8]; ",
        ),
        (
            ["evaluate.py", "--lengths", "48,96", "parallel.sp=2"],
            "sp = 2 cannot share rows with seq_len = 48, fold = [16] (legal: sp in [1]; ",
        ),
    ],
    ids=["train", "evaluate"],
)
def test_illegal_sizes_are_one_line_before_ranks_meet(
    tmp_path: Path, data: Path, script: list[str], message: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(TINY.format(run=tmp_path / "run", data=data))
    # One of six ranks: it would wait for the others if it tried to form a group.
    place = {"RANK": "0", "WORLD_SIZE": "6", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = subprocess.run(
        [sys.executable, f"launcher/{script[0]}", "--config", str(config), *script[1:]],
        cwd=ROOT, env={**os.environ, **place}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
