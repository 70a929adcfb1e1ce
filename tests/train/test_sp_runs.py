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
from tensorlm.config import Config, load_config
from tensorlm.evaluation.launch import evaluate_on_ranks
from tensorlm.evaluation.model import open_checkpoint_model
from tensorlm.evaluation.results import Report, read_report
from tensorlm.evaluation.run import evaluate
from tensorlm.evaluation.text import held_out_documents
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.preemption import StopRequest
from tensorlm.train.loop import train
from tests.fold_parallel.backends import ranks_and_backends, require_equal_bits
from tests.support.distributed import run_distributed
from tests.support.launching import ROOT, TINY, launch_environment, losses, rendezvous_port

# Tensorized and full layers in turn.
OVERRIDES = ["train.steps=20", "train.micro_batch=4", "model.full_every=2", "checkpoint.every=20"]
LENGTHS = [64, 512]
# Windows of 1.25 x `near` tokens are some that 4 ranks can share.
EVAL = [f"eval.lengths={LENGTHS}", "eval.max_tokens=4096", "eval.near=256"]


def train_rank(config: Path, overrides: list[str]) -> None:
    """The trainer, on ranks that exist already."""
    rank, size = dist.get_rank(), dist.get_world_size()
    launch = LaunchEnv(rank, size, rank, size, "127.0.0.1", 0)
    assert train(load_config(config, overrides), launch, StopRequest()) == 0


def train_on_ranks(config: Path, sp: int, *overrides: str, backend: str = "gloo") -> None:
    """Train, or go on, with rows that are shared by `sp` ranks, which recompute activations."""
    shared = [f"parallel.sp={sp}", f"train.recompute={'selective' if sp > 1 else 'none'}"]
    run_distributed(
        train_rank, sp, config, [*OVERRIDES, *shared, *overrides],
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
    require_equal_bits(world_size, torch.float32)
    # Before the first step. Later weights differ by the order in which gradients were added.
    assert losses(trained(world_size, "gloo"))[0] == losses(trained(1, "gloo"))[0]


ROUTED = [
    "model.fold=[]", "model.full_every=0", "model.window=16", "model.route_every=2",
    "model.route={block=8, top_k=2, stretch=2}", "train.stop_at=6",
]  # fmt: skip


@ranks_and_backends(2, 4)
def test_window_and_routed_layers_have_the_losses_of_one_rank(
    tmp_path: Path, world_size: int, backend: str, data: Path
) -> None:
    runs = []
    for sp in (1, world_size):
        config, run_dir = tmp_path / f"{sp}.toml", tmp_path / str(sp)
        config.write_text(TINY.format(run=run_dir, data=data))
        train_on_ranks(config, sp, *ROUTED, backend=backend)
        runs.append(losses(run_dir))
    assert len(runs[0]) == 6
    assert runs[1] == pytest.approx(runs[0], rel=2e-6)

    # The last run's model, evaluated by these ranks and by one.
    settings = [
        *OVERRIDES,
        *ROUTED,
        *EVAL,
        "eval.tasks=['ppl','recall']",
        "eval.slide=1",
        "eval.max_tokens=1024",
    ]
    shared = load_config(config, [*settings, f"parallel.sp={world_size}"])
    run_distributed(evaluate_rank, world_size, shared, tmp_path / "eval", backend=backend)
    found, alone = read_report(tmp_path / "eval/report.json"), load_config(config, settings)
    model = open_checkpoint_model(alone, None, torch.device("cpu"), Grid())
    documents = held_out_documents(alone, model.tokenizer, data / "tokenizer")
    expected = evaluate(alone.eval, model, documents)
    assert [entry.length for entry in found.perplexity] == LENGTHS
    for ours, one in zip(found.perplexity, expected.perplexity, strict=True):
        assert ours.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    assert [(entry.length, entry.layer) for entry in found.recall] == [(64, 1), (512, 1)]
    for share, whole in zip(found.recall, expected.recall, strict=True):
        for name in ("beyond", "chosen", "best", "random", "opened"):
            assert getattr(share, name) == pytest.approx(getattr(whole, name), rel=1e-4)


@ranks_and_backends(4)
def test_a_run_goes_on_with_another_number_of_ranks_to_a_row(
    tmp_path: Path, world_size: int, backend: str, config: Path, trained: Trained
) -> None:
    train_on_ranks(config, 2, "train.stop_at=3", backend=backend)
    train_on_ranks(config, world_size, "train.stop_at=5", "eval.every=5", *EVAL, backend=backend)
    expected = losses(trained(1, backend))[:5]
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-6)
    check_report(read_report(tmp_path / "run/eval/step-00000005/report.json"), config)


def test_rows_shared_by_two_nodes_have_the_losses_of_one_node(
    tmp_path: Path, trained: Trained
) -> None:
    one_node = trained(2, "gloo")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(hosts), "--no_ssh",
        "--master_addr", "127.0.0.1", "--master_port", str(rendezvous_port()),
    ]  # fmt: skip
    job = [
        "launcher/train.py", "--config", f"{one_node}.toml", *OVERRIDES, "parallel.sp=2",
        "train.recompute=block", "train.stop_at=6", f"run.dir={tmp_path / 'run'}",
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


def evaluate_rank(config: Config, output: Path) -> None:
    """What launcher/evaluate.py runs, on ranks that exist already."""
    rank, size = dist.get_rank(), dist.get_world_size()
    launch = LaunchEnv(rank, size, rank, size, "127.0.0.1", 0)
    assert evaluate_on_ranks(config, launch, None, None, False, output) == 0


@ranks_and_backends(2)
def test_ranks_that_share_windows_write_the_report_of_one_rank(
    tmp_path: Path, world_size: int, backend: str, trained: Trained
) -> None:
    path = Path(f"{trained(world_size, backend)}.toml")
    shared = load_config(path, [*OVERRIDES, *EVAL, f"parallel.sp={world_size}"])
    run_distributed(evaluate_rank, world_size, shared, tmp_path / "eval", backend=backend)
    check_report(read_report(tmp_path / "eval/report.json"), path)


def check_report(report: Report, path: Path) -> None:
    """It is the report that one rank writes about the newest checkpoint."""
    config = load_config(path, [*OVERRIDES, *EVAL])
    model = open_checkpoint_model(config, None, torch.device("cpu"), Grid())
    documents = held_out_documents(config, model.tokenizer, Path(config.data.path) / "tokenizer")
    expected = evaluate(config.eval, model, documents)
    assert [entry.length for entry in report.perplexity] == LENGTHS
    for ours, one in zip(report.perplexity, expected.perplexity, strict=True):
        assert ours.num_tokens == one.num_tokens == 4096
        assert ours.perplexity == pytest.approx(one.perplexity, rel=1e-6)
    slid = [found.perplexity[0].sliding_perplexity for found in (report, expected)]
    assert slid[0] is not None
    assert slid[0] == pytest.approx(slid[1], rel=1e-6)
    (ours_gain,), (one_gain,) = report.attribution, expected.attribution
    assert ours_gain.total.near_loss == pytest.approx(one_gain.total.near_loss, rel=1e-6)


def test_lengths_that_ranks_cannot_share_are_one_line_before_they_meet(config: Path) -> None:
    shared = load_config(config, ["eval.lengths=[48,96]", "parallel.sp=2"])
    # One of two ranks: it would wait for the other if it tried to form a group.
    launch = LaunchEnv(0, 2, 0, 2, "127.0.0.1", 1)
    with pytest.raises(UserError) as caught:
        evaluate_on_ranks(shared, launch, None, None, False, None)
    assert caught.value.problems == (
        "parallel.sp: sp = 2 cannot share rows with seq_len = 48, fold = [16] (legal: sp in [1]; "
        "or seq_len a multiple of 32, such as 32 or 64)",
    )
    assert not dist.is_initialized()
