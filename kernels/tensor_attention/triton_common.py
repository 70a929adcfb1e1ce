# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
"""What the Triton kernels share: where rows live, how tiles are loaded and rotated, tile shapes.

Rows. A hop of stride s splits the tokens into s lines of R = ceil(T / s) steps each. The kernels
walk the rows r = line * R + step, so that a line is contiguous: token(r) = step * s + line. In this
order every hop, whatever its stride, is one banded causal attention: row r sees the rows u with
lo(r) <= u <= r - nearest, and lo(r) never leaves the line. Short lines simply share a tile.

Columns. The columns of a tile are padded per half of the head, [first half, padding, second half,
padding], so that rotary pairs stay BLOCK_D / 2 apart whatever the head size.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Scores that do not count, and the floor of the running maximum: exp2(MASKED - FLOOR) is 0.
MASKED: tl.constexpr = tl.constexpr(-1.0e30)
FLOOR: tl.constexpr = tl.constexpr(-1.0e20)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """`tl.dot` in float32 accumulation; "upcast" is for the interpreter, which has no bf16 dot."""
    if PRECISION == "upcast":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def add_product(acc, x, y, PRECISION: tl.constexpr):
    """acc + x @ y."""
    if PRECISION == "upcast":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def locate(row, num_tokens, num_rows, steps, stride, STRIDED: tl.constexpr):
    """Token, step along its line (the rotary position), and existence of each row."""
    if STRIDED:
        step = row % steps
        token = step * stride + row // steps
    else:
        step = row
        token = row
    return token, step, (row < num_rows) & (token < num_tokens)


@triton.jit
def first_visible(reach, row, token, step, exists, length):
    """lo(r): the first row that each row sees; a row that does not exist sees only itself."""
    back = tl.load(reach + token, mask=exists, other=0)
    return row - tl.where(exists, tl.minimum(tl.minimum(back, step), length - 1), 0)


@triton.jit
def tile_columns(SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Index in the head of each column of a tile, and which columns exist."""
    column = tl.arange(0, BLOCK)
    if SIZE == BLOCK:
        return column, column < BLOCK
    within = column % (BLOCK // 2)
    return (column // (BLOCK // 2)) * (SIZE // 2) + within, within < SIZE // 2


@triton.jit
def load_tile(base, offset, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] tile of the heads that start at `base + offset`, zero where nothing exists."""
    column, inside = tile_columns(SIZE, BLOCK)
    mask = exists[:, None]
    if SIZE != BLOCK:
        mask = mask & inside[None, :]
    return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_angles(cos, sin, position, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK / 2] cosines and sines of the rows' positions."""
    column = tl.arange(0, BLOCK // 2)
    mask = exists[:, None] & (column < SIZE // 2)[None, :]
    angle = position.to(tl.int64)[:, None] * (SIZE // 2) + column[None, :]
    return tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)


@triton.jit
def load_rotated(
    base, offset, exists, position, cos, sin, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`load_tile`, rotated to `position` in float32 and rounded once (cos None: as it is)."""
    if cos is None:
        return load_tile(base, offset, exists, SIZE, BLOCK)
    column = tl.arange(0, BLOCK // 2)
    mask = exists[:, None] & (column < SIZE // 2)[None, :]
    source = base + offset[:, None] + column[None, :]
    real = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    imag = tl.load(source + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    c, s = load_angles(cos, sin, position, exists, SIZE, BLOCK)
    turned = tl.join(real * c - imag * s, imag * c + real * s).to(base.dtype.element_ty)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (offset.shape[0], BLOCK))


@triton.jit
def store_gradient(
    x, base, offset, exists, position, cos, sin,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a rotated tile: rotate back, then write or add to what is there."""
    halves = tl.permute(tl.reshape(x, (offset.shape[0], 2, BLOCK // 2)), (0, 2, 1))
    real, imag = tl.split(halves)
    column = tl.arange(0, BLOCK // 2)
    mask = exists[:, None] & (column < SIZE // 2)[None, :]
    if cos is not None:
        c, s = load_angles(cos, sin, position, exists, SIZE, BLOCK)
        turned = real * c + imag * s
        imag = imag * c - real * s
        real = turned
    target = base + offset[:, None] + column[None, :]
    if ACCUMULATE:
        real += tl.load(target, mask=mask, other=0.0).to(tl.float32)
        imag += tl.load(target + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, real.to(base.dtype.element_ty), mask=mask)
    tl.store(target + SIZE // 2, imag.to(base.dtype.element_ty), mask=mask)


@triton.jit
def store_tile(x, base, offset, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store a [rows, BLOCK] tile where `load_tile` would read it."""
    column, inside = tile_columns(SIZE, BLOCK)
    mask = exists[:, None]
    if SIZE != BLOCK:
        mask = mask & inside[None, :]
    tl.store(base + offset[:, None] + column[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def rotate_kernel(
    x, out, cos, sin, num_rows, num_tokens, stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, t, h] = x[b, t, h] rotated to floor(t / stride); one row is one head of one token."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    exists = row < num_rows
    position = (row // HEADS) % num_tokens // stride
    tile = load_rotated(x, row * SIZE, exists, position, cos, sin, SIZE, BLOCK)
    store_tile(tile, out, row * SIZE, exists, SIZE, BLOCK)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, stride: int) -> Tensor:
    """A copy of `x` [B, T, H, D] rotated to the positions floor(t / stride)."""
    out = torch.empty_like(x)
    batch, num_tokens, heads, size = x.shape
    num_rows, block_rows = batch * num_tokens * heads, 32
    rotate_kernel[(triton.cdiv(num_rows, block_rows),)](
        x, out, cos, sin, num_rows, num_tokens, stride,
        HEADS=heads, SIZE=size, BLOCK_ROWS=block_rows, BLOCK=padded(size),
    )  # fmt: skip
    return out


class Lines(NamedTuple):
    """How a hop of one stride walks the tokens: `count` lines of `steps` steps each."""

    count: int
    steps: int

    @property
    def rows(self) -> int:
        """Number of rows, the missing tokens at the ends of lines included."""
        return self.count * self.steps


def lines_of(num_tokens: int, stride: int) -> Lines:
    """The lines of a hop; a stride longer than the sequence leaves one step per line."""
    return Lines(min(stride, num_tokens), triton.cdiv(num_tokens, stride))


class Tiles(NamedTuple):
    """Shape of one kernel's tiles and how it is launched.

    `pack` query heads of one key head share a query tile, so block_m rows are block_m / pack
    tokens. `rotate_first` rotates keys (and, in the backward, queries) into a copy before the
    kernel instead of on every load: worth it where each tile is loaded many times.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    pack: int = 1
    rotate_first: bool = False


def padded(size: int) -> int:
    """Columns of a tile that holds heads of this size."""
    return max(16, triton.next_power_of_2(size))


def precision_of(dtype: torch.dtype) -> str:
    """PRECISION of `product`: float32 inputs get float32 products."""
    if dtype == torch.bfloat16 and is_interpreted():
        return "upcast"
    return "ieee" if dtype == torch.float32 else "tf32"


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET at import)."""
    return not isinstance(rotate_kernel, triton.JITFunction)
