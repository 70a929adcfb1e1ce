# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel of the output head: losses of logits, which it overwrites with their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # logits in registers at a time


def losses_and_gradients(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Cross-entropy of each token, and in place of `logits` the gradient of their sum.

    Softmax and losses are computed in float32, whatever the dtype of the logits.

    Args:
        logits: [n, V], contiguous; overwritten.
        labels: [n] int64; `ignored` for a loss and gradients of 0.
        ignored: this label.

    Returns:
        [n] float32.
    """
    assert logits.is_contiguous()
    num_tokens, size = logits.shape
    losses = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(size))
    if num_tokens:
        _loss_kernel[(num_tokens,)](
            logits, labels, losses, size, ignored, BLOCK=block, num_warps=8
        )  # fmt: skip
    return losses


@triton.jit
def _loss_kernel(logits, labels, losses, size, ignored, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * size
    label = tl.load(labels + token)
    is_counted = label != ignored
    # Before the reductions below, which wait for all threads: later the gradient is here.
    at_label = tl.load(row + label, mask=is_counted, other=0.0).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    # Each lane keeps its own maximum and sum; they are joined once, after the loop.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        value = tl.load(row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, value)
        # A lane beyond the end of a row has seen nothing yet: avoid inf - inf.
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - shift) + tl.exp(value - shift)
        largest = new
    top = tl.max(largest)
    denominator = tl.sum(total * tl.exp(largest - top))
    tl.store(losses + token, tl.where(is_counted, tl.log(denominator) - (at_label - top), 0.0))
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        value = tl.load(row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        softmax = tl.exp(value - top) / denominator
        gradient = softmax - tl.where(start + columns == label, 1.0, 0.0)
        gradient = tl.where(is_counted, gradient, 0.0)
        tl.store(row + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)
