# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel of `adamw`: one pass over weights, gradients and moments, rounding included."""

import triton
import triton.language as tl
from torch import Tensor

from tensorlm.runtime.stochastic_rounding import FIRST, SECOND, key_words

from .adamw import Factors

_BLOCK = 2048  # elements of one program


def update(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, key: str, first: int,
    by: Factors,
) -> None:  # fmt: skip
    """As `adamw._update`, on a GPU (or in Triton's interpreter), for any number of elements.

    Args:
        weight: [n] float32; overwritten, as are both moments.
        grad: [n].
        mean, square: [n] bf16.
        key, first: as for `random_words`.
        by: numbers of this step.
    """
    start, middle = key_words(key, first)
    size = weight.numel()
    # Without fusion: products and sums round where those of PyTorch's operations on a GPU do.
    _update_kernel[(triton.cdiv(size, _BLOCK),)](
        weight, grad, mean, square, size, start, middle, by.mean_step, by.square_kept,
        by.square_step, 1 / by.square_scale, by.eps, by.weight_kept, -by.rate, FIRST, SECOND,
        BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "middle"])  # they differ in every call
def _update_kernel(
    weight, grad, mean, square, size, start, middle,
    mean_step, square_kept, square_step, square_factor, eps, weight_kept, change,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    # The bits of `random_words`, in unsigned arithmetic.
    words = (at + start).to(tl.uint32)
    words = (words ^ (words >> 16)) * tl.full([], FIRST, tl.uint32)
    words = words ^ middle.to(tl.uint32)
    words = (words ^ (words >> 13)) * tl.full([], SECOND, tl.uint32)
    words = words ^ (words >> 16)

    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.fma(g - m, mean_step, m)
    _store_rounded(mean + at, m, words & 0xFFFF, inside)
    s = tl.load(square + at, mask=inside, other=0.0).to(tl.float32) * square_kept
    s = tl.fma(square_step * g, g, s)
    _store_rounded(square + at, s, words >> 16, inside)
    divisor = tl.sqrt_rn(s) * square_factor + eps
    w = tl.load(weight + at, mask=inside, other=0.0) * weight_kept
    tl.store(weight + at, tl.fma(tl.div_rn(m, divisor), change, w), mask=inside)


@triton.jit
def _store_rounded(to, exact, noise, inside):
    """Rounds as `round_into` does."""
    bits = exact.to(tl.uint32, bitcast=True) + noise
    tl.store(to, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
