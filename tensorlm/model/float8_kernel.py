# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of `float8_cast`: largest magnitudes, and matrices with transposes in float8."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 128
_BLOCK = 8192  # numbers that one program of `_largest_kernel` reads at a time
_PROGRAMS = 1024  # at most


def largest_magnitude(x: Tensor) -> Tensor:
    """The infinity norm [] in float32 of x, in bf16 and contiguous; NaN if there is one."""
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    size = x.numel()
    grid = (min(_PROGRAMS, triton.cdiv(size, _BLOCK)),)
    _largest_kernel[grid](x.view(torch.int16), bits, size, BLOCK=_BLOCK, num_warps=8)
    return bits.view(torch.float32)


@triton.jit
def _largest_kernel(x, bits, size, BLOCK: tl.constexpr):
    # Without the sign, the order of bf16's bits is that of its numbers; those of a NaN are last.
    largest = tl.zeros([BLOCK], tl.int16)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(x + at, mask=at < size, other=0) & 0x7FFF)
    tl.atomic_max(bits, tl.max(largest.to(tl.int32)) << 16)


def round_matrix(
    x: Tensor, dtype: torch.dtype, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """As `float8_cast._round`, on a GPU (or in Triton's interpreter)."""
    x = x.contiguous()
    m, k = x.shape
    out = None if rows is None else x.new_empty(m, k, dtype=dtype)
    transposed = None if columns is None else x.new_empty(k, m, dtype=dtype)
    scale = rows if rows is not None else columns
    assert scale is not None
    grid = (triton.cdiv(m, _TILE) * triton.cdiv(k, _TILE),)
    _round_kernel[grid](
        x, rows, columns, out, transposed, m, k,
        BY_ROW=scale.dim() > 0, DTYPE=tl.float8e5 if dtype == torch.float8_e5m2 else tl.float8e4nv,
        TILE=_TILE, num_warps=8,
    )  # fmt: skip
    return out, transposed


@triton.jit
def _round_kernel(
    x, rows, columns, out, transposed, m, k,
    BY_ROW: tl.constexpr, DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(k, TILE)
    i = (tl.program_id(0) // across * TILE + tl.arange(0, TILE)).to(tl.int64)
    j = (tl.program_id(0) % across * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = (i < m)[:, None] & (j < k)[None, :]
    value = tl.load(x + i[:, None] * k + j[None, :], mask=inside, other=0.0).to(tl.float32)
    if out is not None:
        if BY_ROW:
            scaled = value * tl.load(rows + i, mask=i < m, other=0.0)[:, None]
        else:
            scaled = value * tl.load(rows)
        # The GPU's cast saturates, and keeps NaN.
        tl.store(out + i[:, None] * k + j[None, :], scaled.to(DTYPE), mask=inside)
    if transposed is not None:
        if BY_ROW:
            scaled = value * tl.load(columns + j, mask=j < k, other=0.0)[None, :]
        else:
            scaled = value * tl.load(columns)
        is_inside = (j < k)[:, None] & (i < m)[None, :]
        tl.store(
            transposed + j[:, None] * m + i[None, :], tl.trans(scaled.to(DTYPE)), mask=is_inside
        )
