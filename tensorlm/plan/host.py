"""Host memory of one rank, in bytes: what is offloaded, copied and read ahead."""

from dataclasses import dataclass
from pathlib import Path

from tensorlm.model.offload import EXACT_FROM

from . import activations as act
from .job import FP32, Job
from .state import moment_bytes

# Python, PyTorch and CUDA in one process. An assumption.
PROCESS = 4 << 30
_SAVED_STATE = 3 * FP32  # a background save copies weights and moments in float32


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one rank: by part while it trains, and at the start.

    `mapped` is the size of the token files. A node's ranks share them, and the system can drop them
    from memory.
    """

    parts: dict[str, int]
    start: int
    mapped: int

    @property
    def needed(self) -> int:
        return max(sum(self.parts.values()), self.start)


def host_memory(job: Job) -> HostMemory:
    """Host memory that one rank needs."""
    parts = {
        "process": PROCESS,
        "offloaded_optimizer": offloaded_optimizer(job),
        "offloaded_activations": offloaded_activations(job),
        "checkpoint_copy": checkpoint_copy(job),
        "batches": batches(job),
    }
    return HostMemory(parts, PROCESS + initialisation(job), mapped_data(job))


def pinned(num_bytes: int) -> int:
    """Bytes that PyTorch's pinned allocator takes: it rounds up to a power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def offloaded_optimizer(job: Job) -> int:
    """Weights, gradients, both moments and AdamW's two temporary tensors.

    At ZeRO stage 3 gradients are there twice.
    """
    if not job.offloads_optimizer:
        return 0
    moments = moment_bytes(job) * job.shard
    if job.zero < 3:
        copies = 2 * pinned(FP32 * job.shard) + pinned(job.itemsize * job.shard)
        return copies + pinned(job.itemsize * job.largest) + moments + 2 * FP32 * job.shard
    group = min(job.shard, job.limits.sub_group)
    gradients = pinned(FP32 * job.shard) + -(-job.shard // group) * pinned(FP32 * group)
    return FP32 * job.shard + gradients + moments + 2 * FP32 * group


def offloaded_activations(job: Job) -> int:
    """The hidden states that groups of blocks keep, pinned as in `model.offload.host_buffer`."""
    if not job.offloads_activations:
        return 0
    size = act.hidden_state(job)
    return job.groups * (size if size >= EXACT_FROM else pinned(size))


def checkpoint_copy(job: Job) -> int:
    """12 P / N with background saves: the copy that the thread writes while training continues."""
    if not job.config.checkpoint.background:
        return 0
    owned = job.shard if job.zero else job.parameters // job.gpus
    return _SAVED_STATE * owned


def batches(job: Job) -> int:
    """Batches of the current and the next step."""
    return 2 * job.micro_batches * act.batch(job)


def initialisation(job: Job) -> int:
    """DeepSpeed's stage 3 copies its shard through the host.

    (Drawing random weights takes only 16 MiB at a time.)
    """
    return job.itemsize * job.shard if job.zero == 3 else 0


def mapped_data(job: Job) -> int:
    """Bytes of the training split's token files; 0 if they are not on this machine."""
    folders = [Path(source.path) / "train" for source in job.config.data.all_sources]
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.tokens"))
