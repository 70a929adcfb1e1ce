"""The training run from start to end."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fold_parallel import create_grid
from tensorlm import checkpoint
from tensorlm.checkpoint.publish import sweep, was_imported
from tensorlm.config import Config, attention_in_words, why_slow
from tensorlm.data.loader import open_rows
from tensorlm.data.prefetch import Prefetch
from tensorlm.data.verify import check_data
from tensorlm.model.float8 import check_linear
from tensorlm.model.flops import num_parameters, peak_flops
from tensorlm.model.fused import runs_liger
from tensorlm.runtime.commit import git_commit
from tensorlm.runtime.errors import EXIT_DONE, EXIT_PREEMPTED, UserError
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.lock import lock_run
from tensorlm.runtime.preemption import StopRequest
from tensorlm.runtime.ranks import EXCHANGE_LIMIT, leave_distributed, sum_over_ranks
from tensorlm.runtime.watchdog import FOLDER, Watchdog

from .engine import Engine, create_model, init_distributed
from .guards import Guards
from .metrics import Metrics, peak_memory_gib
from .profiler import start_profiler
from .recompute import choose_recompute
from .replicas import check_replicas
from .step import Run, TrainState, train_step

# If this file exists in the run's folder, rank 0 ends the run after the current step, with a
# checkpoint, and renames the file. It works with launchers that do not forward signals.
STOP_FILE, OBEYED_FILE = "STOP", "STOPPED"


def train(config: Config, launch: LaunchEnv, stop: StopRequest) -> int:
    """Train from the newest checkpoint in `config.run.dir`, or from scratch if there is none.

    Returns:
        The exit code: EXIT_DONE, or EXIT_PREEMPTED after a signal or a stop file (the run was saved
        and can be resumed).

    Raises:
        UserError: a mistake that the user can correct.
    """
    if launch.rank == 0:
        lock_run(Path(config.run.dir))
    if config.eval.every:
        from tensorlm.evaluation.launch import check_held_out  # see evaluate_run

        check_held_out(config)
    run = start(config, launch)
    state, watchdog = run.state, run.guards.watchdog
    saver = checkpoint.Saver(run.dir, config.checkpoint, state.step, watchdog.progress)
    metrics = Metrics(config, state.step, git_commit()) if launch.rank == 0 else None
    if metrics:
        sweep(run.dir)
        metrics.announce(describe_run(run))
    stop_file = run.dir / STOP_FILE

    def is_asked() -> bool:
        """Whether this rank has a reason to end the run."""
        return stop.is_asked or saver.has_failed or (launch.rank == 0 and stop_file.exists())

    traced = config.train.profile if launch.rank == 0 else None
    profiler = start_profiler(run.dir, traced, state.step) if traced else None

    peak = peak_flops(run.device) * launch.world_size
    last_step = config.train.stop_at or config.train.steps
    stopping = lacks_evaluation(run) and evaluate_run(run, metrics, is_asked)
    while state.step < last_step and not stopping:
        started = time.perf_counter()
        must_stop = is_asked()
        if must_stop:
            print(describe_stop(config, saver.has_failed), flush=True)
        record, stopping = train_step(run, must_stop)
        watchdog.enter("log", state.step)
        if profiler:
            profiler.step()
        if metrics:
            seconds = time.perf_counter() - started
            record["perf/tokens_per_second"] = record.pop("step_tokens") / seconds
            record["perf/mfu"] = record.pop("step_flops") / seconds / peak
            record["perf/hfu"] = record.pop("computed_flops") / seconds / peak
            record["perf/memory_gib"] = peak_memory_gib(run.device)
            metrics.log_step(state.step, record)
        save_every, check_every = config.checkpoint.every, config.guards.replica_every
        is_last = stopping or state.step == last_step
        is_evaluating = is_evaluated(config, state.step) and not stopping
        # Save before an evaluation too: it takes long, and a crash there must not cost steps.
        is_due = is_last or is_evaluating or (save_every > 0 and state.step % save_every == 0)
        is_saving = save_every > 0 and is_due
        if check_every and (is_saving or state.step % check_every == 0):
            check_replicas(run.engine.replicas(), state.step)
        if is_saving:
            watchdog.enter("save", state.step)
            saver.save(state.step, run.engine.parameter_slices(), describe_state(run))
        if is_evaluating:
            stopping = evaluate_run(run, metrics, is_asked)

    watchdog.enter("save", state.step)
    saver.wait()
    if profiler:
        profiler.stop()
    if metrics:
        metrics.close()
        if stop_file.exists():
            stop_file.replace(stop_file.with_name(OBEYED_FILE))
    leave_distributed()
    watchdog.stop()
    return EXIT_PREEMPTED if stopping and state.step < last_step else EXIT_DONE


def describe_stop(config: Config, save_has_failed: bool) -> str:
    """Describe why the run ends after the current step, and what is saved."""
    if save_has_failed:
        return "a background save has failed: ending after this step"
    if not config.checkpoint.every:
        return "stop requested: ending after this step, nothing is saved (checkpoint.every = 0)"
    return "stop requested: saving after this step"


def is_evaluated(config: Config, step: int) -> bool:
    """Whether the model is evaluated after step `step`."""
    return step > 0 and config.eval.every > 0 and step % config.eval.every == 0


def lacks_evaluation(run: Run) -> bool:
    """Whether an earlier start of the run saved this step but ended before evaluating it."""
    step = run.state.step
    if not is_evaluated(run.config, step):
        return False
    from tensorlm.evaluation.launch import run_output

    is_there = (run_output(run.config, step) / "report.json").exists()
    return sum_over_ranks(run.device, run.grid.rank == 0 and not is_there)[0] > 0


def evaluate_run(run: Run, metrics: Metrics | None, is_asked: Callable[[], bool]) -> bool:
    """Evaluate the current model; collective.

    Returns:
        True if the evaluation was interrupted between two forward passes, because `is_asked` was
        True on any rank; the next start evaluates this step.
    """
    # These modules import transformers, which takes a quarter of a rank's start-up time.
    from tensorlm.evaluation.launch import evaluate_in_training
    from tensorlm.evaluation.model import wrap_training_model
    from tensorlm.evaluation.ranks import LeaveRequest, LeftError

    step = run.state.step
    run.guards.watchdog.enter("eval", step)
    leave = LeaveRequest(is_asked, run.device, step)
    model = wrap_training_model(
        run.config, run.engine.module, step, run.device, run.grid,
        run.guards.watchdog.progress, leave, run.state.tokens,
    )  # fmt: skip
    try:
        evaluate_in_training(run.config, model, metrics.writer if metrics else None)
    except LeftError:
        if run.grid.rank == 0:
            print(f"stop requested: leaving the evaluation of step {step}", flush=True)
        return True
    return False


def start(config: Config, launch: LaunchEnv, before: int | None = None) -> Run:
    """Set up a run and load the newest checkpoint (older than step `before`, if given)."""
    config.check_world(launch.world_size)
    run_dir = Path(config.run.dir)
    # A replay may run beside the run itself: each watchdog must see only its own reports.
    reports = run_dir / (FOLDER if before is None else f"{FOLDER}-replay")
    watchdog = Watchdog(reports, launch.rank, launch.world_size, **config.guards.limits)
    rows = open_rows(config, "train")
    device = init_distributed(launch)
    if config.train.attention == "triton" and device.type == "cpu":
        raise UserError("train.attention: triton needs a GPU (auto, blocked and dense do not)")
    if config.train.fused_layers == "liger" and device.type == "cpu":
        raise UserError("train.fused_layers: liger needs a GPU (auto and torch do not)")
    check_linear(config.train.linear, device)
    config = choose_recompute(config, launch, device)
    grid = create_grid(config.parallel.sp, EXCHANGE_LIMIT)
    watchdog.enter("resume", 0)
    if config.data.verify:
        check_data(rows, launch.rank, launch.world_size, watchdog.progress)
    found = checkpoint.newest_checkpoint(
        run_dir, launch.rank, launch.world_size, before=before, progress=watchdog.progress
    )
    seed = config.run.seed if found is None else None
    engine = Engine(create_model(config, grid, device, seed), config)
    prefetch = Prefetch(rows, config, grid, pin=device.type == "cuda")
    guards = Guards(config, watchdog)
    run = Run(config, device, grid, rows, prefetch, engine, guards, TrainState())
    if before is None and config.checkpoint.every:
        check_room(run)
    if found is not None:
        resume(run, found)
    return run


def check_room(run: Run) -> None:
    """Raise UserError unless the disk has room for a checkpoint; warn if not for all to keep."""
    slices = run.engine.parameter_slices()
    own_bytes = sum(4 * t.numel() for s in slices if s.is_owned for t in s.state.values())
    (num_bytes,) = sum_over_ranks(run.device, own_bytes)
    checkpoint.check_disk_space(run.dir, int(num_bytes), run.config.checkpoint.keep_last)


def resume(run: Run, found: checkpoint.Checkpoint) -> None:
    """Continue from a verified checkpoint.

    Raises:
        UserError: it belongs to another model or other data.
    """
    checkpoint.check_resumable(found, run.config, run.rows.fingerprint)
    try:
        run.state = TrainState(**found.manifest["state"])
        # Earlier versions counted padding too.
        run.state.tokens = run.rows.num_tokens(run.state.rows)
        guard = run.guards.step_guard
        guard.restore(found.manifest.get("guard", guard.state()))
        adam_step = found.manifest["adam_step"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{found.folder}: must be a checkpoint of a run ({error})") from None
    checkpoint.check_names(found, (name for name, _ in run.engine.module.named_parameters()))
    checkpoint.load_slices(found, run.engine.parameter_slices())
    run.engine.refresh_weights(adam_step)


def describe_state(run: Run) -> dict[str, Any]:
    """The content of a checkpoint's manifest, without the files and slices."""
    return {
        "state": asdict(run.state),
        "guard": run.guards.step_guard.state(),
        "adam_step": run.engine.adam_step,
        "config": run.config.model_dump(mode="json", exclude_none=True),
        "data_fingerprint": run.rows.fingerprint,
        "tokenizer_sha256": run.rows.tokenizer_sha256,
        "world_size": run.grid.world_size,
    }


def describe_run(run: Run) -> list[str]:
    """Describe the run, its model, data and ranks, for the first lines of the log."""
    config, grid = run.config, run.grid
    attention = attention_in_words(config.model)
    begin = f"resumed after step {run.state.step}" if run.state.step else "from scratch"
    if not run.state.step and was_imported(run.dir):
        begin = "from imported weights"
    is_gpu = run.device.type == "cuda"
    name = torch.cuda.get_device_name(run.device) if is_gpu else "CPU"
    num = num_parameters(run.engine.module)
    layers = "Liger" if runs_liger(config.train.fused_layers, is_gpu) else "torch"
    products = "" if config.train.linear == "bf16" else f", products in {config.train.linear}"
    return [
        f"run {config.run.dir}: {begin}, {config.train.steps} steps, commit {git_commit()}",
        f"model: {num:,} parameters, {attention}, {config.train.dtype}{products}, "
        f"norms and MLPs by {layers}",
        *_notes_on_speed(config, is_gpu),
        *run.rows.describe(),
        "steps: "
        + ", then ".join(
            f"{phase.steps:,} of {phase.rows_per_step:,} rows of {phase.seq_len:,} tokens"
            for phase in config.phases
        ),
        f"ranks: {grid.world_size} x {name} (dp {grid.dp} x sp {grid.sp}), "
        f"ZeRO stage {config.zero.stage}",
        *_notes_on_tokenizers(run),
    ]


def _notes_on_speed(config: Config, is_gpu: bool) -> list[str]:
    """A note if the GPU kernels do not support the routed layers."""
    reason = why_slow(config.model) if is_gpu and config.train.attention == "auto" else None
    return [f"note: routed layers run in plain PyTorch, which is slow: {reason}"] if reason else []


def _notes_on_tokenizers(run: Run) -> list[str]:
    """A note if the weights were imported with a tokenizer other than that of the data."""
    if not was_imported(run.dir):  # the imports below load transformers, which takes seconds
        return []
    from tensorlm.hf.import_folder import imported_folder
    from tensorlm.hf.imported_tokenizer import describe_another_tokenizer

    data = run.config.data.all_sources[0].path
    note = describe_another_tokenizer(imported_folder(run.dir), Path(data) / "tokenizer", data)
    return [note] if note else []
