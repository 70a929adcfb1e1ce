"""Shared by the launchers of the Triton kernels: the inputs of a hop and its tiles."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import rotate_kernel

# Sizes that change with the data: specializing on them would recompile for each length.
SIZES = ["num_tokens", "num_rows", "steps", "stride", "length", "num_blocks"]
LARGEST_BLOCK = 128  # maximum tokens per tile
LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """Shape of a kernel's tiles, and its launch parameters.

    `pack` query heads of one key head share a query tile, so block_m rows are block_m / pack
    tokens. `rotate_first` rotates the inner loop's inputs into a copy before the kernel, instead of
    on every load: faster if each tile is loaded many times. `tma` loads tiles with the copy engine
    of Hopper and later GPUs (see `Hop.allows_tma`): threads then hold no addresses, which frees a
    third of their registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    pack: int = 1
    rotate_first: bool = False
    tma: bool = False


# A tensor, and the tables to rotate it on load; None if it is already or never rotated.
Turned = tuple[Tensor, Tensor | None, Tensor | None]


class Hop(NamedTuple):
    """The inputs of one hop as the kernels take them: contiguous, lse [B, H, T] in float32.

    Otherwise as in `dense.hop`. If the values are the state's z, `z_before` is `values` itself.
    """

    q: Tensor
    k: Tensor
    values: Tensor
    reach: Tensor
    bias: Tensor | None
    z_before: Tensor | None
    lse_before: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    stride: int
    length: int
    scale: float

    @property
    def steps(self) -> int:
        """Number of steps R per line, of which the last may not exist."""
        return triton.cdiv(self.q.shape[1], self.stride)

    @property
    def rows(self) -> int:
        """Rows of all lines. With a stride longer than the sequence, a line has one step."""
        return min(self.stride, self.q.shape[1]) * self.steps

    @property
    def shared(self) -> int:
        """Number of query heads that share values."""
        return self.q.shape[2] // self.values.shape[2]

    @property
    def window(self) -> int:
        """Maximum number of keys that a query attends to."""
        return min(self.length, self.steps)

    @property
    def allows_tma(self) -> bool:
        """Whether the copy engine can load whole tiles of this hop's inputs.

        Rows must be in memory order (no stride) without padding, and a last tile must not extend
        into the next sequence of the batch.
        """
        batch, num_tokens, _, size = self.q.shape
        value_size = self.values.shape[3]
        return (
            self.stride == 1
            and self.lse_before is None
            and (batch == 1 or num_tokens % LARGEST_BLOCK == 0)
            and padded(size) == size
            and padded(value_size) == value_size
            and (is_interpreted() or torch.cuda.get_device_capability(self.q.device) >= (9, 0))
        )

    def walk(self, num_blocks: int) -> tuple[int | float, ...]:
        """The sizes that every kernel takes, and the scale of base-2 scores."""
        num_tokens = self.q.shape[1]
        return (
            num_tokens, self.rows, self.steps, self.stride, self.length, num_blocks,
            self.scale * LOG2E,
        )  # fmt: skip

    def constants(self) -> dict[str, int | str | bool]:
        """The compile-time constants that every kernel takes."""
        size, value_size = self.q.shape[3], self.values.shape[3]
        return {
            "H": self.q.shape[2], "K": self.k.shape[2], "V": self.values.shape[2],
            "D": size, "E": value_size, "BLOCK_D": padded(size), "BLOCK_E": padded(value_size),
            "STRIDED": self.stride > 1, "PRECISION": precision_of(self.q.dtype),
        }  # fmt: skip

    def rotated(self, x: Tensor, first: bool) -> Turned:
        """`x` (q or k) and the tables to rotate it on load; without tables if rotated `first`."""
        if self.cos is None or self.sin is None or not first:
            return x, self.cos, self.sin
        return rotate(x, self.cos, self.sin, self.stride), None, None


def tma_rows(x: Tensor, block: int) -> TensorDescriptor:
    """`x` [B, T, N, D] as a matrix [B T, N D], loaded in tiles [block, D] of one head."""
    batch, num_tokens, heads, size = x.shape
    shape, strides = [batch * num_tokens, heads * size], [heads * size, 1]
    return TensorDescriptor(x, shape, strides, [block, size])


def tma_heads(x: Tensor, block: int, heads: int) -> TensorDescriptor:
    """`x` [B, T, N, D] as [B T, N, D], loaded in tiles [block, heads, D]."""
    batch, num_tokens, num_heads, size = x.shape
    shape, strides = [batch * num_tokens, num_heads, size], [num_heads * size, size, 1]
    return TensorDescriptor(x, shape, strides, [block, heads, size])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, stride: int) -> Tensor:
    """A copy of `x` [B, T, H, D] rotated to positions floor(t / stride)."""
    out = torch.empty_like(x)
    batch, num_tokens, heads, size = x.shape
    num_rows, block_rows = batch * num_tokens * heads, 32
    rotate_kernel[(triton.cdiv(num_rows, block_rows),)](
        x, out, cos, sin, num_rows, num_tokens, stride,
        HEADS=heads, SIZE=size, BLOCK_ROWS=block_rows, BLOCK=padded(size),
    )  # fmt: skip
    return out


def padded(size: int) -> int:
    """Number of columns of a tile for heads of this size."""
    return max(16, triton.next_power_of_2(size))


def precision_of(dtype: torch.dtype) -> str:
    """PRECISION of `dot`: float32 inputs get float32 products."""
    if dtype == torch.bfloat16 and is_interpreted():
        return "upcast"
    return "ieee" if dtype == torch.float32 else "tf32"


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET at import)."""
    return not isinstance(rotate_kernel, triton.JITFunction)
