"""The training run, in order, on one page."""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from fold_parallel import Grid, create_grid

from . import checkpoint
from .config import Config
from .data.loader import PackedRows, open_rows
from .engine import Engine, init_distributed, leave_distributed
from .errors import EXIT_DONE, EXIT_PREEMPTED, UserError
from .flops import num_parameters, peak_flops, train_flops
from .launch_env import LaunchEnv
from .metrics import Metrics, git_commit, peak_memory_gib
from .model import Llama
from .optim import learning_rate

# In the run's directory: asks rank 0, at the end of a step, for a checkpoint and an end. It is
# removed once it is obeyed. Launchers do not pass every signal on; a file needs none of them.
STOP_FILE = "STOP"


@dataclass
class TrainState:
    """All that a run is, besides its weights and Adam state."""

    step: int = 0
    rows: int = 0
    tokens: int = 0


def train(config: Config, launch: LaunchEnv) -> int:
    """Train from the newest checkpoint in `config.run.dir`, or from scratch where there is none.

    Returns:
        The exit code: EXIT_DONE, or EXIT_PREEMPTED after a signal or a stop file (saved, to be
        continued).

    Raises:
        UserError: what the user can mend.
    """
    config.check_world(launch.world_size)
    rows = open_rows(config, "train")
    device = init_distributed(launch)
    grid = create_grid(config.parallel.sp)
    engine = Engine(build_model(config, grid, device), config)
    state = resume(config, engine, rows)
    metrics = Metrics(config, state.step, git_commit()) if launch.rank == 0 else None
    if metrics:
        metrics.announce(describe_run(config, grid, engine, rows, device, state))
    peak = peak_flops(device) * launch.world_size
    is_signalled = catch_signals()
    stop_file = Path(config.run.dir) / STOP_FILE

    last_step = config.train.stop_at or config.train.steps
    skipped, stopping = 0, False
    while state.step < last_step and not stopping:
        started = time.perf_counter()
        must_stop = is_signalled() or (launch.rank == 0 and stop_file.exists())
        record, stopping = train_step(config, grid, engine, rows, state, device, must_stop)
        skipped = 0 if math.isfinite(record["train/grad_norm"]) else skipped + 1
        if skipped >= config.train.max_skips:
            raise UserError(f"step {state.step}: {skipped} steps in a row were not finite")
        if metrics:
            seconds = time.perf_counter() - started
            record["perf/tokens_per_second"] = record.pop("step_tokens") / seconds
            record["perf/mfu"] = record.pop("step_flops") / seconds / peak
            record["perf/memory_gib"] = peak_memory_gib(device)
            metrics.log_step(state.step, record)
        if stopping or state.step % config.checkpoint.every == 0 or state.step == last_step:
            save(config, engine, rows, state)

    if metrics:
        metrics.close()
        stop_file.unlink(missing_ok=True)
    leave_distributed()
    return EXIT_PREEMPTED if stopping and state.step < last_step else EXIT_DONE


def train_step(
    config: Config,
    grid: Grid,
    engine: Engine,
    rows: PackedRows,
    state: TrainState,
    device: torch.device,
    must_stop: bool,
) -> tuple[dict[str, float], bool]:
    """One optimizer step: advances `state`, returns what to log and whether any rank must stop."""
    share = config.train.rows_per_step // grid.dp
    batches = rows.micro_batches(
        state.rows + grid.dp_rank * share,
        share,
        config.train.micro_batch,
        grid.tokens(config.data.seq_len),
    )
    num_labels, num_flops, num_stopping = sum_over_ranks(
        device,
        sum(batch.num_labels for batch in batches),
        sum(train_flops(config.model, batch.depth) for batch in batches),
        must_stop,
    )

    # DeepSpeed averages gradients over ranks; this makes them those of the mean over all labels.
    loss_scale = grid.world_size / num_labels
    loss_sum = torch.zeros((), device=device)
    for batch in batches:
        loss_sum += engine.forward_backward(*batch.to(device), loss_scale=loss_scale)
    lr = learning_rate(state.step, config.train.steps, config.optim)
    grad_norm = engine.step(lr)
    (total_loss,) = sum_over_ranks(device, loss_sum.item())

    state.step += 1
    state.rows += config.train.rows_per_step
    state.tokens += config.train.rows_per_step * config.data.seq_len
    record = {
        "train/loss": total_loss / num_labels,
        "train/grad_norm": grad_norm,
        "train/lr": lr,
        "train/tokens": state.tokens,
        "data/labels": num_labels,
        "step_tokens": config.train.rows_per_step * config.data.seq_len,
        "step_flops": num_flops,
    }
    return record, num_stopping > 0


def build_model(config: Config, grid: Grid, device: torch.device) -> Llama:
    """The model of `config` with its initial weights, fp32, on `device`."""
    with device:
        model = Llama(
            config.model,
            grid,
            activation_checkpointing=config.train.activation_checkpointing,
            loss_chunk=config.train.loss_chunk,
        )
    model.init_weights(config.run.seed)
    return model


def resume(config: Config, engine: Engine, rows: PackedRows) -> TrainState:
    """Load the newest whole checkpoint into the engine; a fresh state where there is none."""
    run_dir = Path(config.run.dir)
    found = checkpoint.newest_checkpoint(run_dir, dist.get_rank(), dist.get_world_size())
    if found is None:
        return TrainState()
    state = TrainState(**found.manifest["state"])
    if state.rows and found.manifest["data_fingerprint"] != rows.fingerprint:
        raise UserError(
            f"{found.folder}: was trained on other data, or with another data section or seed "
            "(restore them, or choose a new run.dir)"
        )
    checkpoint.load(found, engine.parameter_slices())
    engine.refresh_weights(adam_step=found.manifest["adam_step"])
    return state


def save(config: Config, engine: Engine, rows: PackedRows, state: TrainState) -> None:
    """Publish the checkpoint of this step (all ranks together)."""
    info = {
        "state": asdict(state),
        "adam_step": engine.adam_step,
        "config": config.model_dump(mode="json", exclude_none=True),
        "data_fingerprint": rows.fingerprint,
        "tokenizer_sha256": rows.corpus.tokenizer_sha256,
        "world_size": dist.get_world_size(),
    }
    slices = engine.parameter_slices()
    checkpoint.save(Path(config.run.dir), state.step, slices, info, config.checkpoint.keep_last)


def sum_over_ranks(device: torch.device, *values: float) -> list[float]:
    """Each value summed over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def catch_signals() -> Callable[[], bool]:
    """SIGUSR1 and SIGTERM ask for a checkpoint and an end; a second one ends at once."""
    received = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGUSR1, handle)
    signal.signal(signal.SIGTERM, handle)
    return lambda: bool(received)


def describe_run(
    config: Config,
    grid: Grid,
    engine: Engine,
    rows: PackedRows,
    device: torch.device,
    state: TrainState,
) -> list[str]:
    """What runs where, for the first lines of the log."""
    fold = list(config.model.fold) or "none (full attention)"
    start = f"resumed after step {state.step}" if state.step else "from scratch"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return [
        f"run {config.run.dir}: {start}, {config.train.steps} steps, commit {git_commit()}",
        f"model: {num_parameters(engine.module):,} parameters, fold {fold}, {config.train.dtype}",
        f"data: {rows.plan.num_rows:,} rows of {config.data.seq_len:,} tokens, "
        f"{rows.plan.fill:.2%} full; {config.train.rows_per_step} rows a step",
        f"ranks: {grid.world_size} x {name} (dp {grid.dp} x sp {grid.sp}), "
        f"ZeRO stage {config.zero.stage}",
    ]
