"""Memory of perplexity during training: forward passes over whole windows.

Windows are batched as in `tensorlm/evaluation/perplexity.py`.
"""

import dataclasses

from tensorlm.config import LayerKind
from tensorlm.config.evaluation import windows_at_once

from . import activations as act
from .job import FP32, Job
from .operator import OperatorMemory, sizes


def window_jobs(job: Job) -> list[Job]:
    """The passes of an evaluation, one per length: `job` with the windows as its rows."""
    settings = job.config.eval
    if not settings.every or "ppl" not in settings.tasks:
        return []
    lengths = sorted(settings.lengths or (job.config.data.seq_len,))
    span = settings.span_length(lengths)
    phases = [
        job.phase.model_copy(
            update={"seq_len": length, "micro_batch": windows_at_once(span, length)}
        )
        for length in lengths
    ]
    return [dataclasses.replace(job, phase=phase) for phase in phases]


def pass_peak(job: Job, operators: dict[LayerKind, OperatorMemory]) -> int:
    """Peak of one pass: the largest block, or the output head."""
    return max(*(block_pass(job, operators[kind]) for kind in job.kinds), head_pass(job))


def block_pass(job: Job, operator: OperatorMemory) -> int:
    """Peak of one block: its largest part, with the hidden states that are still needed."""
    x = act.hidden_state(job)
    q, k, _, _ = sizes(job)
    attention = max(operator.forward, 2 * (q + k) + x)  # the last product, with q, k, v
    return max(2 * x + attention, 2 * x + norm_pass(job), 3 * x + mlp_pass(job))


def norm_pass(job: Job) -> int:
    """A norm's output; with PyTorch's operations, also its factors, in float32 at first."""
    x, wide = act.hidden_state(job), FP32 * job.config.model.hidden_size * job.tokens
    if job.runs_liger:
        return x + FP32 * job.tokens
    return 2 * x + 2 * wide if job.itemsize < FP32 else 2 * wide


def mlp_pass(job: Job) -> int:
    """gate, up and their product (PyTorch: silu(gate) too); in tiles also the previous product."""
    tensors = 3 if job.runs_liger else 4
    if not act.is_tiled(job):
        return tensors * act.mlp_width(job, job.tokens)
    tile = act.mlp_width(job, job.config.train.mlp_chunk)
    return act.hidden_state(job) + (tensors + 1) * tile


def head_pass(job: Job) -> int:
    """The last norm with its input, or a chunk's float32 logits and their log-softmax."""
    chunk = min(job.config.train.loss_chunk, job.tokens)
    logits = 2 * FP32 * job.config.model.vocab_size * chunk
    return act.hidden_state(job) + max(norm_pass(job), logits)
