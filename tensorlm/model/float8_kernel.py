# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel of `float8_cast`: reads a matrix once, writes it and its transpose in float8."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 128


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
