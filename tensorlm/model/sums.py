"""Sums of weight gradients over chunks of tokens, in float32 (or wider)."""

import torch
from torch import Tensor


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, for `total` [m, n] in a dtype at least as wide as that of the factors.

    On a GPU, the product of bf16 factors is added before it is rounded, by the product's own
    kernel.
    """
    if total.is_cuda and total.dtype == torch.float32 and left.dtype == torch.bfloat16:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right
