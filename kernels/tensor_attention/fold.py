"""Folding a sequence: axes, strides, reach, and rotary positions per axis.

A sequence of T tokens is folded into a tensor with axes (n_1, ..., n_m), innermost first. `fold`
lists the inner axes n_1 ... n_(m-1); the outermost axis is open-ended. The mathematics is in
`kernels/README.md`. This file imports nothing from the project, because exported Hugging Face
folders contain it.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The score of a masked key, and a lower bound of all other scores. Finite, so that a token without
# any key has a gradient of zero instead of NaN.
MASKED, FLOOR = -1e30, -1e20


class Axis(NamedTuple):
    """One folded sequence axis: a hop along it goes from token t to tokens t - j * stride."""

    stride: int
    length: int


class Rotary(NamedTuple):
    """Rotary table for integer positions 0 ... P-1: `cos` and `sin`, each [P, D/2], float32.

    `rotary_table` makes a table whose angles are exact at any position.
    """

    cos: Tensor
    sin: Tensor


State = tuple[Tensor, Tensor]


class HopInputs(NamedTuple):
    """The inputs of one hop (B batch, T tokens, H query heads, K key heads, D and E head sizes).

    q: [B, T, H, D].
    k: [B, T, K, D]; query head h reads key head h // (H / K).
    values: [B, T, K or H, E].
    stride: stride of the axis, in tokens.
    length: number of steps of the axis.
    reach: [B, T] int32, number of strides that each token may look back; below 0: no token, not
        even itself.
    bias: [H] or None, added to every score of this hop.
    state: (z [B, T, H, E], lse [B, T, H]) of the previous hop, or None for the first hop.
    rotary: table that rotates q and k to position floor(t / stride); None: already rotated.
    scale: factor on the scores, 1 / sqrt(D) by default.
    ahead: [B, T] int32, number of strides that each token may look ahead; None: causal.
    """

    q: Tensor
    k: Tensor
    values: Tensor
    stride: int
    length: int
    reach: Tensor
    bias: Tensor | None = None
    state: State | None = None
    rotary: Rotary | None = None
    scale: float | None = None
    ahead: Tensor | None = None

    @property
    def score_scale(self) -> float:
        """The factor on the scores, 1 / sqrt(D) by default."""
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale


def validate_fold(fold: Sequence[int]) -> None:
    """Raise ValueError unless every inner axis has at least 2 steps."""
    if any(n < 2 for n in fold):
        raise ValueError(f"fold must be a list of lengths of at least 2, got {list(fold)}")


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
    """Number of strides that each token may look back inside its document.

    Args:
        doc_start: [B, T] integer, the index in the row of the first token of each token's document.
            An index after t counts as t, one before the row as 0.
        stride: stride of the axis, in tokens.

    Returns:
        [B, T] int32, floor((t - doc_start(t)) / stride).
    """
    positions = torch.arange(doc_start.shape[1], device=doc_start.device)
    depth = torch.minimum((positions - doc_start).clamp(min=0), positions)
    return (depth // stride).to(torch.int32)


def document_ahead(doc_start: Tensor, stride: int) -> Tensor:
    """Number of strides that each token may look ahead inside its document ([B, T] int32)."""
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


def rotary_frequencies(
    head_size: int,
    theta: float,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Radians per position of each rotary pair, theta ** (-2 i / D).

    Args:
        head_size: D.
        theta: base of the frequencies.
        scaling: how the context was extended, with Hugging Face's keys: `rope_type` "linear"
            divides all frequencies by `factor`, "llama3" only those with long wavelengths, with a
            smooth transition (Llama 3.1); None or "default" changes nothing.
        device: device of the table, so that no copy from another device is waited for.

    Returns:
        [D/2] float64, on the CPU if the device has no float64.

    Raises:
        ValueError: the `rope_type` is not supported.
    """
    exact = _with_float64(torch.device(device))
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device=exact) / head_size
    frequencies = 1.0 / theta**exponents
    kind = "default" if scaling is None else scaling["rope_type"]
    if scaling is None or kind == "default":
        return frequencies
    if kind not in ("linear", "llama3"):
        raise ValueError(f'rope_type must be "default", "linear" or "llama3", got "{kind}"')
    slowed = frequencies / scaling["factor"]
    if kind == "linear":
        return slowed
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: slowed fully
    return keep * frequencies + (1 - keep) * slowed


def rotary_table(frequencies: Tensor, num_positions: int, device: torch.device) -> Rotary:
    """cos and sin of position x frequency, computed in float64 and rounded to float32.

    In float32, the rounding error of an angle is 0.04 radians at a million positions.

    Args:
        frequencies: [D/2], radians per position (`rotary_frequencies`).
        num_positions: P.
        device: device of the table.
    """
    exact = _with_float64(device)
    positions = torch.arange(num_positions, dtype=torch.float64, device=exact)
    angles = positions[:, None] * frequencies.to(exact, torch.float64)
    cos, sin = angles.cos().float(), angles.sin().float()
    return Rotary(cos.to(device), sin.to(device))


def _with_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU if the device has no float64 (Apple's GPUs)."""
    return device if device.type in ("cpu", "cuda", "meta") else torch.device("cpu")


def check_width(rotary: Rotary, head_size: int) -> None:
    """Raise ValueError unless both tables are [P, D/2] (one column would broadcast silently)."""
    for name, table in zip(rotary._fields, rotary, strict=True):
        if table.ndim != 2 or 2 * table.shape[1] != head_size:
            expected = f"[P, D / 2] = [P, {head_size / 2:g}]"
            raise ValueError(f"rotary.{name} must be {expected}, got {list(table.shape)}")


def apply_rotary(x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
    """Rotate `x` [..., T, H, D] to `positions` [..., T] (integers) by the half-split convention.

    The two halves of D are the real and imaginary parts, as in Hugging Face's Llama. Products are
    in the higher precision of the table and `x`, at least float32, and rounded once.

    Raises:
        ValueError: the table is for another head size.
    """
    check_width(rotary, x.shape[-1])
    dtype = torch.promote_types(torch.promote_types(x.dtype, rotary.cos.dtype), torch.float32)
    cos = rotary.cos[positions].unsqueeze(-2).to(dtype)
    sin = rotary.sin[positions].unsqueeze(-2).to(dtype)
    real, imag = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((real * cos - imag * sin, imag * cos + real * sin), dim=-1).to(x.dtype)


def rotate_along(x: Tensor, rotary: Rotary, stride: int) -> Tensor:
    """Rotate `x` [B, T, H, D] to the positions floor(t / stride) of one axis."""
    return apply_rotary(x, rotary, torch.arange(x.shape[1], device=x.device) // stride)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Context in which products keep the dtype of their factors, even under autocast.

    A bf16 product rounds each score, the logarithm of a weight, by up to 2^-9 of its size: weights
    with scores of 20 would be off by 4 %.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
