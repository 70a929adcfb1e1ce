"""GPU memory of one rank: what exists at the same time, at each moment of a step."""

from dataclasses import dataclass

from tensorlm.config import LayerKind

from . import activations as act
from . import evaluation, prompts, state
from .job import Job
from .operator import OperatorMemory

# PyTorch's allocator reserves more than the tensors need, since free blocks do not fit all
# requests. Measured: 0.2 to 5 %, and 8 % in a step of 10 GiB (docs/planning.md).
ALLOCATOR_SLACK = 0.04
# Outside the allocator: CUDA's context and kernels, 1.65 GiB measured in a step of the 8B model,
# and with several ranks NCCL's buffers (an assumption).
CUDA_CONTEXT = 1700 << 20
NCCL_BUFFERS = 1 << 30


@dataclass(frozen=True)
class Snapshot:
    """A moment of a step, and the bytes of each part at that moment, by name of its function."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class GpuMemory:
    """Memory at all moments of a job, in bytes per rank."""

    snapshots: tuple[Snapshot, ...]
    gpus: int

    @property
    def peak(self) -> Snapshot:
        return max(self.snapshots, key=lambda snapshot: snapshot.total)

    @property
    def allocated(self) -> int:
        """Bytes in tensors at the peak: `torch.cuda.max_memory_allocated`."""
        return self.peak.total

    @property
    def overhead(self) -> int:
        """Bytes beyond tensors: the allocator's slack, CUDA and NCCL."""
        outside = CUDA_CONTEXT + (NCCL_BUFFERS if self.gpus > 1 else 0)
        return round(self.allocated * ALLOCATOR_SLACK) + outside

    @property
    def needed(self) -> int:
        """Bytes that the GPU must have."""
        return self.allocated + self.overhead


def gpu_memory(job: Job, operators: dict[LayerKind, OperatorMemory] | None = None) -> GpuMemory:
    """Memory at the start and at all moments of a step.

    Args:
        job: the job.
        operators: memory of the attention operator by kind of layer (default: that of the Triton
            kernels).
    """
    operators = operators or act.operators_of(job)
    layers = job.layers
    # The last block of a group has most inputs beside it.
    whole_groups = layers - layers % job.interval
    snapshots = [
        Snapshot("start", {"initialisation": state.initialisation(job)}),
        _loss(job, operators),
        _head_gradient(job, operators),
        *(_block(job, operators, left) for left in sorted({layers, whole_groups, 1})[::-1] if left),
        _embedding(job),
        _update(job),
    ]
    done = _blocks_before_reductions(job)
    # From one reduction to the next, gradients grow and saved activations shrink, both linearly:
    # the largest sum is at the first or the last.
    for blocks in sorted({*done[:1], *done[-1:]}):
        snapshots.append(_block(job, operators, layers - blocks, job.limits.reduce_bucket))
    return GpuMemory(tuple(snapshots), job.gpus)


def evaluation_memory(job: Job) -> dict[int, GpuMemory]:
    """Memory of perplexity between two steps, by window length; empty if it is not measured."""
    memories = {}
    for windows in evaluation.window_jobs(job):
        length = windows.phase.seq_len
        parts = _between_steps(windows) | _inputs(windows)
        parts |= {
            "gathered_weights": state.gathered_weights(windows, windows.block),
            "pass_peak": evaluation.pass_peak(windows, act.operators_of(windows)),
        }
        snapshot = Snapshot(f"perplexity at {length:,} tokens", parts)
        memories[length] = GpuMemory((snapshot,), job.gpus)
    return memories


def prompt_memory(job: Job) -> dict[int, GpuMemory]:
    """Memory of prompts between two steps, by length; empty if no task has prompts."""
    memories = {}
    for length in prompts.prompt_lengths(job):
        prompt = prompts.PromptPass(job, length)
        parts = _between_steps(job) | {
            "rotary_table": act.rotary_table(job, length + length // 4),
            "cache": prompts.cache(prompt),
            "prompt_pass": prompts.prompt_pass(prompt),
        }
        snapshot = Snapshot(f"prompts of {length:,} tokens", parts)
        memories[length] = GpuMemory((snapshot,), job.gpus)
    return memories


def _between_steps(job: Job) -> dict[str, int]:
    """What exists while the model is evaluated during training."""
    return _resting(job) | {
        "gradients": state.gradients(job, 0),
        "reduce_bucket": state.reduce_bucket(job) if job.zero == 3 else 0,
    }


def _resting(job: Job) -> dict[str, int]:
    """What exists at all times."""
    return {
        "weights": state.weights(job),
        "master_weights": state.master_weights(job),
        "moments": state.moments(job),
        "offload_buffer": state.offload_buffer(job),
        "library_workspace": job.platform.library_workspace,
    }


def _with_gradients(job: Job, computed: int) -> dict[str, int]:
    """`_resting` and gradients, after `computed` elements of the last micro-batch."""
    reduces_all = job.micro_batches > 1 or computed == job.parameters
    grads = state.gradients(job, job.parameters if reduces_all else computed, reduces_all)
    return _resting(job) | {"gradients": grads, "reduce_bucket": state.reduce_bucket(job)}


def _inputs(job: Job) -> dict[str, int]:
    return {"rotary_table": act.rotary_table(job), "batch": act.batch(job)}


def _loss(job: Job, operators: dict[LayerKind, OperatorMemory]) -> Snapshot:
    parts = _with_gradients(job, 0) | _inputs(job)
    if job.zero != 3:
        parts["reduce_bucket"] = 0  # allocated with the first gradient
    return Snapshot(
        "loss",
        parts
        | {
            "gathered_weights": state.gathered_weights(job, job.table),
            "saved_activations": act.saved_activations(job, operators, job.layers, False),
            "head_peak": act.head_peak(job),
        },
    )


def _head_gradient(job: Job, operators: dict[LayerKind, OperatorMemory]) -> Snapshot:
    """The first gradient, which is reduced at once if the bucket is too small for it."""
    large = job.table > job.limits.reduce_bucket
    reduction = state.reduction(job, job.table) if large else 0
    return Snapshot(
        "backward of the head",
        _with_gradients(job, job.table)
        | _inputs(job)
        | {
            "gathered_weights": state.gathered_weights(job, job.table),
            "saved_activations": act.saved_activations(job, operators, job.layers, False),
            "head_gradient": act.head_gradient(job, reduction),
        },
    )


def _block(
    job: Job, operators: dict[LayerKind, OperatorMemory], left: int, reduced: int = 0
) -> Snapshot:
    """Backward of block `left` (from 1); `left - 1` blocks still follow."""
    layers = job.layers
    computed = job.table + (layers - left) * job.block
    reduction = state.reduction(job, reduced)
    is_reducing = " while gradients are reduced" if reduced else ""
    # Without recomputation, what this block has kept is part of its own peak.
    before = left if job.recomputes else left - 1
    return Snapshot(
        f"backward of block {left} of {layers}{is_reducing}",
        _with_gradients(job, computed)
        | _inputs(job)
        | {
            "shared_gradient": act.shared_gradient(job),
            "gathered_weights": state.gathered_weights(job, job.block),
            "saved_activations": act.saved_activations(job, operators, before),
            "block_peak": max(
                act.block_peak(job, operators[kind], reduction) for kind in job.kinds[:left]
            ),
        },
    )


def _embedding(job: Job) -> Snapshot:
    """The last gradient, and the reduction of the bucket or of the table alone."""
    elements = min(job.parameters, job.limits.reduce_bucket)
    if job.zero < 2 or job.table > job.limits.reduce_bucket:
        elements = job.table
    return Snapshot(
        "end of the backward",
        _with_gradients(job, job.parameters)
        | _inputs(job)
        | {
            "gathered_weights": state.gathered_weights(job, job.table),
            "embedding_peak": act.embedding_peak(job),
            "reduction": state.reduction(job, elements),
        },
    )


def _update(job: Job) -> Snapshot:
    parts = _with_gradients(job, job.parameters)
    if job.zero != 3:
        parts["reduce_bucket"] = 0
    return Snapshot("update", parts | {"update_workspace": state.update_workspace(job)})


def _blocks_before_reductions(job: Job) -> list[int]:
    """Numbers of blocks after which the bucket is full and is reduced."""
    if job.zero < 2:
        return []
    head = 0 if job.table > job.limits.reduce_bucket else job.table
    room = range(job.limits.reduce_bucket - head, job.layers * job.block, job.limits.reduce_bucket)
    return [elements // job.block for elements in room]
