"""One optimizer step, and the state of a run."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fold_parallel import Grid
from tensorlm.batch import Batch
from tensorlm.config import Config
from tensorlm.data.loader import PackedRows
from tensorlm.data.prefetch import Prefetch
from tensorlm.model.flops import recomputed_flops, train_flops
from tensorlm.runtime.ranks import sum_over_ranks

from .engine import Engine
from .guards import Guards
from .optim import learning_rate


@dataclass(frozen=True)
class Totals:
    """Sums over the micro-batches of one step, on all ranks."""

    num_labels: int
    num_tokens: int  # of documents, without padding
    model_flops: float  # of documents, without padding
    computed_flops: float  # padding and recomputation included
    must_stop: bool  # on any rank
    digest: int  # hash of all tokens and their places in the rows, modulo 2^64


@dataclass
class TrainState:
    """The state of a run, besides its weights, Adam state and the window of its step guard."""

    step: int = 0
    rows: int = 0
    tokens: int = 0  # of documents, without padding
    data_hash: str = ""  # of all rows so far, their tokens and their order

    def advance(self, num_rows: int, totals: Totals) -> None:
        """Count one more step, on `num_rows` rows."""
        self.step += 1
        self.rows += num_rows
        self.tokens += totals.num_tokens
        consumed = f"{self.data_hash} {totals.digest}"
        self.data_hash = hashlib.sha256(consumed.encode()).hexdigest()[:16]


@dataclass
class Run:
    """A run on this rank: its settings, devices, data, engine and state."""

    config: Config
    device: torch.device
    grid: Grid
    rows: PackedRows
    prefetch: Prefetch
    engine: Engine
    guards: Guards
    state: TrainState

    @property
    def dir(self) -> Path:
        return Path(self.config.run.dir)


def train_step(run: Run, must_stop: bool) -> tuple[dict[str, Any], bool]:
    """Do one optimizer step and advance the state.

    Returns:
        The values to log, and whether any rank must stop.

    Raises:
        UserError: a guard ends the run.
    """
    config, state, guards = run.config, run.state, run.guards
    phase = config.phase_at(state.step)
    guards.begin_step(state.step)
    batches = run.prefetch.batches(state.step, state.rows)
    totals = count_over_ranks(run, batches, must_stop)
    mean_loss = accumulate_gradients(run, batches, totals.num_labels)
    lr = learning_rate(state.step, config.train.steps, config.optim)
    grad_norm = guards.apply_step(run.engine, lr)
    state.advance(phase.rows_per_step, totals)
    loss = mean_loss.item()
    is_skipped = guards.judge(loss, grad_norm, lambda: run.rows.documents(last_rows(run)))
    record = {
        "train/loss": loss,
        "train/grad_norm": grad_norm,
        "train/lr": lr,
        "train/tokens": state.tokens,
        "train/skipped": float(is_skipped),
        "data/labels": float(totals.num_labels),
        "data/seq_len": phase.seq_len,
        "data/hash": state.data_hash,
        "step_tokens": totals.num_tokens,
        "step_flops": totals.model_flops,
        "computed_flops": totals.computed_flops,
    }
    return record, totals.must_stop


def accumulate_gradients(run: Run, batches: list[Batch], num_labels: int) -> Tensor:
    """Run the forward and backward passes of this rank's micro-batches.

    Returns:
        The mean loss over all labels of the step, the same on all ranks: a float64 scalar.
    """
    num_losses = max(1, num_labels)  # rows of single-token documents have no label
    # DeepSpeed averages gradients over ranks; this factor gives those of the mean over all labels.
    loss_scale = torch.full((), run.grid.world_size / num_losses, device=run.device)
    total_loss = torch.zeros((), device=run.device, dtype=torch.float64)
    for index, batch in enumerate(batches, start=1):
        loss = run.engine.forward(*batch.to(run.device))
        total_loss += loss.detach()
        if index == len(batches):
            dist.all_reduce(total_loss)
            # All ranks know the loss before the last backward pass. That pass makes the gradients
            # of a bad step non-finite, and DeepSpeed skips such a step on all ranks.
            is_bad = ~(total_loss / num_losses <= run.guards.loss_limit())
            loss_scale.masked_fill_(is_bad, torch.nan)
        run.engine.backward(loss * loss_scale)
    return total_loss / num_losses


def count_over_ranks(run: Run, batches: list[Batch], must_stop: bool) -> Totals:
    """Sum over all ranks' micro-batches, and whether any rank must stop, in one all-reduce."""
    model, train = run.config.model, run.config.train
    digest = sum(batch.digest for batch in batches)
    run.guards.enter("forward")
    num_labels, num_tokens, model_flops, computed_flops, num_stopping, low, high = sum_over_ranks(
        run.device,
        sum(batch.num_labels for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(train_flops(model, batch.text_depth) for batch in batches),
        sum(
            train_flops(model, batch.depth)
            + recomputed_flops(
                model, batch.depth, train.recompute, train.mlp_chunk, train.recompute_interval
            )
            for batch in batches
        ),
        must_stop,
        *(digest >> shift & 0xFFFF_FFFF for shift in (0, 32)),  # exact in float64
    )
    return Totals(
        num_labels=int(num_labels),
        num_tokens=int(num_tokens),
        model_flops=model_flops,
        computed_flops=computed_flops,
        must_stop=num_stopping > 0,
        digest=(int(low) + (int(high) << 32)) % (1 << 64),
    )


def last_rows(run: Run) -> range:
    """Global indices of the rows of the last completed step."""
    num_rows = run.config.phase_at(run.state.step - 1).rows_per_step
    return range(run.state.rows - num_rows, run.state.rows)
