# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Shared by the warp-specialized kernels: tiles of queries, a ring of keys and values.

One program per multiprocessor processes many tiles of queries. A producer warp loads the keys and
values of each tile with TMA into a ring of slots in shared memory. Two warp groups of 64 rows each
compute, so that each load serves 128 rows. Each slot has four barriers: `full` when keys or values
are loaded, and `empty` when both groups are done with them.

A tile is 128 / PACK tokens of PACK query heads that share a key head; rows are ordered heads
fastest.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import Hop
from .tiles import RingTiles

# These functions have other names after Triton 3.6.
load_tiles = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
GROUPS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # rows per warp group
SIZES = ["num_tokens", "length", "num_blocks", "num_tiles"]
# Registers per thread of the second group and of the producer; the first group gets the rest.
REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def place(tile, num_blocks, HEAD_BLOCKS: gl.constexpr):
    """Group of heads, block of tokens (the last block first) and batch of a tile."""
    rest = tile // HEAD_BLOCKS
    return tile % HEAD_BLOCKS, num_blocks - 1 - rest % num_blocks, rest // num_blocks


@gluon.jit
def row_tokens(block, which, PACK: gl.constexpr, LAYOUT: gl.constexpr):
    """The token of each row of a warp group."""
    row = gl.arange(0, ROWS, layout=LAYOUT)
    return (block * GROUPS + which) * (ROWS // PACK) + row // PACK


@gluon.jit
def first_visible(reach, token, exists, length):
    """The first token that each token attends to; itself if it does not exist."""
    back = gl.maximum(gl.load(reach + token, mask=exists, other=0), -1)
    return token - gl.where(exists, gl.minimum(gl.minimum(back, token), length - 1), 0)


@gluon.jit
def key_range(
    reach, block, num_tokens, length,
    PACK: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """First key of a tile, its number of blocks, and the range of keys that all rows attend to.

    All warps compute the same result.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    tokens: gl.constexpr = GROUPS * (ROWS // PACK)
    token = block * tokens + gl.arange(0, tokens, layout=LAYOUT)
    exists = token < num_tokens
    first = first_visible(reach, token, exists, length)
    end = gl.minimum((block + 1) * tokens, num_tokens)
    begin = gl.min(gl.where(first <= token, first, end), 0) // BLOCK_N * BLOCK_N
    inner = (gl.max(gl.where(exists, first, 0), 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    inner_end = (block * tokens + 1) // BLOCK_N * BLOCK_N
    return begin, (end - begin + BLOCK_N - 1) // BLOCK_N, inner, inner_end


@gluon.jit
def new_ring(k, values, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for the slots of keys and values, and their barriers."""
    ks = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, D], k.layout)
    vs = gl.allocate_shared_memory(values.dtype, [STAGES, BLOCK_N, D], values.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(k_empty.index(n), count=GROUPS)
        mbarrier.init(v_empty.index(n), count=GROUPS)
    return ks, vs, k_full, k_empty, v_full, v_empty


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next slot of the ring and its phase, which changes with each round."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase = phase ^ 1
    return slot, phase


@gluon.jit
def release(empty):
    """Mark a slot as no longer needed by this group, after a barrier of all its warps."""
    barrier()
    mbarrier.arrive(empty, count=1)


@gluon.jit
def produce(
    k, values, ring, reach, num_tokens, length, num_blocks, num_tiles,
    H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, PACK: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys and values of all tiles of this program as slots become empty."""
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    BYTES: gl.constexpr = BLOCK_N * D * 2
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head_block, block, batch = place(tile, num_blocks, H // PACK)
        begin, count, _, _ = key_range(
            reach + batch.to(gl.int64) * num_tokens, block, num_tokens, length, PACK, BLOCK_N, 1
        )
        column = head_block * PACK // (H // K) * D
        row = batch * num_tokens + begin
        for i in range(0, count):
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), BYTES)
            load_tiles(k, [row + i * BLOCK_N, column], k_full.index(slot), ks.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), BYTES)
            load_tiles(values, [row + i * BLOCK_N, column], v_full.index(slot), vs.index(slot))
            slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def load_halves(
    x, tile, num_tiles, which, cos, sin, num_tokens, num_blocks,
    H: gl.constexpr, D: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    """Both halves [64, D / 2] of a group's rows of `x`, and their cosines and sines."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 16), D // 16], [4, 1], [1, 0])
    head_block, block, batch = place(tile, num_blocks, H // PACK)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    token = row_tokens(block, which, PACK, gl.SliceLayout(1, LAYOUT))
    exists = ((token < num_tokens) & (tile < num_tiles))[:, None]
    column = gl.arange(0, D // 2, layout=gl.SliceLayout(0, LAYOUT))
    vector = (batch.to(gl.int64) * num_tokens + token) * H + head_block * PACK + row % PACK
    at = (vector * D)[:, None] + column[None, :]
    real = gl.load(x + at, mask=exists, other=0.0)
    imag = gl.load(x + at + D // 2, mask=exists, other=0.0)
    angle = token.to(gl.int64)[:, None] * (D // 2) + column[None, :]
    c = gl.load(cos + angle, mask=exists, other=0.0)
    s = gl.load(sin + angle, mask=exists, other=0.0)
    return real, imag, c, s


@gluon.jit
def turn(real, imag, c, s):
    """Both halves rotated in float32 and rounded once."""
    x = real.to(gl.float32)
    y = imag.to(gl.float32)
    return (x * c - y * s).to(real.dtype), (y * c + x * s).to(real.dtype)


@gluon.jit
def start_scores(q_real, q_imag, k, zero, HALF: gl.constexpr):
    """Start the asynchronous products for the scores of a block of keys."""
    s = warpgroup_mma(
        q_real, k.slice(0, HALF, 1).permute([1, 0]), zero, use_acc=False, is_async=True
    )
    return warpgroup_mma(q_imag, k.slice(HALF, HALF, 1).permute([1, 0]), s, is_async=True)


class Launch(NamedTuple):
    """Programs, and the arguments that both kernels take; `sizes` as named in `SIZES`."""

    grid: tuple[int]
    sizes: tuple[int, int, int, int]
    constants: dict[str, int]


def launch_of(hop: Hop, tiles: RingTiles) -> Launch:
    """One program per multiprocessor, or per tile if there are fewer tiles."""
    batch, num_tokens, heads, size = hop.q.shape
    num_blocks = triton.cdiv(num_tokens, GROUPS.value * ROWS.value // tiles.pack)
    num_tiles = batch * num_blocks * (heads // tiles.pack)
    processors = torch.cuda.get_device_properties(hop.q.device).multi_processor_count
    constants = {
        "H": heads, "K": hop.k.shape[2], "D": size, "PACK": tiles.pack,
        "BLOCK_N": tiles.block_n, "STAGES": tiles.stages, "num_warps": 4,
    }  # fmt: skip
    sizes = (num_tokens, hop.length, num_blocks, num_tiles)
    return Launch((min(num_tiles, processors),), sizes, constants)


def tiles_of(x: Tensor, block: int) -> TensorDescriptor:
    """`x` [B, T, N, D] as a matrix [B T, N D], loaded in tiles [block, D] of one head."""
    batch, num_tokens, heads, size = x.shape
    shape, strides = [batch * num_tokens, heads * size], [heads * size, 1]
    return TensorDescriptor(x, shape, strides, [block, size], gl.NVMMASharedLayout(128, 16, 2))
