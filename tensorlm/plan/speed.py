"""Time of one optimizer step: operations and bytes, divided by the rates of a GPU and its links.

Times are in seconds per rank. `gpus.py` has the rates; each part states what it overlaps with.
docs/planning.md compares predictions with real steps.
"""

from dataclasses import dataclass
from functools import cache

import torch

from tensorlm.config import LayerKind, ModelConfig
from tensorlm.model.flops import (
    choice_flops,
    layer_flops_per_token,
    layer_pairs,
    linear_flops_per_token,
    recomputed_linear_flops_per_token,
    repeated_kinds,
)

from . import activations as act
from .exchange import Machine, project
from .gpus import (
    BANDWIDTH_SHARE,
    CHOICE_SHARE,
    FLOAT8_SHARE,
    FOLDED_SHARE,
    FULL_SHARE,
    HOST_BANDWIDTH,
    LINK_SHARE,
    MATMUL_SHARE,
    ROUTED_SHARE,
    SWAP_SHARE,
    WINDOW_SHARE,
    ZERO_SHARE,
    Gpu,
)
from .job import FP32, Job

# 10 H D FLOPs for each (query, key) pair, against 4 in the forward pass (kernels/README.md).
BACKWARD_PER_FORWARD = 2.5
# Bytes that operations other than matrix products read and write in bf16, (forward, backward),
# counted in tensorlm/model. Per token and element of the hidden size (two norms, residuals), of
# SwiGLU's width, and of the vocabulary (forward plus backward). Keys: whether Liger runs.
HIDDEN_TRAFFIC = {False: (2 * 36 + 12, 2 * 92 + 30), True: (2 * 4 + 12, 2 * 6 + 30)}
MLP_TRAFFIC = {False: (10, 18), True: (6, 10)}
LOGIT_TRAFFIC = {False: 30, True: 8}  # keys: whether the loss kernel runs
# Per element of the head's weight and chunk of tokens; the product itself adds it.
HEAD_GRADIENT_TRAFFIC = 8
# Bytes per parameter of the update, the norm and clipping; then the same for torch's AdamW on the
# CPU.
UPDATE_TRAFFIC = {"fp32": 70, "bf16": 62}
HOST_UPDATE_TRAFFIC = 110


@dataclass(frozen=True)
class StepTime:
    """Seconds of each part, which do not overlap, and the resulting rates."""

    parts: dict[str, float]
    tokens: int  # of the whole step, on all ranks
    model_flops: float  # of the whole step, without recomputation
    peak_flops: float  # of all ranks together

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        return self.model_flops / self.seconds / self.peak_flops


def step_time(job: Job, gpu: Gpu) -> StepTime:
    """Time of one optimizer step, with one document per row."""
    model, tokens = job.config.model, job.micro_batches * job.tokens
    attention, choice = sum(_attention_flops(job, kind) for kind in job.kinds), _choice_flops(job)
    seconds = [_attention_seconds(job, kind, gpu) for kind in job.kinds]
    linear = linear_flops_per_token(model) * tokens
    parts = {
        "products": 3 * tokens * _product_seconds(job, gpu),
        "attention": sum(map(sum, seconds)) + choice / (gpu.flops * CHOICE_SHARE),
        "other_operations": _traffic(job) * tokens / (gpu.bandwidth * BANDWIDTH_SHARE),
        "recomputation": _recomputation(job, gpu),
        "activation_transfers": _activation_transfers(job, gpu),
        "weight_exchange": _weight_exchange(job, gpu),
        "row_exchange": _row_exchange(job, gpu),
        "update": _update(job, gpu),
    }
    return StepTime(
        parts,
        tokens=job.phase.rows_per_step * job.phase.seq_len,
        model_flops=(3.0 * (linear + attention) + choice) * job.gpus,
        peak_flops=gpu.flops * job.gpus,
    )


def _product_seconds(job: Job, gpu: Gpu) -> float:
    """Seconds of one token's products with weights in the forward pass."""
    model = job.config.model
    head = 2 * model.hidden_size * model.vocab_size
    layers = linear_flops_per_token(model) - head
    return head / (gpu.flops * MATMUL_SHARE) + layers / (gpu.flops * _layer_share(job))


def _layer_share(job: Job) -> float:
    """FLOP/s of products with the weights of layers, as a share of the peak."""
    return FLOAT8_SHARE.get(job.config.train.linear, MATMUL_SHARE)


def _attention_flops(job: Job, kind: LayerKind) -> float:
    """Forward FLOPs of one layer of this kind, in one step of one rank."""
    return _pair_flops(job, _row_pairs(job.config.model, kind, job.phase.seq_len))


def _pair_flops(job: Job, row_pairs: int) -> float:
    """Forward FLOPs of `row_pairs` (query, key) pairs per row, in one step of one rank."""
    model, rows = job.config.model, job.phase.micro_batch * job.micro_batches
    return 4.0 * model.num_heads * model.head_size * row_pairs * rows / job.sp


def _choice_flops(job: Job) -> float:
    """FLOPs of the choice in all routed layers, in one step of one rank."""
    rows = job.phase.micro_batch * job.micro_batches
    return _row_choice(job.config.model, job.phase.seq_len) * rows / job.sp


@cache
def _row_pairs(model: ModelConfig, kind: LayerKind, seq_len: int) -> int:
    return layer_pairs(model, kind, torch.arange(seq_len)[None])


@cache
def _row_choice(model: ModelConfig, seq_len: int) -> int:
    return choice_flops(model, torch.arange(seq_len)[None])


def _attention_seconds(job: Job, kind: LayerKind, gpu: Gpu) -> tuple[float, float]:
    """Seconds of one layer's forward and backward, without the choice.

    A routed layer is a window and a routed hop.
    """
    shares = {"full": FULL_SHARE, "strided": FOLDED_SHARE, "window": WINDOW_SHARE}
    if kind == "routed":
        near = _attention_flops(job, "window")
        parts = [(near, WINDOW_SHARE), (_attention_flops(job, "routed") - near, ROUTED_SHARE)]
    else:
        parts = [(_attention_flops(job, kind), shares[kind])]
    forward = sum(flops / share[0] for flops, share in parts) / gpu.flops
    backward = sum(flops / share[1] for flops, share in parts) / gpu.flops
    return forward, BACKWARD_PER_FORWARD * backward


def _traffic(job: Job) -> float:
    """Bytes per token of all operations other than matrix products, forward and backward."""
    model = job.config.model
    gradient = HEAD_GRADIENT_TRAFFIC * job.table / min(job.config.train.loss_chunk, job.tokens)
    head = LOGIT_TRAFFIC[job.runs_loss_kernel] * model.vocab_size + gradient
    return job.itemsize / 2 * (sum(_layer_traffic(job)) * model.num_layers + head)


def _layer_traffic(job: Job) -> tuple[float, float]:
    """Bytes per token of one layer in bf16: forward, backward."""
    hidden, width = HIDDEN_TRAFFIC[job.runs_liger], MLP_TRAFFIC[job.runs_liger]
    model = job.config.model
    forward, backward = (
        h * model.hidden_size + w * model.intermediate_size
        for h, w in zip(hidden, width, strict=True)
    )
    return forward, backward


def _recomputation(job: Job, gpu: Gpu) -> float:
    """Seconds of recomputation: products, attention and the rest of the forward pass."""
    model, tokens = job.config.model, job.micro_batches * job.tokens
    again = repeated_kinds(model, job.interval)
    products = recomputed_linear_flops_per_token(model, job.recompute, act.is_tiled(job))
    products += len(again) * layer_flops_per_token(model)
    seconds = products * tokens / (gpu.flops * _layer_share(job))
    if job.recomputes:
        layers = model.num_layers + len(again)
        traffic = job.itemsize / 2 * layers * _layer_traffic(job)[0] * tokens
        seconds += traffic / (gpu.bandwidth * BANDWIDTH_SHARE)
    repeated = again
    if job.recompute == "block":
        repeated = [*again, *job.kinds]
    elif job.recompute == "attention":
        repeated = ["window" for kind in job.kinds if kind == "routed"]
    seconds += sum(_attention_seconds(job, kind, gpu)[0] for kind in repeated)
    return seconds


def _layers_again(job: Job) -> int:
    """Number of layers that run once more in the backward pass, before recomputation."""
    return len(repeated_kinds(job.config.model, job.interval))


def _activation_transfers(job: Job, gpu: Gpu) -> float:
    """Seconds of copying hidden states to the host and back, beyond a block's forward time."""
    if not job.offloads_activations:
        return 0.0
    linear = linear_flops_per_token(job.config.model) * job.tokens / job.layers
    one_way = act.hidden_state(job) / (gpu.host_link * LINK_SHARE)
    exposed = max(0.0, one_way - linear / (gpu.flops * MATMUL_SHARE))
    return 2 * exposed * job.groups * job.micro_batches


def _weight_exchange(job: Job, gpu: Gpu) -> float:
    """Seconds of ZeRO's exchanges over all ranks; none overlaps (engine.py: overlap_comm is off).

    Stages 0 and 1 all-reduce float32 gradients once per step, stage 2 in every micro-batch. Stages
    1 and 2 gather weights after the update. Stage 3 gathers them for every forward and backward
    pass, and reduce-scatters gradients. A ring over nodes uses all network adapters of a node.
    """
    all_reduce, gather = 2 * FP32, job.itemsize
    per_micro_batch = {2: all_reduce, 3: FP32 + 2 * gather}.get(job.zero, 0)
    per_step = {0: all_reduce, 1: all_reduce + gather, 2: gather}.get(job.zero, 0)
    sent = (per_micro_batch * job.micro_batches + per_step) * job.parameters
    if job.zero == 3:
        sent += gather * job.block * _layers_again(job) * job.micro_batches
    link = gpu.nvlink * ZERO_SHARE
    if job.gpus > gpu.per_node:
        link = min(link, gpu.network * gpu.per_node * LINK_SHARE)
    return sent * (job.gpus - 1) / job.gpus / link


def _row_exchange(job: Job, gpu: Gpu) -> float:
    """Seconds of sequence parallelism's exchanges that hop 1 does not hide.

    The formula is in docs/sequence_parallelism.md.
    """
    if job.sp == 1:
        return 0.0
    machine = Machine(
        gpu.per_node, gpu.nvlink * SWAP_SHARE, gpu.network * LINK_SHARE,
        flops=gpu.flops * FOLDED_SHARE[0],
    )  # fmt: skip
    data = job.config.data.model_copy(update={"seq_len": job.phase.seq_len})
    config = job.config.model_copy(update={"data": data})
    layer = project(config, job.sp, machine).exposed_seconds
    # Recomputation repeats the forward half.
    passes = job.layers * (1.5 if job.recomputes else 1.0) + 0.5 * _layers_again(job)
    return layer * passes * job.phase.micro_batch * job.micro_batches


def _update(job: Job, gpu: Gpu) -> float:
    """Seconds of AdamW on this rank's shard; if offloaded, on the host, with copies both ways."""
    if job.offloads_optimizer:
        moved = (FP32 + job.itemsize) * job.shard / (gpu.host_link * LINK_SHARE)
        return moved + HOST_UPDATE_TRAFFIC * job.shard / HOST_BANDWIDTH
    traffic = UPDATE_TRAFFIC[job.config.optim.state_dtype]
    return traffic * job.shard / (gpu.bandwidth * BANDWIDTH_SHARE)
