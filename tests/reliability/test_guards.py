"""Bad steps are skipped on all ranks, replicas that drift apart and second jobs are found out."""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tensorlm.checkpoint import (
    check_disk_space,
    list_steps,
    newest_checkpoint,
    open_checkpoint,
    select_checkpoint,
    step_folder,
)
from tensorlm.checkpoint.publish import write_weights
from tensorlm.config import Config
from tensorlm.data.loader import open_rows
from tensorlm.model import Llama
from tensorlm.runtime import disk
from tensorlm.runtime.errors import EXIT_INTERNAL, EXIT_USER_ERROR, UserError
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.lock import lock_run
from tensorlm.runtime.preemption import StopRequest
from tensorlm.train.engine import Engine
from tensorlm.train.guards import StepGuard
from tensorlm.train.metrics import read_metrics
from tensorlm.train.replay import replay
from tests.reliability.conftest import TinyRuns
from tests.reliability.harness import Job, Prepare, final_state
from tests.reliability.test_elastic import assembled
from tests.support.documents import write_split
from tests.support.launching import losses

BATCHES_PER_STEP = 2  # of one process: rows_per_step / micro_batch


def spoil(bad: dict[int, str], on_rank: int = 0, world: int = 1) -> Prepare:
    """At the steps in `bad`, one rank's loss is "nan", "inf", a "spike", or its gradient is nan."""

    def prepare(rank: int) -> None:
        if rank != on_rank:
            return
        real, calls = Engine.forward, [0]

        def forward(self: Engine, *inputs: torch.Tensor) -> torch.Tensor:
            loss = real(self, *inputs)
            calls[0] += 1
            batches = BATCHES_PER_STEP // world
            kind = bad.get(first_step + (calls[0] - 1) // batches)
            if kind is None:
                return loss
            if kind == "gradient":
                loss.register_hook(lambda grad: grad * torch.nan)
                return loss
            return loss * {"nan": torch.nan, "inf": torch.inf, "spike": 50.0}[kind]

        newest = newest_checkpoint(Path(os.environ["RUN_DIR"]))
        first_step = newest.step + 1 if newest else 1
        Engine.forward = forward  # type: ignore[method-assign]

    return prepare


def skipped_lines(job: Job) -> list[str]:
    return [line for line in job.output().splitlines() if line.startswith("skipped ")]


def train_spoiled(
    config: Config, world: int, bad: dict[int, str], monkeypatch: pytest.MonkeyPatch, on_rank: int
) -> Job:
    monkeypatch.setenv("RUN_DIR", config.run.dir)
    job = Job(config, world, spoil(bad, on_rank, world))
    assert job.wait() == [0] * world, job.output()
    return job


@pytest.mark.parametrize(
    ("stage", "world", "dtype"),
    [(0, 1, "fp32"), (1, 2, "fp32"), (1, 1, "bf16"), (2, 2, "bf16"), (3, 2, "fp32")],
)
def test_bad_step_is_skipped_once_on_all_ranks(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, stage: int, world: int, dtype: str
) -> None:
    config = tiny(
        "run", f"zero.stage={stage}", f"train.dtype={dtype}", "train.steps=12",
        "checkpoint.every=1", "checkpoint.keep_last=20", 'guards.spike="skip"',
        "guards.spike_window=8", "guards.replica_every=1",
    )  # fmt: skip
    bad = {3: "nan", 5: "inf", 6: "gradient", 10: "spike"}
    job = train_spoiled(config, world, bad, monkeypatch, on_rank=world - 1)
    lines = skipped_lines(job)
    reasons = ["loss is not finite", "loss is not finite", "gradient is not finite", "loss "]
    assert len(lines) == len(bad), job.output()
    rows = open_rows(config, "train")
    for line, step, reason in zip(lines, bad, reasons, strict=True):
        assert line.startswith(f"skipped step {step}: {reason}"), line
        documents = rows.documents(range((step - 1) * 4, step * 4))
        assert line.endswith("; documents " + ", ".join(map(str, documents)))
    run = Path(config.run.dir)
    states = [assembled(open_checkpoint(step_folder(run, step))) for step in range(1, 13)]
    unchanged = {step for step in range(2, 13) if states[step - 1] == states[step - 2]}
    assert unchanged == set(bad)


def test_resumed_run_skips_the_same_steps(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    guards = ('guards.spike="skip"', "guards.spike_window=8", "train.steps=12")
    bad = {9: "spike", 11: "nan"}
    whole, cut = tiny("whole", *guards), tiny("cut", *guards)
    train_spoiled(whole, 1, bad, monkeypatch, 0)
    for stop in (7, 9, 12):
        # The window lies before the cut: without it, nothing would be a spike after it.
        config = tiny("cut", *guards, f"train.stop_at={stop}")
        train_spoiled(config, 1, bad, monkeypatch, 0)
    assert final_state(cut) == final_state(whole)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(50))
def test_twenty_bad_steps(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    world, stage = rng.choice([1, 2]), rng.randrange(4)
    # Fixed ids: the other tests' text is the running Python's own, and may have outliers.
    documents = list(np.random.default_rng(0).integers(3, 512, (40, 250)))
    write_split(tiny.folder / "ids/train", [documents], vocab_size=512)
    config = tiny(
        "run", f"data.path={tiny.folder / 'ids'}", f"zero.stage={stage}", "train.steps=60",
        'guards.spike="skip"', "guards.spike_window=8",
    )  # fmt: skip
    kinds = ["nan", "inf", "gradient", "spike"]
    bad = {step: rng.choice(kinds) for step in rng.sample(range(10, 61), 20)}
    job = train_spoiled(config, world, bad, monkeypatch, rng.randrange(world))
    assert [int(line.split()[2].rstrip(":")) for line in skipped_lines(job)] == sorted(bad)


def test_too_many_skips_in_a_row_end_the_run_in_one_line(
    tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("run", "train.max_skips=3")
    monkeypatch.setenv("RUN_DIR", config.run.dir)
    job = Job(config, 1, spoil(dict.fromkeys((3, 5, 6, 7), "nan")))
    assert job.wait() == [EXIT_USER_ERROR]
    (line,) = job.errors()
    assert "step 7: loss is not finite" in line
    assert "3 consecutive steps" in line


def test_spike_can_end_the_run(tiny: TinyRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("run", 'guards.spike="stop"', "guards.spike_window=8")
    monkeypatch.setenv("RUN_DIR", config.run.dir)
    job = Job(config, 2, spoil({7: "spike"}, 1, 2))
    assert job.wait() == [EXIT_USER_ERROR] * 2
    (line,) = job.errors()
    assert "error: step 7: loss " in line
    assert "documents" in line


def test_window_takes_the_median_and_forgets_nothing_over_a_restart(tiny: TinyRuns) -> None:
    config = tiny("run", 'guards.spike="skip"', "guards.spike_window=8")
    guard = StepGuard(config)
    for step, loss in enumerate([4.0, 3.0, 2.0], 1):
        assert guard.judge(step, loss, 1.0, list) is None
        assert guard.loss_limit() == sys.float_info.max
    guard.judge(4, 100.0, 1.0, list)  # applied, and still not what the limit follows
    assert guard.loss_limit() == pytest.approx(3.5 + 10 * 1.4826 * 1.0)  # of 4, 3, 2, 100
    assert guard.judge(5, float("nan"), float("nan"), list) is not None
    again = StepGuard(config)
    again.restore(guard.state())
    assert again.loss_limit() == guard.loss_limit()
    assert again.state() == guard.state() == {"losses": [4.0, 3.0, 2.0, 100.0], "num_skipped": 1}


def flip_bit(tensor: torch.Tensor) -> None:
    tensor.view(-1)[:1].view(torch.uint8)[1] ^= 1


SPIKE = range(31_214, 31_251)


def synthetic_log(seed: int) -> Iterator[tuple[int, float]]:
    """(step, loss) of a made-up run, with a spike of the shape that logs of large runs show.

    Nothing here was measured: a slowly falling loss with noise, now and then a hard batch, and at
    the steps of `SPIKE` a rise by 2.5 within a few steps that takes thirty to fade.
    """
    rng = random.Random(seed)
    for step in range(30_000, 32_500):
        loss = 2.35 * (step / 30_000) ** -0.05 + rng.gauss(0, 0.03)
        if rng.random() < 0.005:
            loss += rng.uniform(0, 0.15)
        if step in SPIKE:
            since = step - SPIKE.start
            loss += 2.5 * min(1.0, (since + 1) / 4) * 0.9 ** max(0, since - 4)
        yield step, loss


def skipped_steps(guard: StepGuard, log: Iterator[tuple[int, float]]) -> list[int]:
    """Steps of a log that the guard would skip; as in training, their gradients are not finite."""
    return [
        step
        for step, loss in log
        if guard.judge(step, loss, 1.0 if loss <= guard.loss_limit() else math.nan, list)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_spike_in_a_made_up_log_is_found_and_nothing_else(tiny: TinyRuns, seed: int) -> None:
    guard = StepGuard(tiny("run", 'guards.spike="skip"', "train.max_skips=100"))
    skipped = skipped_steps(guard, synthetic_log(seed))
    assert skipped[0] == SPIKE.start
    assert set(skipped) <= set(SPIKE)
    assert len(skipped) >= 15


def test_spike_that_lasts_ends_the_run(tiny: TinyRuns) -> None:
    guard = StepGuard(tiny("run", 'guards.spike="skip"'))
    with pytest.raises(UserError, match=rf"step {SPIKE.start + 9}: .*10 consecutive steps"):
        skipped_steps(guard, synthetic_log(0))


def gathered_wrong(step: int, on_rank: int) -> Prepare:
    """A step leaves one rank with another weight than the others."""

    def prepare(rank: int) -> None:
        real, calls = Engine.step, [0]

        def do_step(self: Engine, lr: float) -> float:
            norm = real(self, lr)
            calls[0] += 1
            if calls[0] == step:
                flip_bit(next(iter(self.replicas().values())))
            return norm

        if rank == on_rank:
            Engine.step = do_step  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(("stage", "world", "odd"), [(0, 3, 2), (2, 3, 0), (3, 3, 1), (1, 2, 1)])
def test_replica_that_differs_names_its_rank(
    tiny: TinyRuns, stage: int, world: int, odd: int
) -> None:
    config = tiny(
        "run", f"zero.stage={stage}", "guards.replica_every=1", "train.rows_per_step=6",
        "train.micro_batch=1",
    )  # fmt: skip
    job = Job(config, world, gathered_wrong(3, odd))
    assert job.wait() == [EXIT_INTERNAL] * world, job.output()
    (line,) = job.errors()
    who = f"rank {odd}: step 3" if world > 2 else "rank 0, 1: step 3"
    assert line.startswith(f"error: {who}: weights differ")
    found = newest_checkpoint(Path(config.run.dir))
    assert found is not None
    assert found.step == 2  # from before


def flipped_between_steps(after: int, on_rank: int, what: str) -> Prepare:
    """A bit of something that one rank keeps flips, in the first tensor whose name ends so."""

    def prepare(rank: int) -> None:
        real, calls = Engine.forward, [0]

        def forward(self: Engine, *inputs: torch.Tensor) -> torch.Tensor:
            loss = real(self, *inputs)
            calls[0] += 1
            if calls[0] == after * BATCHES_PER_STEP + 1:
                kept = self.kept()
                flip_bit(kept[next(n for n in kept if n.endswith(what) and kept[n].numel())])
            return loss

        if rank == on_rank:
            Engine.forward = forward  # type: ignore[method-assign]

    return prepare


@pytest.mark.parametrize(
    ("stage", "world", "odd", "what"),
    [
        (0, 1, 0, "weight"), (1, 2, 1, "weight"), (1, 2, 0, "/exp_avg"), (2, 2, 1, "weight"),
        (2, 2, 0, "/master"), (3, 2, 1, "weight"), (3, 2, 0, "/exp_avg_sq"),
    ],
)  # fmt: skip
def test_bit_that_flips_between_two_steps_names_its_rank(
    tiny: TinyRuns, stage: int, world: int, odd: int, what: str
) -> None:
    config = tiny(
        "run", f"zero.stage={stage}", "guards.replica_every=2", "train.micro_batch=1",
        f"train.rows_per_step={BATCHES_PER_STEP * world}",
    )  # fmt: skip
    job = Job(config, world, flipped_between_steps(3, odd, what))
    assert job.wait() == [EXIT_INTERNAL] * world, job.output()
    (line,) = job.errors()
    assert re.match(rf"error: rank {odd}: step 4: \S+{what} changed in memory since step 3", line)
    found = newest_checkpoint(Path(config.run.dir))
    assert found is not None
    assert found.step == 2


def test_second_job_on_a_run_is_refused_until_the_first_is_gone(tiny: TinyRuns) -> None:
    config = tiny("run", "train.steps=100000", "checkpoint.every=0")
    first = Job(config, 1)
    first.wait_for(Path(config.run.dir) / "metrics.jsonl")
    other = tiny("other", f'run.dir="{config.run.dir}"')
    second = Job(other, 1)
    assert second.wait() == [EXIT_USER_ERROR]
    assert f" pid {first.pids[0]} on " in second.errors()[0]
    first.kill(0, signal.SIGKILL)
    first.end()
    third = Job(other, 1)
    assert third.wait() == [0], third.output()


def test_only_a_later_start_of_the_same_job_takes_a_run_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lock has a descriptor of its own, as in processes that do not know one another."""
    monkeypatch.setattr("tensorlm.runtime.lock.PATIENCE_SECONDS", 0.0)

    def lock_as(job: str, restarts: str) -> int:
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        return lock_run(tmp_path)

    held = [lock_as("7", "0")]
    for now, later in (("0", "1"), ("1", "3")):
        for job, restarts in (("7", now), ("8", "9"), ("", "9")):
            with pytest.raises(UserError, match="is in use by job 7 restart "):
                lock_as(job, restarts)
        held.append(lock_as("7", later))
    os.close(held[0])  # of a node that is gone: the file system has noticed
    with pytest.raises(UserError, match="is in use by job 7 restart 3 "):
        lock_as("8", "0")
    os.close(held[-1])
    os.close(lock_as("8", "0"))


def test_checkpoint_that_cannot_fit_is_refused_at_start(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"run\.dir: must have .* GiB free for one checkpoint"):
        check_disk_space(tmp_path, 1 << 60, 2)
    check_disk_space(tmp_path, 1 << 10, 2)
    assert capsys.readouterr().out == ""
    check_disk_space(tmp_path, 1 << 10, 1 << 50)
    assert capsys.readouterr().out.startswith("warning: ")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def replay_job(config: Config, step: int, world: int) -> Job:
    def replay_step(config: Config, launch: LaunchEnv, stop: StopRequest) -> int:
        return replay(config, launch, step)

    return Job(config, world, run=replay_step)


@pytest.mark.parametrize(("step", "begin"), [(1, "scratch"), (5, "checkpoint 4")])
def test_replay_gives_the_recorded_step_and_writes_nothing(
    tiny: TinyRuns, step: int, begin: str
) -> None:
    config = tiny("run", "checkpoint.keep_every=2")
    tiny.finish(config, 2)
    run = Path(config.run.dir)
    before = snapshot(run)
    job = replay_job(config, step, 2)
    assert job.wait() == [0, 0], job.output()
    lines = job.output().splitlines()
    recorded = losses(run)[step - 1]
    assert f"replay of step {step}: from {begin}" in lines
    assert f"train/loss: {recorded!r}, recorded {recorded!r}: equal" in lines
    assert sum(line.endswith(": equal") for line in lines) == 2
    assert any(line.startswith("documents: ") for line in lines)
    assert not any(line.startswith("note: ") for line in lines)
    assert snapshot(run) == before


def test_replay_names_settings_that_are_not_those_of_the_run(tiny: TinyRuns) -> None:
    tiny.finish(tiny("run", "checkpoint.keep_every=2"))
    job = replay_job(tiny("run", "checkpoint.keep_every=2", "optim.lr=0.1", "zero.stage=1"), 5, 1)
    assert job.wait() == [0], job.output()
    note = "note: changed since the run was last started: optim.lr, zero.stage"
    assert note in job.output().splitlines()


@pytest.mark.parametrize("step", [0, 9])
def test_replay_is_of_a_step_of_the_run(tiny: TinyRuns, step: int) -> None:
    job = replay_job(tiny("run"), step, 1)
    assert job.wait() == [EXIT_USER_ERROR], job.output()
    assert job.errors() == [f"error: --replay: must be from 1 to train.steps = 8, got {step}"]


def test_replay_of_an_imported_run_never_begins_with_other_weights(tiny: TinyRuns) -> None:
    config = tiny("run", "checkpoint.keep_last=1", "train.stop_at=2")
    run = Path(config.run.dir)
    model = Llama(config.model)
    model.init_weights(seed=1)
    info = {
        "state": {"step": 0, "rows": 0, "tokens": 0}, "adam_step": 0, "adam_state": False,
        "config": config.model_dump(mode="json", exclude_none=True), "data_fingerprint": "",
    }  # fmt: skip
    write_weights(run, model.named_parameters(), info)
    tiny.finish(config)
    assert list_steps(run) == [2, 0]  # imported weights stay until the user removes them
    shutil.rmtree(run / "step-00000000")
    job = replay_job(config, 1, 1)
    assert job.wait() == [EXIT_USER_ERROR], job.output()
    assert "error: --replay: no checkpoint before step 1 is left" in job.errors()[0]


def test_imported_weights_stay_and_no_run_starts_over_from_them(tiny: TinyRuns) -> None:
    config = tiny("run", "checkpoint.keep_last=1", "checkpoint.every=1", "train.stop_at=4")
    run = Path(config.run.dir)
    model = Llama(config.model)
    info = {"state": {"step": 0, "rows": 0, "tokens": 0}, "adam_step": 0, "adam_state": False}
    info |= {"config": config.model_dump(mode="json", exclude_none=True), "data_fingerprint": ""}
    write_weights(run, model.named_parameters(), info)
    found = newest_checkpoint(run)
    assert found is not None
    assert found.step == 0
    tiny.finish(config)
    assert list_steps(run) == [4, 0]
    manifest = run / "step-00000004/manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:100])
    with pytest.raises(UserError, match="no checkpoint is intact"):
        newest_checkpoint(run)
    shutil.rmtree(run / "step-00000004")
    with pytest.raises(UserError, match="are missing"):
        newest_checkpoint(run)
    assert select_checkpoint(run, 0).step == 0


class SlowDisk(disk.Disk):
    """A disk so slow that training overtakes the save."""

    def write(self, descriptor: int, data: memoryview) -> int:
        time.sleep(0.01)
        return super().write(descriptor, data)


def test_background_save_writes_the_state_of_its_step(tiny: TinyRuns) -> None:
    runs = []
    for name, background in (("plain", "false"), ("slow", "true")):
        config = tiny(name, f"checkpoint.background={background}", "checkpoint.keep_last=9")
        job = Job(config, 2, lambda rank: disk.use(SlowDisk()))
        assert job.wait() == [0, 0], job.output()
        runs.append(final_state(config))
    assert runs[0] == runs[1]
    for step in (2, 4, 6, 8):
        plain, slow = (
            open_checkpoint(step_folder(Path(tiny(name).run.dir), step))
            for name in ("plain", "slow")
        )
        assert assembled(plain) == assembled(slow)


@pytest.mark.parametrize("background", [False, True])
def test_ledger_says_how_long_training_stood_still(tiny: TinyRuns, background: bool) -> None:
    config = tiny("run", f"checkpoint.background={str(background).lower()}")
    job = Job(config, 1, lambda rank: disk.use(SlowDisk()))
    assert job.wait() == [0], job.output()
    lines = (Path(config.run.dir) / "checkpoints.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    for record in records:
        files = open_checkpoint(step_folder(Path(config.run.dir), 8)).manifest["files"]
        assert record["bytes"] == sum(entry["bytes"] for entry in files)
        assert record["seconds"] > 0.1  # SlowDisk: ten writes at least
        if not background:
            assert record["stall_seconds"] == record["seconds"]
    # The first one has nothing to wait for; later ones wait for the one before.
    assert not background or records[0]["stall_seconds"] < records[0]["seconds"] / 2


def test_multiples_of_keep_every_are_kept_for_ever(tiny: TinyRuns) -> None:
    config = tiny("run", "checkpoint.keep_last=1", "checkpoint.keep_every=4", "train.steps=10")
    tiny.finish(config)
    assert list_steps(Path(config.run.dir)) == [10, 8, 4]


def test_a_damaged_checkpoint_does_not_count_as_kept(tiny: TinyRuns) -> None:
    tiny.finish(tiny("run", "train.stop_at=4"))
    tiny.finish(tiny("run", "train.stop_at=5"))
    run = Path(tiny("run").run.dir)
    assert list_steps(run) == [5, 4]
    (file,) = step_folder(run, 5).glob("*.safetensors")
    os.truncate(file, 100)
    job = tiny.finish(tiny("run", "train.stop_at=6"))
    assert "skipping checkpoint: step-00000005" in job.output()
    assert list_steps(run) == [6, 5, 4]  # two of them are good
    tiny.finish(tiny("run"))
    assert list_steps(run) == [8, 6]


@pytest.mark.parametrize(
    ("phase", "rows"),
    [
        ("{steps=6,seq_len=16,rows_per_step=4}", 8),
        ("{steps=2,seq_len=16,rows_per_step=12}", 24),
    ],
)
def test_an_earlier_phase_keeps_its_rows_per_step(tiny: TinyRuns, phase: str, rows: int) -> None:
    phases = "train.earlier_stages=[{steps=3,seq_len=16,rows_per_step=8}]"
    tiny.finish(tiny("run", phases, "train.stop_at=2"))
    job = Job(tiny("run", f"train.earlier_stages=[{phase}]"))
    assert job.wait() == [EXIT_USER_ERROR], job.output()
    (line,) = job.errors()
    assert line.startswith("error: train.earlier_stages: 2 steps must have the 16 rows of ")
    assert line.endswith(f", got {rows} (restore the phases, or choose a new run.dir)")
    # The last phase has no end, and may change.
    tiny.finish(tiny("run", phases, "train.rows_per_step=2", "train.steps=5"))


def test_step_whose_rows_have_nothing_to_predict_has_no_loss(tiny: TinyRuns) -> None:
    """Rows of 32 tokens: the document's last token is a row of its own."""
    tokens = np.random.default_rng(0).integers(3, 512, 3 * 32 + 1)
    write_split(tiny.folder / "one/train", [[tokens]], vocab_size=512)
    steps = ("train.steps=4", "train.rows_per_step=1", "train.micro_batch=1")
    config = tiny("run", f"data.path={tiny.folder / 'one'}", *steps)
    tiny.finish(config)
    records = read_metrics(Path(config.run.dir))
    assert sorted(record["data/labels"] for record in records) == [0, 32, 32, 32]
    empty = next(record for record in records if record["data/labels"] == 0)
    assert (empty["train/loss"], empty["train/grad_norm"]) == (0, 0)
    assert all(math.isfinite(record["train/loss"]) for record in records)
