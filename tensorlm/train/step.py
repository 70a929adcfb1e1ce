"""One optimizer step, and what it works on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fold_parallel import Grid
from tensorlm.config import Config
from tensorlm.data.loader import PackedRows
from tensorlm.data.prefetch import Feed
from tensorlm.model.flops import recomputed_flops, train_flops
from tensorlm.runtime.ranks import sum_over_ranks
from tensorlm.runtime.watchdog import Watchdog

from .engine import Engine
from .guards import StepGuard
from .optim import learning_rate
from .replicas import MemoryGuard


@dataclass
class TrainState:
    """All that a run is, besides its weights, Adam state and the window of its step guard."""

    step: int = 0
    rows: int = 0
    tokens: int = 0  # of documents; padding is none
    data_hash: str = ""  # of all rows so far, their tokens and their order


@dataclass
class Run:
    """What this rank works with."""

    config: Config
    device: torch.device
    grid: Grid
    rows: PackedRows
    feed: Feed
    engine: Engine
    guard: StepGuard
    memory: MemoryGuard
    watchdog: Watchdog
    state: TrainState

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)


def train_step(run: Run, must_stop: bool) -> tuple[dict[str, Any], bool]:
    """One optimizer step: advances the state, returns what to log and whether any rank must stop.

    Raises:
        UserError: one of the guards ends the run.
    """
    config, grid, device, state = run.config, run.grid, run.device, run.state
    run.watchdog.enter("data", state.step + 1)
    stage = config.stage_at(state.step)
    if state.step and config.stage_at(state.step - 1) != stage:
        run.watchdog.expect_other_steps()
    batches = run.feed.batches(state.step, state.rows)
    run.watchdog.enter("forward", state.step + 1)
    digest = sum(batch.digest for batch in batches)
    recompute, chunk = config.train.activation_checkpointing, config.train.mlp_chunk
    num_labels, num_tokens, num_flops, num_computed, num_stopping, *digest_parts = sum_over_ranks(
        device,
        sum(batch.num_labels for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(train_flops(config.model, batch.text_depth) for batch in batches),
        sum(
            train_flops(config.model, batch.depth)
            + recomputed_flops(config.model, batch.depth, recompute, chunk)
            for batch in batches
        ),
        must_stop,
        *(digest >> shift & 0xFFFF_FFFF for shift in (0, 32)),  # exact in float64
    )

    num_losses = max(1, num_labels)  # rows of single-token documents have no label
    # DeepSpeed averages gradients over ranks; this makes them those of the mean over all labels.
    loss_scale = torch.full((), grid.world_size / num_losses, device=device)
    total_loss = torch.zeros((), device=device, dtype=torch.float64)
    for index, batch in enumerate(batches, start=1):
        loss = run.engine.forward(*batch.to(device))
        total_loss += loss.detach()
        if index == len(batches):
            dist.all_reduce(total_loss)
            # All ranks agree on the loss before the last backward pass. Gradients of a bad step
            # become non-finite there, and DeepSpeed applies no such step, on any rank.
            is_bad = ~(total_loss / num_losses <= run.guard.loss_limit())
            loss_scale.masked_fill_(is_bad, torch.nan)
        run.engine.backward(loss * loss_scale)
    run.watchdog.enter("step", state.step + 1)
    lr = learning_rate(state.step, config.train.steps, config.optim)
    run.memory.check(state.step + 1, run.engine.kept)
    grad_norm = run.engine.step(lr)
    run.memory.remember(state.step + 1, run.engine.kept)
    mean_loss = total_loss.item() / num_losses

    state.step += 1
    state.rows += stage.rows_per_step
    state.tokens += int(num_tokens)
    low, high = (int(part) for part in digest_parts)
    consumed = f"{state.data_hash} {(low + (high << 32)) % (1 << 64)}"
    state.data_hash = hashlib.sha256(consumed.encode()).hexdigest()[:16]
    skipped = run.guard.judge(
        state.step, mean_loss, grad_norm, lambda: run.rows.documents(last_rows(run))
    )
    if skipped and dist.get_rank() == 0:
        print(f"skipped {skipped}", flush=True)
    record = {
        "train/loss": mean_loss,
        "train/grad_norm": grad_norm,
        "train/lr": lr,
        "train/tokens": state.tokens,
        "train/skipped": float(skipped is not None),
        "data/labels": num_labels,
        "data/seq_len": stage.seq_len,
        "data/hash": state.data_hash,
        "step_tokens": num_tokens,
        "step_flops": num_flops,
        "computed_flops": num_computed,
    }
    return record, num_stopping > 0


def last_rows(run: Run) -> range:
    """Global indices of the rows of the step that was done last."""
    num_rows = run.config.stage_at(run.state.step - 1).rows_per_step
    return range(run.state.rows - num_rows, run.state.rows)
