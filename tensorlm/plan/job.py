"""The input of all formulas: one phase of a configuration on a number of GPUs.

Letters in the formulas: V vocabulary size, C hidden size, I width of SwiGLU, L layers, H query
heads and K key heads of size D, P parameters, t tokens of one forward pass on one rank, N ranks, w
bytes of a working weight or activation.
"""

from dataclasses import dataclass
from functools import cached_property

from tensorlm.config import Config, LayerKind, PhaseConfig, Recompute
from tensorlm.model.fused import runs_liger
from tensorlm.model.output_head import runs_loss_kernel

FP32 = 4  # bytes of a float32


@dataclass(frozen=True)
class Platform:
    """Differences between a GPU and the CPU on which the tests count tensors."""

    is_gpu: bool = True
    fused_adam: bool = True  # no temporary tensors in the update (optim.py)
    rotates_above: int = 256  # keys per query above which keys are rotated into a copy (tiles.py)
    library_workspace: int = 32 << 20  # of cuBLAS on Hopper, allocated through PyTorch


CUDA = Platform()


@dataclass(frozen=True)
class ZeroLimits:
    """DeepSpeed's limits, in elements; `tensorlm/train/engine.py` keeps the defaults."""

    reduce_bucket: int = 500_000_000
    sub_group: int = 1_000_000_000  # stage 3: elements updated at one time
    prefetch: int = 50_000_000  # stage 3: elements gathered ahead
    max_reuse: int = 1_000_000_000  # stage 3: kept if used again within this many elements
    persistent: int = 100_000  # stage 3: largest parameter that every rank keeps in full


@dataclass(frozen=True)
class Weight:
    """`count` parameters of the same size."""

    numel: int
    count: int
    decays: bool  # which of the optimizer's two groups it is in

    @property
    def total(self) -> int:
        return self.numel * self.count


@dataclass(frozen=True)
class Job:
    """One phase of a run, seen from one rank."""

    config: Config
    gpus: int
    phase: PhaseConfig
    platform: Platform = CUDA
    limits: ZeroLimits = ZeroLimits()

    @property
    def sp(self) -> int:
        return self.config.parallel.sp

    @property
    def dp(self) -> int:
        return self.gpus // self.sp

    @property
    def zero(self) -> int:
        """The ZeRO stage."""
        return self.config.zero.stage

    @property
    def itemsize(self) -> int:
        """w: bytes of one element of the working weights and activations."""
        return 2 if self.config.train.dtype == "bf16" else 4

    @property
    def tokens(self) -> int:
        """t: tokens in one forward pass of one rank."""
        return self.phase.micro_batch * self.phase.seq_len // self.sp

    @property
    def micro_batches(self) -> int:
        """Number of forward passes of one rank in one optimizer step."""
        return max(1, self.phase.rows_per_step // (self.dp * self.phase.micro_batch))

    @property
    def recompute(self) -> Recompute:
        """What backward recomputes; for an unresolved "auto", what needs the least memory."""
        recompute = self.config.train.recompute
        return "block" if recompute == "auto" else recompute

    @property
    def recomputes(self) -> bool:
        """Whether backward recomputes blocks, at least in part."""
        return self.recompute != "none"

    @property
    def interval(self) -> int:
        """Every how many layers one keeps its input."""
        return self.config.train.recompute_interval

    @property
    def groups(self) -> int:
        """Groups of layers, of which the first one keeps its input."""
        return -(-self.layers // self.interval)

    @property
    def runs_liger(self) -> bool:
        """Whether norms and SwiGLU run Liger's kernels; "auto" depends on this installation."""
        return runs_liger(self.config.train.fused_layers, self.platform.is_gpu)

    @property
    def runs_float8(self) -> bool:
        """Whether the layers' matrix products run in float8."""
        return self.config.train.linear != "bf16"

    @property
    def runs_loss_kernel(self) -> bool:
        """Whether one kernel computes the losses and the gradients of logits."""
        return runs_loss_kernel(self.config.train.fused_layers, self.platform.is_gpu)

    @property
    def offloads_activations(self) -> bool:
        """Whether activations are offloaded, which requires recomputation."""
        return self.recomputes and self.config.train.activation_offload

    @property
    def offloads_optimizer(self) -> bool:
        return self.config.zero.offload_optimizer

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """Every parameter of the model."""
        m = self.config.model
        c, heads, key_heads = m.hidden_size, m.num_heads * m.head_size, m.num_kv_heads * m.head_size
        strided = self.kinds.count("strided")
        tables = 1 if m.tie_embeddings else 2
        return (
            Weight(m.vocab_size * c, tables, decays=True),
            Weight(c * heads, 2 * m.num_layers, decays=True),  # q, o
            Weight(c * key_heads, 2 * m.num_layers, decays=True),  # k, v
            Weight(c * m.intermediate_size, 3 * m.num_layers, decays=True),  # gate, up, down
            Weight(c, 2 * m.num_layers + 1, decays=False),  # norms
            *[Weight(len(m.fold) * m.num_heads, 1, decays=False)] * strided,  # hop biases
        )

    @cached_property
    def parameters(self) -> int:
        """P: number of parameters of the model."""
        return sum(weight.total for weight in self.weights)

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return self.config.model.layer_kinds

    @property
    def layers(self) -> int:
        """L: layers of the model."""
        return self.config.model.num_layers

    @property
    def table(self) -> int:
        """V C: elements of the embedding and of the output head, the largest parameters."""
        return self.config.model.vocab_size * self.config.model.hidden_size

    @property
    def block(self) -> int:
        """Elements of the seven matrices of one block."""
        matrices = self.weights[1:4]
        return sum(weight.total for weight in matrices) // self.config.model.num_layers

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(weight.numel for weight in self.weights)

    @cached_property
    def shard(self) -> int:
        """Elements that one rank updates: about P / N, with DeepSpeed's padding."""
        if self.zero == 0:
            return self.parameters
        if self.zero == 3:  # each parameter is cut into equal parts
            return sum(w.count * -(-w.numel // self.gpus) for w in self.weights)
        align = 2 * self.gpus  # each of the two groups is one flat buffer
        groups = [
            sum(w.total for w in self.weights if w.decays == which) for which in (True, False)
        ]
        return sum(-(-numel // align) * 2 for numel in groups)


def plan_jobs(
    config: Config,
    gpus: int,
    platform: Platform = CUDA,
    limits: ZeroLimits = ZeroLimits(),
) -> list[Job]:
    """One job for each phase of the run.

    Raises:
        UserError: `gpus` ranks cannot share its work.
    """
    config.check_world(gpus)
    return [Job(config, gpus, phase, platform, limits) for phase in config.phases]
