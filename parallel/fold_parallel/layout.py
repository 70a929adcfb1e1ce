"""Cutting a tensor into one chunk per rank, and joining chunks.

Shape letters: P ranks, B batch, T tokens of the whole row, R = T / (P n_1) inner rows per rank,
C = n_1 / P columns per rank, H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# The cost of strided copies depends on the number of elements, not bytes: on an H200, elements of 2
# bytes take 2.5 times as long as elements of 16 bytes.
_WIDEST = torch.complex128


@dataclass(frozen=True)
class Layout:
    """Splits axis `axis` into axes of `sizes`; after that, axis `place` is the rank.

    One size may be -1, which means the rest. The first `left_out` entries of the axis belong to no
    chunk.
    """

    axis: int
    sizes: tuple[int, ...]
    place: int
    left_out: int = 0

    def cut(self, whole: Tensor) -> Tensor:
        """Chunks [P, ...] of a tensor, as a view."""
        used = whole.narrow(self.axis, self.left_out, whole.shape[self.axis] - self.left_out)
        return used.unflatten(self.axis, self.sizes).movedim(self.place, 0)

    def join(self, chunks: Tensor) -> Tensor:
        """The tensor with these chunks [P, ...], and zeros outside all chunks.

        It shares memory with the chunks if possible.
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
    """Sends the whole tensor to every rank, as one chunk; gradients that come back are added."""

    def cut(self, whole: Tensor) -> Tensor:
        """The only chunk [1, ...], as a view."""
        return whole[None]

    def join(self, chunks: Tensor) -> Tensor:
        """The sum of chunks [P, ...] in rank order, in float32 or wider, rounded once."""
        total = chunks[0].to(torch.promote_types(chunks.dtype, torch.float32), copy=True)
        for chunk in chunks[1:]:
            total += chunk
        return total.to(chunks.dtype)


CHUNKS = Layout(0, (-1,), 0)  # the layout of a tensor [P, ...]


def contiguous(x: Tensor) -> Tensor:
    """A faster `x.contiguous()`. Not differentiable."""
    if x.is_contiguous():
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    copy(out, x)
    return out


def copy(to: Tensor, x: Tensor) -> None:
    """A faster `to.copy_(x)` for equal shapes and dtypes. Not differentiable."""
    if _is_wide(to) and _is_wide(x):
        to, x = to.view(_WIDEST), x.view(_WIDEST)
    to.copy_(x)


def _is_wide(x: Tensor) -> bool:
    """Whether `x` can be viewed as elements of the widest dtype."""
    size, widest = x.element_size(), _WIDEST.itemsize
    steps = [x.storage_offset(), *x.stride()[:-1]]
    is_dense = x.dim() > 0 and x.stride(-1) == 1 and x.shape[-1] * size % widest == 0
    return is_dense and all(at % widest == 0 for at in (x.data_ptr(), *(s * size for s in steps)))
