"""Training through the real launchers: resumed = uninterrupted, few ranks = many ranks."""

import json
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tensorlm.checkpoint import newest_checkpoint
from tensorlm.config import load_config
from tensorlm.runtime.commit import git_commit
from tensorlm.runtime.errors import UserError
from tensorlm.train.dry_run import check_run
from tensorlm.train.metrics import read_metrics
from tests.reliability.harness import Job, warm_up
from tests.support.launching import (
    ROOT,
    TrainRanks,
    launch_command,
    launch_environment,
    losses,
    rendezvous_port,
    torchrun_command,
)


def final_hashes(run_dir: Path) -> list[str]:
    """sha256 of each rank's weights and Adam state at the newest checkpoint."""
    found = newest_checkpoint(run_dir)
    assert found is not None
    return [entry["sha256"] for entry in found.manifest["files"]]


def test_run_killed_after_a_checkpoint_continues_bit_for_bit(
    tmp_path: Path, config: Path, train_ranks: TrainRanks
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = "train.steps=30"
    train_ranks(f"run.dir={whole}", steps)

    command = [*launch_command("deepspeed", 2), "--config", str(config), f"run.dir={broken}"]
    with subprocess.Popen(
        [*command, steps], cwd=ROOT, env=launch_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (broken / "lock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # Looked up before there is a step: the run is not to end meanwhile.
        job = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        while not (broken / "step-00000003/manifest.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        for member in job:
            with suppress(psutil.NoSuchProcess):  # one that only compiled something has ended
                member.kill()
        process.wait(timeout=30)
    killed_at = newest_checkpoint(broken)
    assert killed_at is not None
    assert killed_at.step < 30  # it had not ended by itself

    printed = train_ranks(f"run.dir={broken}", steps)
    assert "resumed after step" in printed
    assert losses(broken) == losses(whole)
    assert final_hashes(broken) == final_hashes(whole)

    # What people watch holds every step once, too.
    events = EventAccumulator(str(broken / "tensorboard"), size_guidance={"scalars": 0})
    scalars = events.Reload().Scalars("train/loss")
    assert [event.step for event in scalars] == list(range(1, 31))
    assert [event.value for event in scalars] == pytest.approx(losses(whole), rel=1e-6)
    assert load_config(broken / "config.toml").train.steps == 30
    assert (broken / "config.toml").read_text().startswith(f"# commit {git_commit()}\n")
    line = r"^step 30/30 \| loss [\d.]+ \| grad norm [\d.]+ \| lr [\d.e+-]+ \| [\d,]+ tokens/s "
    line += r"\| MFU [\d.]+% \| [\d.]+ GiB \| ETA 0s$"
    assert re.search(line, printed, re.MULTILINE)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_zero_stage_trains_like_stage_2_and_resumes_exactly(
    tmp_path: Path, train_ranks: TrainRanks, stage: int
) -> None:
    train_ranks("train.steps=5", "checkpoint.every=5", f"run.dir={tmp_path / 'two'}")
    own = tmp_path / "own"
    for stop in (2, 5):
        train_ranks(
            "train.steps=5", f"train.stop_at={stop}", f"zero.stage={stage}", f"run.dir={own}"
        )
    straight = tmp_path / "straight"
    said = train_ranks("train.steps=5", f"zero.stage={stage}", f"run.dir={straight}")
    assert "model: 51,368 parameters" in said  # whole, however they are divided
    assert losses(own) == losses(straight)
    assert final_hashes(own) == final_hashes(straight)
    assert losses(own) == pytest.approx(losses(tmp_path / "two"), rel=1e-5)


def test_ranks_and_micro_batches_give_the_same_losses(
    tmp_path: Path, train_ranks: TrainRanks
) -> None:
    train_ranks(f"run.dir={tmp_path / 'one'}", "train.profile=[2, 4]", ranks=1)
    expected = losses(tmp_path / "one")
    assert expected[-1] < expected[0] - 0.1  # it learns
    (trace,) = (tmp_path / "one/profile").glob("*.pt.trace.json")
    events = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"ProfilerStep#1", "ProfilerStep#2"} < events  # counted from 0: steps 2 and 3
    assert not {"ProfilerStep#0", "ProfilerStep#3"} & events
    for name, ranks, *overrides in (
        ("dp2", 2),
        ("accumulated", 1, "train.micro_batch=2", "checkpoint.every=0"),
    ):
        train_ranks(f"run.dir={tmp_path / name}", *overrides, ranks=ranks)
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5), name
    assert newest_checkpoint(tmp_path / "dp2") is not None
    assert newest_checkpoint(tmp_path / "accumulated") is None


@pytest.mark.parametrize(
    "rendezvous", ["standalone", pytest.param("address", marks=pytest.mark.faults)]
)
def test_torchrun_restarts_a_killed_run_and_ends_it_when_it_is_asked_to_stop(
    tmp_path: Path, config: Path, rendezvous: str
) -> None:
    address = ["--master_addr=127.0.0.1", f"--master_port={rendezvous_port()}"]
    place = ["--standalone"] if rendezvous == "standalone" else address
    command = torchrun_command(2, *place, "--max_restarts=2")
    run, settings = tmp_path / "run", ["train.steps=100000", "checkpoint.every=1"]
    with subprocess.Popen(
        [*command, "--config", str(config), *settings], cwd=ROOT, env=launch_environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip

        def ranks() -> dict[str, psutil.Process]:
            children = psutil.Process(process.pid).children()
            return {child.environ()["RANK"]: child for child in children}

        def wait_for_steps(number: int) -> None:
            deadline = time.monotonic() + 120
            while len(read_metrics(run)) < number:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)

        try:
            wait_for_steps(2)
            ranks()["1"].kill()
            wait_for_steps(len(read_metrics(run)) + 2)
            (run / "STOP").touch()
            output, _ = process.communicate(timeout=120)
        finally:
            for rank in ranks().values() if process.poll() is None else ():
                rank.kill()
            process.kill()
    assert process.returncode == 0, output
    assert output.count("resumed after step") == 1
    found = newest_checkpoint(run)
    assert found is not None
    assert found.step == len(losses(run))
    assert (run / "STOPPED").exists()
    assert "exit code 0 instead of 75" in output


def test_bf16_follows_fp32_and_resumes_exactly(tmp_path: Path, train_ranks: TrainRanks) -> None:
    bf16 = ("train.dtype=bf16", "optim.state_dtype=bf16")
    for name, *overrides in (("fp32", "train.dtype=fp32"), ("bf16", *bf16)):
        train_ranks(f"run.dir={tmp_path / name}", *overrides)
    for stop in (4, 8):
        train_ranks(f"run.dir={tmp_path / 'cut'}", *bf16, f"train.stop_at={stop}")
    assert losses(tmp_path / "cut") == losses(tmp_path / "bf16")
    assert final_hashes(tmp_path / "cut") == final_hashes(tmp_path / "bf16")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=5e-3)


def test_bf16_moments_are_rounded_alike_on_any_ranks_and_at_any_zero_stage(
    tmp_path: Path, train_ranks: TrainRanks
) -> None:
    settings = ("optim.state_dtype=bf16", "optim.betas=[0.9, 0.999]", "train.stop_at=3")
    moments = []
    for ranks, stage in ((1, 2), (2, 1), (2, 3)):
        run = tmp_path / f"{ranks}-{stage}"
        train_ranks(f"run.dir={run}", f"zero.stage={stage}", *settings, ranks=ranks)
        found = newest_checkpoint(run)
        assert found is not None
        sizes = {name: found.num_elements(name) for name in sorted(found.shapes)}
        parts = [found.read(name, "exp_avg_sq", 0, size) for name, size in sizes.items()]
        moments.append(torch.cat(parts))
    for other in moments[1:]:
        # Sums over ranks differ in the last bit of float32, which rarely decides a rounding.
        is_equal = other == moments[0]
        assert is_equal.float().mean() > 0.98
        torch.testing.assert_close(other, moments[0], rtol=2**-7, atol=1e-30)


def check_stopped(run: Path) -> None:
    """The newest checkpoint is of the last step that was trained."""
    found = newest_checkpoint(run)
    assert found is not None
    assert found.step == len(losses(run))


def test_stop_file_saves_and_asks_to_be_requeued(tmp_path: Path, config: Path) -> None:
    warm_up()
    run = tmp_path / "run"
    job = Job(load_config(config, ["train.steps=100000"]))
    job.wait_for(run / "metrics.jsonl")
    (run / "STOP").touch()
    assert job.wait(30) == [75], job.output()
    assert [p.name for p in run.glob("STOP*")] == ["STOPPED"]
    check_stopped(run)


def test_signal_saves_and_asks_to_be_requeued(tmp_path: Path, config: Path) -> None:
    run = tmp_path / "run"
    command = [*launch_command("python", 1), "--config", str(config), "train.steps=100000"]
    with subprocess.Popen(
        command, cwd=ROOT, env=launch_environment(), stdout=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or not losses(run):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 75
    assert not list(run.glob("STOP*"))
    check_stopped(run)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.fold=[8]", "model.fold: must be [16], as in the checkpoint, got [8]"),
        ("run.seed=5", "was trained with other data"),
        ("run.dir={config}", "run.dir: must be a folder, got the file {config}"),
    ],
)
def test_dry_run_refuses_what_the_run_would(
    config: Path, train_ranks: TrainRanks, override: str, problem: str
) -> None:
    train_ranks("train.stop_at=1", "train.rows_per_step=1", ranks=1)
    assert "start = after step 1, of 8 steps" in check_run(load_config(config), 2)
    with pytest.raises(UserError, match=re.escape(problem.format(config=config))):
        check_run(load_config(config, [override.format(config=config)]), 2)


@pytest.mark.parametrize("ranks", [0, -1])
def test_dry_run_is_of_at_least_one_rank(config: Path, ranks: int) -> None:
    with pytest.raises(UserError, match=f"ranks: must be at least 1, got {ranks}"):
        check_run(load_config(config), ranks)


def test_other_data_or_a_damaged_checkpoint_is_one_error_line(
    tmp_path: Path, train_ranks: TrainRanks
) -> None:
    train_ranks("train.stop_at=3", ranks=1)
    other = train_ranks("run.seed=5", ranks=1, code=2)
    assert "error: " in other
    assert "other data" in other
    file = tmp_path / "run/step-00000003/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    damaged = train_ranks(ranks=1, code=2)
    assert "no checkpoint is intact" in damaged
    assert "Traceback" not in damaged
    manifest = json.loads((tmp_path / "run/step-00000003/manifest.json").read_text())
    assert manifest["step"] == 3
