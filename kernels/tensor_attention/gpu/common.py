# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Shared by the Triton kernels: the order of rows, and loading, rotating and storing tiles.

Rows. A hop of stride s splits the tokens into s lines of R = ceil(T / s) steps each. The kernels
iterate over rows r = line * R + step, so that a line is contiguous: token(r) = step * s + line. In
this order, every hop, whatever its stride, is banded causal attention: row r attends to rows u with
lo(r) <= u <= r - nearest, and lo(r) is always on the same line. Short lines share a tile.

Columns. The columns of a tile are padded per half of the head, [first half, padding, second half,
padding], so that the distance of rotary pairs is BLOCK_D / 2 for every head size.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# The score of a masked key, and the floor of the running maximum: exp2(MASKED - FLOOR) is 0.
MASKED: tl.constexpr = tl.constexpr(-1.0e30)
FLOOR: tl.constexpr = tl.constexpr(-1.0e20)


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    """`tl.dot` with float32 accumulation; "upcast" is for the interpreter, without bf16 dot."""
    if PRECISION == "upcast":
        result = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(x, y, input_precision=PRECISION)
    return result


@triton.jit
def add_product(acc, x, y, PRECISION: tl.constexpr):
    """acc + x @ y."""
    if PRECISION == "upcast":
        acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def locate(row, num_tokens, num_rows, steps, stride, STRIDED: tl.constexpr):
    """Token of each row, its step along the line (the rotary position), and whether it exists."""
    if STRIDED:
        step = row % steps
        token = step * stride + row // steps
    else:
        step = row
        token = row
    return token, step, (row < num_rows) & (token < num_tokens)


@triton.jit
def first_visible(reach, row, token, step, exists, length):
    """lo(r): the first row that each row attends to; itself if it does not exist."""
    back = tl.maximum(tl.load(reach + token, mask=exists, other=0), -1)
    return row - tl.where(exists, tl.minimum(tl.minimum(back, step), length - 1), 0)


@triton.jit
def tile_columns(SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Index in the head of each column of a tile, and whether the column exists."""
    column = tl.arange(0, BLOCK)
    within = column % (BLOCK // 2)
    if SIZE != BLOCK:
        column = (column // (BLOCK // 2)) * (SIZE // 2) + within
    return column, within < SIZE // 2


@triton.jit
def load_tile(base, offset, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] tile of the heads that start at `base + offset`, zero outside them."""
    column, inside = tile_columns(SIZE, BLOCK)
    mask = exists[:, None]
    if SIZE != BLOCK:
        mask = mask & inside[None, :]
    return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def score_gradient(
    score, inner, offset, delta, seen, scale, MASK: tl.constexpr
):  # fmt: skip
    """Weights P = exp2(score * scale + offset) and the gradient P (inner - delta) of their scores.

    `offset` is (bias - lse) in base 2. `delta` contains -dlse. It is subtracted, because the
    compiler fuses an addition into the product `inner`, which would then wait for `delta` to load.
    """
    weight = tl.exp2(score * scale + offset)
    if MASK:
        weight = tl.where(seen, weight, 0.0)
    return weight, weight * (inner - delta)


@triton.jit
def load_angles(cos, sin, position, exists, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK / 2] cosines and sines at the rows' positions."""
    column = tl.arange(0, BLOCK // 2)
    mask = exists[:, None] & (column < SIZE // 2)[None, :]
    angle = position.to(tl.int64)[:, None] * (SIZE // 2) + column[None, :]
    return tl.load(cos + angle, mask=mask, other=0.0), tl.load(sin + angle, mask=mask, other=0.0)


@triton.jit
def load_rotated(
    base, offset, exists, position, cos, sin, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`load_tile`, rotated to `position` in float32 and rounded once (cos None: unchanged)."""
    if cos is None:
        tile = load_tile(base, offset, exists, SIZE, BLOCK)
    else:
        column = tl.arange(0, BLOCK // 2)
        mask = exists[:, None] & (column < SIZE // 2)[None, :]
        source = base + offset[:, None] + column[None, :]
        real = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        imag = tl.load(source + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
        c, s = load_angles(cos, sin, position, exists, SIZE, BLOCK)
        halves = tl.join(real * c - imag * s, imag * c + real * s).to(base.dtype.element_ty)
        tile = tl.reshape(tl.permute(halves, (0, 2, 1)), (offset.shape[0], BLOCK))
    return tile


@triton.jit
def store_gradient(
    x, base, offset, exists, position, cos, sin,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a rotated tile: rotate it back, then write or accumulate it."""
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
    """Store a [rows, BLOCK] tile at the place where `load_tile` reads it."""
    column, inside = tile_columns(SIZE, BLOCK)
    mask = exists[:, None]
    if SIZE != BLOCK:
        mask = mask & inside[None, :]
    tl.store(base + offset[:, None] + column[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "stride"])
def rotate_kernel(
    x, out, cos, sin, num_rows, num_tokens, stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, t, h] = x[b, t, h] rotated to position floor(t / stride); a row is one head."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    exists = row < num_rows
    position = (row // HEADS) % num_tokens // stride
    tile = load_rotated(x, row * SIZE, exists, position, cos, sin, SIZE, BLOCK)
    store_tile(tile, out, row * SIZE, exists, SIZE, BLOCK)
