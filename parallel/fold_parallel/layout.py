"""How a tensor is cut into a chunk for each rank, and how chunks are joined again.

Shape letters: P ranks, B batch, T tokens of the whole row, R = T / (P n_1) inner rows per rank,
C = n_1 / P columns per rank, H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Strided copies cost by the element, not by the byte: on an H200, elements of 2 bytes take 2.5
# times as long as those of 16.
_WIDEST = torch.complex128


@dataclass(frozen=True)
class Layout:
    """Axis `axis` is split into axes of `sizes`; after that, axis `place` counts the ranks.

    One of the sizes may be -1: what the others leave. The first `left_out` entries of the axis are
    in no chunk.
    """

    axis: int
    sizes: tuple[int, ...]
    place: int
    left_out: int = 0

    def cut(self, whole: Tensor) -> Tensor:
        """Chunks [P, ...] of a tensor, in place."""
        used = whole.narrow(self.axis, self.left_out, whole.shape[self.axis] - self.left_out)
        return used.unflatten(self.axis, self.sizes).movedim(self.place, 0)

    def join(self, chunks: Tensor) -> Tensor:
        """The tensor that has these chunks [P, ...], zeros where there are none.

        It is the same memory where that can be.
        """
        parts, last = chunks.movedim(0, self.place), self.axis + len(self.sizes) - 1
        if not self.left_out:
            return contiguous(parts).flatten(self.axis, last)
        used = parts.shape[self.axis : last + 1].numel()
        shape = [*parts.shape[: self.axis], self.left_out + used, *parts.shape[last + 1 :]]
        whole = parts.new_empty(shape)
        whole.narrow(self.axis, 0, self.left_out).zero_()
        copy(self.cut(whole), chunks)
        return whole


@dataclass(frozen=True)
class Copies:
    """Every rank is sent the tensor whole, as one chunk; what comes back is added up."""

    def cut(self, whole: Tensor) -> Tensor:
        """The one chunk [1, ...], in place."""
        return whole[None]

    def join(self, chunks: Tensor) -> Tensor:
        """The sum of chunks [P, ...], rank after rank, in float32 or wider and rounded once."""
        total = chunks[0].to(torch.promote_types(chunks.dtype, torch.float32), copy=True)
        for chunk in chunks[1:]:
            total += chunk
        return total.to(chunks.dtype)


CHUNKS = Layout(0, (-1,), 0)  # a tensor that is [P, ...] already


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()`, sooner. Not differentiable."""
    if x.is_contiguous():
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    copy(out, x)
    return out


def copy(to: Tensor, x: Tensor) -> None:
    """`to.copy_(x)` for equal shapes and dtypes, sooner. Not differentiable."""
    if _is_wide(to) and _is_wide(x):
        to, x = to.view(_WIDEST), x.view(_WIDEST)
    to.copy_(x)


def _is_wide(x: Tensor) -> bool:
    """Whether it can be seen as elements of the widest kind."""
    size, widest = x.element_size(), _WIDEST.itemsize
    steps = [x.storage_offset(), *x.stride()[:-1]]
    is_dense = x.dim() > 0 and x.stride(-1) == 1 and x.shape[-1] * size % widest == 0
    return is_dense and all(at % widest == 0 for at in (x.data_ptr(), *(s * size for s in steps)))
