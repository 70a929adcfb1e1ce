"""Memory of weights, gradients and Adam state on one rank, and of DeepSpeed's buffers for them.

Taken from the source of DeepSpeed 0.19.8, for the settings of `tensorlm/train/engine.py` (bf16 with
float32 accumulation and communication, or fp32). The tests compare it with DeepSpeed's tensors. All
sizes are in bytes; letters as in `job.py`.
"""

from .job import FP32, Job

DOUBLE = 8  # DeepSpeed computes norms in float64 at stages 2 and 3, parameter by parameter
_ALL_REDUCE = 500_000_000  # elements of a message of stage 0 (DeepSpeed's engine)
_ADAM_CHUNK = 1 << 24  # elements that LowMemoryAdamW updates at one time (adamw.py)


def weights(job: Job) -> int:
    """w P; at stage 3 a shard, and small parameters in full."""
    if job.zero == 0:
        return job.itemsize * job.parameters
    if job.zero < 3:
        return job.itemsize * job.shard * job.gpus
    small = sum(w.total for w in job.weights if w.numel <= job.limits.persistent)
    return job.itemsize * (job.shard + (small if job.gpus > 1 else 0))


def master_weights(job: Job) -> int:
    """4 P / N: the float32 weights that AdamW updates; stage 0 has no separate ones."""
    return FP32 * job.shard if job.zero and not job.offloads_optimizer else 0


def moment_bytes(job: Job) -> int:
    """Bytes of both moments of one parameter."""
    return 8 if job.config.optim.state_dtype == "fp32" else 4


def moments(job: Job) -> int:
    """8 P / N, or 4 P / N in bf16: AdamW's two moments."""
    return 0 if job.offloads_optimizer else moment_bytes(job) * job.shard


def gradients(job: Job, computed: int, reduced: bool = False) -> int:
    """Gradients of weights, after those of `computed` elements have been computed.

    Stage 0, and stage 1 in float32: 4 bytes per computed element until the update. Stage 1 in bf16:
    4 P from the start. Stage 2: 4 P / N after the first reduction of the bucket. Stage 3: 4 P / N
    from the start, on the host if offloaded.
    """
    if job.zero == 3:
        return 0 if job.offloads_optimizer else FP32 * job.shard
    if job.zero == 2:
        return FP32 * job.shard if reduced or computed > job.limits.reduce_bucket else 0
    if accumulates_apart(job):
        return FP32 * job.shard * job.gpus
    return FP32 * computed


def accumulates_apart(job: Job) -> bool:
    """Whether DeepSpeed's BF16_Optimizer keeps a float32 gradient of each weight: stage 1, bf16."""
    return job.zero == 1 and job.itemsize < FP32 and not job.offloads_optimizer


def reduce_bucket(job: Job) -> int:
    """The reduce bucket.

    Stage 3: 4 bytes per element of the bucket, at all times. During backward only: w bytes at stage
    2, and 4 bytes at stage 1 unless it keeps separate float32 gradients.
    """
    if job.zero == 0 or accumulates_apart(job):
        return 0
    return (job.itemsize if job.zero == 2 else FP32) * job.limits.reduce_bucket


def offload_buffer(job: Job) -> int:
    """w bytes per element of the largest parameter: stages 1 and 2 with an offloaded optimizer."""
    return job.itemsize * job.largest if job.offloads_optimizer and job.zero < 3 else 0


def reduction(job: Job, elements: int) -> int:
    """What reducing `elements` elements needs in addition to the bucket; nothing below stage 2.

    Stage 3 orders them by rank in float32. Stage 2 orders them in w bytes and casts the result to
    float32. A gradient larger than the bucket is cast alone. On a CPU, gloo scatters a copy.
    """
    if job.zero < 2:
        return 0
    is_alone = elements > job.limits.reduce_bucket
    if job.zero == 3:
        return (FP32 if job.platform.is_gpu else 2 * FP32) * elements
    is_ordered = not (is_alone and job.gpus == 1)
    return (FP32 + (job.itemsize if is_ordered else 0)) * elements


def gathered_weights(job: Job, needed: int) -> int:
    """Gathered weights at stage 3; 0 at other stages.

    These are `needed` elements, prefetched ones (twice for a moment), and those of the last blocks,
    which stay from forward to backward.
    """
    if job.zero < 3 or job.gpus == 1:
        return 0
    limits = job.limits
    ahead = limits.prefetch + job.block // 4
    passes = 3 if job.recomputes else 2
    kept = max(0, limits.max_reuse - 2 * job.table) // passes
    return job.itemsize * min(job.parameters, needed + 2 * ahead + kept)


def update_workspace(job: Job) -> int:
    """Temporary tensors of the update: a norm in float64, joined gradients, AdamW's workspace."""
    norm = 0
    if job.zero == 3:
        norm = DOUBLE * -(-job.largest // job.gpus)
    elif job.zero and not accumulates_apart(job):
        norm = DOUBLE * min(job.largest, job.shard)
    if job.offloads_optimizer:
        return norm
    if job.zero == 0:
        copied = FP32 * min(job.parameters, _ALL_REDUCE)
        return max(copied, adam_workspace(job, job.largest))
    together = min(job.shard, job.limits.sub_group) if job.zero == 3 else job.shard
    is_copied = job.zero == 3 or job.itemsize == FP32
    return max(norm, (FP32 * together if is_copied else 0) + adam_workspace(job, together))


def adam_workspace(job: Job, elements: int) -> int:
    """AdamW's workspace: two float32 tensors if it is not fused.

    With bf16 moments, on a CPU: four tensors of 4 bytes per element, for one parameter or chunk at
    a time. On a GPU, one kernel updates without temporary tensors.
    """
    if job.platform.is_gpu and job.config.optim.state_dtype == "bf16":
        return 0
    if job.config.optim.state_dtype == "bf16":
        piece = -(-job.largest // job.gpus) if job.zero == 3 else job.largest
        return 4 * FP32 * min(elements, piece, _ADAM_CHUNK)
    return 0 if job.platform.fused_adam else 2 * FP32 * elements


def initialisation(job: Job) -> int:
    """w P: the whole model before DeepSpeed divides it. Stages 1 and 2 copy it into one buffer.

    Stage 3 creates and divides one parameter at a time, and gathers each once more when all state
    except the moments exists.
    """
    w = job.itemsize
    if job.zero in (1, 2):
        return 2 * w * job.parameters
    if job.zero == 0:
        return w * job.parameters
    divided = weights(job) + master_weights(job) + gradients(job, 0) + reduce_bucket(job)
    return w * job.largest + divided
