"""Ranks that evaluate together: whatever one of them meets, none waits for another for ever."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorlm.train.engine
from tensorlm.config import Config, load_config
from tensorlm.evaluation import launch, ranks
from tensorlm.evaluation.launch import evaluate_on_ranks
from tensorlm.evaluation.results import read_report
from tensorlm.model.attention import Attention
from tensorlm.runtime import watchdog
from tensorlm.runtime.errors import EXIT_INTERNAL, EXIT_USER_ERROR
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.preemption import StopRequest
from tests.reliability.harness import Job, Prepare, warm_up
from tests.support.launching import TINY

Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path, data: Path) -> Configure:
    def configure(*overrides: str) -> Config:
        warm_up()
        path = tmp_path / "config.toml"
        path.write_text(TINY.format(run=tmp_path / "run", data=data))
        return load_config(path, ["eval.near=0", "eval.slide=1", *overrides])

    return configure


def evaluate_rank(config: Config, env: LaunchEnv, _: StopRequest) -> int:
    return evaluate_on_ranks(config, env, None, None, True, Path(config.run.dir) / "eval")


def at_128_tokens(on: tuple[int, ...], happens: Callable[[], object], sp: int = 1) -> Prepare:
    """It happens to these ranks, in an attention layer of a window of 128 tokens."""

    def prepare(rank: int) -> None:
        forward = Attention.forward

        def disturbed(self: Attention, x: torch.Tensor, *args: Any) -> torch.Tensor:
            if x.shape[1] == 128 // sp:
                happens()
            return forward(self, x, *args)

        if rank in on:
            Attention.forward = disturbed  # type: ignore[assignment,method-assign]

    return prepare


def gather_every_parameter(_: int) -> None:
    """DeepSpeed keeps small weights, and a billion others, once it has gathered them."""
    generate = tensorlm.train.engine.deepspeed_config

    def patched(config: Config) -> dict[str, Any]:
        generated = generate(config)
        generated["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }  # fmt: skip
        return generated

    tensorlm.train.engine.deepspeed_config = patched


def test_zero_3_evaluates_windows_that_ranks_cannot_share_evenly(configure: Configure) -> None:
    config = configure(
        "zero.stage=3", "train.stop_at=2", "eval.every=2", "eval.lengths=[256]",
        "eval.max_tokens=768",
    )  # fmt: skip
    job = Job(config, 2, gather_every_parameter)
    assert job.wait() == [0, 0], job.output()
    report = read_report(Path(config.run.dir) / "eval/step-00000002/report.json")
    assert report.perplexity[0].num_tokens == 768


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("injected")


WINDOWS = ["parallel.sp=2", "eval.lengths=[64,128]", "eval.max_tokens=1024"]


def test_a_rank_that_alone_runs_out_of_memory_says_so_and_ends(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_PARTNERS_SECONDS", 1.0)
    prepare = at_128_tokens((1,), run_out_of_memory, sp=2)
    job = Job(configure(*WINDOWS), 2, prepare, evaluate_rank)
    while job.poll()[1] is None:
        time.sleep(0.01)
    job.end()
    assert job.poll()[1] == EXIT_USER_ERROR, job.output()
    (error,) = job.errors()
    assert error.startswith(
        "error: rank 1: eval.lengths: ppl at 128 tokens does not fit into memory"
    )
    assert error.endswith(" of rank 1 only (64 fits)")


def test_ranks_that_run_out_of_memory_together_leave_the_length_out(configure: Configure) -> None:
    config = configure(*WINDOWS)
    job = Job(config, 2, at_128_tokens((0, 1), run_out_of_memory, sp=2), evaluate_rank)
    assert job.wait() == [EXIT_USER_ERROR] * 2, job.output()
    (error,) = job.errors()
    assert error.endswith("ppl at 128 tokens does not fit into memory (64 fits)")
    report = read_report(Path(config.run.dir) / "eval/report.json")
    assert [result.length for result in report.perplexity] == [64]


def test_a_rank_that_stands_still_is_named_in_a_line_of_its_own(configure: Configure) -> None:
    config = configure(
        "eval.lengths=[128]", "eval.max_tokens=256", "guards.hang_seconds=1.0",
        "guards.slow_phase_seconds=2.0",
    )  # fmt: skip
    prepare = at_128_tokens((1,), lambda: time.sleep(1000))
    job = Job(config, 2, prepare, evaluate_rank)
    assert job.wait() == [EXIT_INTERNAL] * 2, job.output()
    (error,) = job.errors()
    assert error.startswith("error: rank 1: no progress for "), error


def test_reports_of_an_earlier_hang_end_no_rank(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(watchdog, "_LEAD_SECONDS", 0.2)
    config = configure("eval.lengths=[128]", "eval.max_tokens=256", "guards.hang_seconds=1.0")
    earlier = Path(config.run.dir) / "eval/rank-00001.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"rank": 1, "phase": "eval", "step": 0, "waits": false, "seconds": 9.0}')

    def prepare(rank: int) -> None:
        def late(*arguments: Any, **limits: Any) -> watchdog.Watchdog:
            time.sleep(2.0)  # the other rank looks for reports ten times a second
            return watchdog.Watchdog(*arguments, **limits)

        if rank == 0:
            launch.Watchdog = late  # type: ignore[assignment,misc]

    job = Job(config, 2, prepare, evaluate_rank)
    assert job.wait() == [0, 0], job.output()
    assert not earlier.exists()
