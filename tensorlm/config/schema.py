"""The configuration of one run: a TOML file plus `key.sub=value` overrides, checked as a whole.

Nothing changes after loading: sections are frozen. Unknown keys are errors. All problems are
reported together, one line each, with the closest valid key.
"""

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from fold_parallel.grid import check_world
from tensor_attention import Backend
from tensorlm.runtime.errors import UserError

from .cross_checks import cross_problems
from .evaluation import EvalConfig
from .model import ModelConfig
from .section import Section, raise_all

FusedLayers = Literal["auto", "liger", "torch"]
LinearFormat = Literal["bf16", "float8_tensorwise", "float8_rowwise"]
Recompute = Literal["none", "selective", "attention", "block", "auto"]


class SourceConfig(Section):
    """One of several prepared data sets."""

    path: str
    """folder of a prepared data set"""
    weight: PositiveFloat = 1.0
    """share of the rows that come from this source, relative to the other sources' weights"""
    max_epochs: NonNegativeFloat = 0.0
    """maximum passes over this source; the run is rejected if it needs more (0: unlimited)"""


class DataConfig(Section):
    """The prepared data set or sources, and how their documents become rows."""

    path: str
    """folder of the prepared data set; with `sources`, the one whose held-out split is evaluated
    (default: the first source)"""
    sources: tuple[SourceConfig, ...] = Field((), strict=False)
    """data sets to mix (default: only the data set in `path`)"""
    seq_len: int = Field(gt=1)
    """tokens in a packed row, of the last phase if train.earlier_stages are given"""
    packing: Literal["best_fit", "concat"] = "best_fit"
    """how documents become rows: best_fit cuts as few as possible, concat joins them end to end"""
    verify: bool = True
    """read all data at the start of the run and compare it with its checksums"""

    @model_validator(mode="before")
    @classmethod
    def _path_of_first_source(cls, tree: Any) -> Any:
        match tree:
            case {"sources": [{"path": path}, *_]} if "path" not in tree:
                return {**tree, "path": path}
        return tree

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources; only `path` if no sources are given."""
        return self.sources or (SourceConfig(path=self.path),)


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat
    """learning rate after the warm-up"""
    min_lr: NonNegativeFloat = 0.0
    """learning rate of the last step (schedules cosine and wsd)"""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """what follows the warm-up: cosine decay; wsd (constant, then linear decay over the last
    decay_steps); or constant"""
    warmup_steps: NonNegativeInt = 0
    """steps over which the learning rate grows from 0 to lr (0: no warm-up)"""
    decay_steps: NonNegativeInt = 0
    """last steps, over which schedule wsd decays to min_lr; must be set for wsd"""
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False)
    """AdamW's decay rates of the first and second moment"""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon, added to the root of the second moment"""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's weight decay, on matrices only: norms and biases have none"""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """dtype of AdamW's two moments; bf16 halves their memory and is rounded stochastically, so that
    rounding is unbiased"""
    grad_clip: NonNegativeFloat = 1.0
    """maximum norm of the gradient; longer gradients are scaled down to it (0: no clipping)"""


class PhaseConfig(Section):
    """Consecutive steps on rows of one length."""

    steps: PositiveInt
    """optimizer steps of this phase"""
    seq_len: int = Field(gt=1)
    """tokens in a packed row"""
    rows_per_step: PositiveInt
    """packed rows in one optimizer step, over all ranks"""
    micro_batch: PositiveInt = 1
    """packed rows in one forward pass of one rank"""

    @property
    def num_rows(self) -> int:
        """Number of rows of all its steps."""
        return self.steps * self.rows_per_step


class TrainConfig(Section):
    """Length and batch of the run, precision, memory."""

    steps: PositiveInt
    """optimizer steps of the whole run, at which the learning-rate schedule ends"""
    stop_at: NonNegativeInt = 0
    """save and exit after this step (0: train up to `steps`)"""
    rows_per_step: PositiveInt
    """packed rows in one optimizer step, over all ranks"""
    micro_batch: PositiveInt = 1
    """packed rows in one forward pass of one rank"""
    earlier_stages: tuple[PhaseConfig, ...] = Field((), strict=False)
    """phases before the last one, with rows of other lengths; the last phase is set by [data] and
    [train]"""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """dtype of the working weights and activations; AdamW always updates float32 weights"""
    attention: Backend = "auto"
    """implementation of the attention operators: auto (triton on GPUs, else blocked), dense,
    blocked or triton"""
    fused_layers: FusedLayers = "auto"
    """implementation of RMSNorm, SwiGLU and the loss: auto (on GPUs, Liger's kernels if installed,
    and a kernel for the loss), liger or torch"""
    linear: LinearFormat = "bf16"
    """number format of the layers' matrix products in training: bf16 (that of dtype),
    float8_tensorwise (one scale per tensor) or float8_rowwise (one per row); weights, embedding,
    output head and evaluation do not change"""
    recompute: Recompute = "none"
    """what the backward pass recomputes: none; selective (norms and SwiGLU's activation: results of
    attention and matrix products are kept); attention (everything but attention, in routed layers
    everything but the attention to chosen blocks); block (everything: only layers' inputs are
    kept); or auto (the first of these that fits the GPU by the plan's prediction)"""
    recompute_interval: PositiveInt = 1
    """with recompute = block, keep the input of every n-th layer only; the backward pass finds the
    inputs between them by running n - 1 of n layers once more"""
    activation_offload: bool = False
    """keep the layers' inputs in host memory; needs recompute = selective, attention or block"""
    mlp_chunk: NonNegativeInt = 0
    """tokens that pass through SwiGLU at a time, to bound its memory (0: all)"""
    loss_chunk: PositiveInt = 2048
    """tokens whose logits are in memory at a time"""
    max_skips: PositiveInt = 10
    """consecutive skipped steps after which the run stops"""
    profile: tuple[int, int] | None = Field(None, strict=False)
    """steps [start, stop) of rank 0 to trace into RUN/profile/, e.g. [10, 13] (default: no
    trace)"""

    @model_validator(mode="before")
    @classmethod
    def _recompute_of_old_key(cls, tree: Any) -> Any:
        """Accept `activation_checkpointing`, which `recompute` has replaced."""
        match tree:
            case {"activation_checkpointing": bool(recomputes), **rest}:
                if "recompute" in rest:
                    raise ValueError(
                        "activation_checkpointing: must not be set beside recompute, which "
                        "replaces it (remove activation_checkpointing)"
                    )
                return rest | {"recompute": "block" if recomputes else "none"}
        return tree


class ParallelConfig(Section):
    """How the ranks divide the work; dp = world size / sp."""

    sp: PositiveInt = 1
    """sequence-parallel degree: ranks that share each row (called context parallelism, CP,
    elsewhere); 1: rows are not shared"""


class ZeroConfig(Section):
    """DeepSpeed ZeRO over all ranks."""

    stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage; ranks divide AdamW's state from stage 1, gradients from 2, weights at
    3; 0: nothing is divided"""
    offload_optimizer: bool = False
    """keep AdamW's state in host memory, and update there"""


class CheckpointConfig(Section):
    """When to save and how many to keep."""

    every: NonNegativeInt = 100
    """steps between checkpoints (0: none at all, not even at the end)"""
    keep_last: PositiveInt = 2
    """number of newest checkpoints to keep, in addition to imported weights (step 0)"""
    keep_every: NonNegativeInt = 0
    """keep all checkpoints whose step is a multiple of this (0: none)"""
    background: bool = False
    """copy the state to host memory and write it while training continues"""


class GuardsConfig(Section):
    """Checks of each step, and limits after which a run counts as hung (docs/reliability.md)."""

    spike: Literal["off", "skip", "stop"] = "off"
    """what to do with a step whose loss is far above the recent ones: apply it (off), skip its
    update, or stop the run"""
    spike_threshold: PositiveFloat = 10.0
    """a loss is a spike if it exceeds the median by more than this many deviations"""
    spike_window: int = Field(128, ge=8)
    """recent steps over which the median and the deviation are taken"""
    replica_every: NonNegativeInt = 100
    """steps between checks that weights are equal on all ranks and that memory has not changed
    since the last step; weights are also compared before each save (0: neither check, not even
    before saves)"""
    hang_seconds: PositiveFloat = 30.0
    """seconds without progress after which a step counts as hung, or 5 times the median step if
    that is longer"""
    slow_phase_seconds: PositiveFloat = 900.0
    """seconds without progress after which the start, a resume, a save or an evaluation counts as
    hung"""

    @property
    def limits(self) -> dict[str, float]:
        """The limits of a `Watchdog` in seconds, by the names of its arguments."""
        return self.model_dump(include={"hang_seconds", "slow_phase_seconds"})


class RunConfig(Section):
    """The run's folder and its seed."""

    dir: str
    """folder for checkpoints, metrics and reports of this run"""
    seed: int = Field(0, ge=0, lt=2**63)
    """seed of the initial weights and of the order of rows"""


class Config(Section):
    """One run, as in one TOML file."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardsConfig = GuardsConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        return raise_all(self, list(cross_problems(self)))

    @property
    def phases(self) -> tuple[PhaseConfig, ...]:
        """All phases in order: the earlier ones, then the last one, given by [data] and [train]."""
        train = self.train
        last = PhaseConfig(
            steps=train.steps - sum(phase.steps for phase in train.earlier_stages),
            seq_len=self.data.seq_len,
            rows_per_step=train.rows_per_step,
            micro_batch=train.micro_batch,
        )
        return (*train.earlier_stages, last)

    def phase_at(self, step: int) -> PhaseConfig:
        """The phase of optimizer step `step` (from 0)."""
        ends = itertools.accumulate(phase.steps for phase in self.phases)
        return next(s for s, end in zip(self.phases, ends, strict=True) if step < end)

    def rows_after(self, step: int) -> int:
        """Number of packed rows in the first `step` steps."""
        rows = 0
        for phase in self.phases:
            steps = min(step, phase.steps)
            rows, step = rows + steps * phase.rows_per_step, step - steps
        return rows

    def check_ranks(self, world_size: int, lengths: Sequence[int] = ()) -> None:
        """Raise UserError unless `parallel.sp` of `world_size` ranks can share these rows.

        Args:
            world_size: number of ranks.
            lengths: row lengths in tokens.
        """
        try:
            check_world(world_size, self.parallel.sp)
            for length in lengths:
                self.model.check_sharing(length, self.parallel.sp)
        except ValueError as error:
            raise UserError(f"parallel.sp: {error}") from None

    def check_world(self, world_size: int) -> None:
        """Raise UserError unless `world_size` ranks can share the work of this configuration."""
        if world_size < 1:
            raise UserError(f"ranks: must be at least 1, got {world_size}")
        self.check_ranks(world_size)
        dp = world_size // self.parallel.sp
        problems = []
        for number, phase in enumerate(self.phases):
            rows, micro = phase.rows_per_step, phase.micro_batch
            is_last = number == len(self.train.earlier_stages)
            where = "train" if is_last else f"train.earlier_stages.{number}"
            if rows % (dp * micro):
                problems.append(
                    f"{where}.rows_per_step: must be a multiple of dp {dp} x micro_batch {micro}, "
                    f"got {rows} (nearest: {max(1, round(rows / (dp * micro))) * dp * micro})"
                )
        if problems:
            raise UserError(*problems)
