"""Casts of matrices to float8, with scales; each matrix as it is, transposed, or both."""

from typing import NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_SMALLEST = 1e-12  # below this, a largest magnitude counts as this


class Scaled(NamedTuple):
    """A float8 matrix [m, k], contiguous; its values are `data` x `scale`."""

    data: Tensor
    scale: Tensor  # float32, [] or [m, 1]


def scale_of_all(x: Tensor) -> Tensor:
    """The factor [] that `cast` and `cast_transposed` need if they do not scale by row."""
    return _scale(x, None, E4M3)


def cast(x: Tensor, by_row: bool, scale: Tensor | None = None) -> Scaled:
    """x [m, k] in e4m3, with a scale for each row or for the whole (`scale_of_all`, if known)."""
    if scale is None:
        scale = _scale(x, 1 if by_row else None, E4M3)
    data, _ = _round(x, E4M3, scale, None)
    assert data is not None
    return Scaled(data, scale.reciprocal())


def cast_transposed(x: Tensor, by_row: bool, scale: Tensor | None = None) -> Scaled:
    """The transpose [k, m] of x [m, k] in e4m3, with a scale for each of its rows or for all.

    `scale`: `scale_of_all`, if known.
    """
    if scale is None:
        scale = _scale(x, 0 if by_row else None, E4M3)
    _, data = _round(x, E4M3, None, scale)
    assert data is not None
    return Scaled(data, _standing(scale.reciprocal()))


def cast_both(x: Tensor, by_row: bool) -> tuple[Scaled, Scaled]:
    """A gradient [m, k] and its transpose: in e4m3 with scales by row, else in e5m2."""
    dtype = E4M3 if by_row else E5M2
    scale = _scale(x, 1 if by_row else None, dtype)
    other = _scale(x, 0, dtype) if by_row else scale
    data, transposed = _round(x, dtype, scale, other)
    assert data is not None
    assert transposed is not None
    return Scaled(data, scale.reciprocal()), Scaled(transposed, _standing(other.reciprocal()))


def _scale(x: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """Factors in float32 that make the largest magnitudes the largest number of `dtype`.

    Along `dim` ([m, 1] or [1, k]), rounded down to powers of two; for dim None of all of x ([]).
    """
    if dim is None and x.is_cuda and x.dtype == torch.bfloat16 and x.is_contiguous():
        from .float8_kernel import largest_magnitude  # needs Triton

        largest = largest_magnitude(x)
    else:  # a norm needs no temporary tensor, as abs would
        largest = torch.linalg.vector_norm(x, torch.inf, dim, keepdim=dim is not None)
    scale = torch.finfo(dtype).max / largest.float().clamp(min=_SMALLEST)
    return scale if dim is None else scale.log2().floor().exp2()


def _standing(scale: Tensor) -> Tensor:
    """[1, k] as [k, 1], with the strides that cuBLAS expects; a scalar stays."""
    return scale.reshape(-1, 1) if scale.dim() else scale


def _round(
    x: Tensor, dtype: torch.dtype, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Round x [m, k] times `rows` ([] or [m, 1]), and the transpose of x times `columns` ([] or
    [1, k]), to `dtype`; None for factors that are None.
    """
    if x.is_cuda:
        from .float8_kernel import round_matrix  # needs Triton

        return round_matrix(x, dtype, rows, columns)
    limit = torch.finfo(dtype).max  # before torch 2.12, a cast did not saturate
    first, second = (
        None if scale is None else (x.float() * scale).clamp(-limit, limit).to(dtype)
        for scale in (rows, columns)
    )
    return first, None if second is None else second.t().contiguous()
