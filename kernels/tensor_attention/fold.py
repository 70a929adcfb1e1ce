"""Folding a sequence: axes, strides, reach, and rotary positions per axis.

A sequence of T tokens is folded into a tensor with axes (n_1, ..., n_m), innermost first. `fold`
lists the inner axes n_1 ... n_(m-1); the outermost axis is open-ended. The mathematics is in
`kernels/README.md`. This file has no imports from the project: it also travels inside exported
Hugging Face folders.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """One folded sequence axis: a hop along it goes from token t to tokens t - j * stride."""

    stride: int
    length: int


class Rotary(NamedTuple):
    """Rotary table for integer positions 0 ... P-1: `cos` and `sin`, each [P, D/2], float32."""

    cos: Tensor
    sin: Tensor


def validate_fold(fold: Sequence[int]) -> None:
    """Raise ValueError unless every inner axis has at least 2 steps."""
    if any(n < 2 for n in fold):
        raise ValueError(f"fold = {list(fold)}: every axis needs a length of at least 2")


def fold_axes(fold: Sequence[int], num_tokens: int) -> list[Axis]:
    """The axes of `fold` over `num_tokens` tokens, innermost first; the last one covers the rest.

    `fold_axes([], T)` is one axis of T steps: full attention.
    """
    validate_fold(fold)
    axes, stride = [], 1
    for length in fold:
        axes.append(Axis(stride, length))
        stride *= length
    axes.append(Axis(stride, max(1, -(-num_tokens // stride))))
    return axes


def document_reach(doc_start: Tensor, stride: int) -> Tensor:
    """How many strides back each token may look inside its document.

    Args:
        doc_start: [B, T] integer, the index in the row of the first token of each token's document.
        stride: stride of the axis, in tokens.

    Returns:
        [B, T] int32, floor((t - doc_start(t)) / stride).
    """
    positions = torch.arange(doc_start.shape[1], device=doc_start.device)
    return ((positions - doc_start) // stride).to(torch.int32)


def document_ahead(doc_start: Tensor, stride: int) -> Tensor:
    """How many strides forward each token may look inside its document ([B, T] int32)."""
    num_tokens = doc_start.shape[1]
    positions = torch.arange(num_tokens, device=doc_start.device)
    is_last = torch.ones_like(doc_start, dtype=torch.bool)
    is_last[:, :-1] = doc_start[:, 1:] != doc_start[:, :-1]
    ends = torch.where(is_last, positions, num_tokens)
    doc_last = ends.flip(1).cummin(1).values.flip(1)
    return ((doc_last - positions) // stride).to(torch.int32)


def line_digit(num_tokens: int, axis: Axis, device: torch.device) -> Tensor:
    """[T] int32: the index of each token within its own line along `axis` (fold mode)."""
    positions = torch.arange(num_tokens, device=device)
    return (positions // axis.stride % axis.length).to(torch.int32)


def apply_rotary(x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
    """Rotate `x` [..., T, H, D] to `positions` [..., T] (integers) by the half-split convention.

    The two halves of D are the real and imaginary parts, as in Hugging Face's Llama. The product
    is taken in the table's precision or that of `x`, whichever is higher, and rounded once.
    """
    dtype = torch.promote_types(x.dtype, rotary.cos.dtype)
    cos = rotary.cos[positions].unsqueeze(-2).to(dtype)
    sin = rotary.sin[positions].unsqueeze(-2).to(dtype)
    real, imag = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((real * cos - imag * sin, imag * cos + real * sin), dim=-1).to(x.dtype)


def rotate_along(x: Tensor, rotary: Rotary, stride: int) -> Tensor:
    """Rotate `x` [B, T, H, D] to the positions floor(t / stride) of one axis."""
    return apply_rotary(x, rotary, torch.arange(x.shape[1], device=x.device) // stride)
