"""Memory of weights, gradients and Adam state on one rank, and of what DeepSpeed moves them in.

Read in the source of DeepSpeed 0.19.8 for the JSON that `tensorlm/engine.py` gives it (bf16 with
float32 accumulation and communication, or fp32), and compared with its tensors by the tests. In
bytes; letters as in `job.py`.
"""

from .job import MASTER, Job

_CHUNK = 1 << 25  # elements that LowMemoryAdamW updates at one time (adamw.py)


def weights(job: Job) -> int:
    """w P; a shard in stage 3, where small parameters are kept whole beside it."""
    if job.zero == 0:
        return job.itemsize * job.parameters
    if job.zero < 3:
        return job.itemsize * job.shard * job.gpus
    small = sum(w.total for w in job.weights if w.numel <= job.limits.persistent)
    return job.itemsize * (job.shard + (small if job.gpus > 1 else 0))


def master_weights(job: Job) -> int:
    """4 P / N: the float32 weights that AdamW updates; stage 0 updates the working weights."""
    return MASTER * job.shard if job.zero and not job.offloads_optimizer else 0


def moment_bytes(job: Job) -> int:
    """Bytes of both moments of one parameter."""
    return 8 if job.config.optim.state_dtype == "fp32" else 4


def moments(job: Job) -> int:
    """8 P / N, or 4 P / N in bf16: AdamW's two moments."""
    return 0 if job.offloads_optimizer else moment_bytes(job) * job.shard


def gradients(job: Job, computed: int) -> int:
    """Gradients of weights that exist when those of `computed` elements have been computed.

    Stage 0: w of each. Stage 1: 4 P from the start, and w of each until the update. Stage 2:
    4 P / N once any were reduced. Stage 3: 4 P / N from the start.
    """
    if job.zero == 0:
        return job.itemsize * (computed if job.micro_batches == 1 else job.parameters)
    if job.zero == 1:
        return MASTER * job.shard * job.gpus + job.itemsize * computed
    if job.zero == 2:
        return MASTER * job.shard if computed > job.limits.reduce_bucket else 0
    return 0 if job.offloads_optimizer else MASTER * job.shard


def reduce_bucket(job: Job) -> int:
    """Stage 3: 4 bytes of each element of the bucket, for good. Stage 2: w, in the backward."""
    if job.zero == 3:
        return MASTER * job.limits.reduce_bucket
    return job.itemsize * job.limits.reduce_bucket if job.zero == 2 else 0


def reduction(job: Job, elements: int) -> int:
    """What reducing the gradients of `elements` elements of one bucket needs beside it.

    Stage 3 orders them by rank, in float32. Stage 2 does so in w bytes, then casts. A gradient that
    is larger than the bucket is cast alone.
    """
    if elements > job.limits.reduce_bucket:
        return (job.itemsize + MASTER) * elements
    if job.zero == 3:
        return MASTER * elements
    return (job.itemsize + MASTER) * elements if job.zero == 2 else 0


def gathered_weights(job: Job, needed: int) -> int:
    """Stage 3: whole weights while they are used: `needed` elements, some fetched ahead, twice for
    a moment, and those of the last blocks, which stay from forward to backward.
    """
    if job.zero < 3 or job.gpus == 1:
        return 0
    limits = job.limits
    ahead = limits.prefetch + job.block // 4
    passes = 3 if job.recomputes else 2
    kept = max(0, limits.max_reuse - 2 * job.table) // passes
    return job.itemsize * min(job.parameters, needed + 2 * ahead + kept)
