# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The window hop forward on Hopper, warp-specialized (Gluon); bit-identical to `forward`, faster.

While a group waits for its product with the values of one block, it computes the weights of the
next block, and the tensor cores compute the other group's products.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import LOG2E, Hop
from .specialized import (
    GROUPS,
    ROWS,
    advance,
    barrier,
    first_visible,
    key_range,
    load_halves,
    place,
    produce,
    release,
    row_tokens,
)
from .tiles import RingTiles

FLOOR = gl.constexpr(-1.0e20)
MASKED = gl.constexpr(-1.0e30)
LN2 = gl.constexpr(0.6931471805599453)
# Registers per thread of the second group and of the producer; the first group gets the rest.
REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def fold_scores(
    s, top, total, start, first, token, is_cut, scale,
    BLOCK_N: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Weights of a block of scores, and the updated running maximum and sum (base 2)."""
    if is_cut:
        key = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        s = gl.where((key[None, :] >= first[:, None]) & (key[None, :] <= token[:, None]), s, MASKED)
    top_next = gl.maximum(top, gl.max(s, 1) * scale)
    weight = gl.exp2(s * scale - top_next[:, None])
    keep = gl.exp2(top - top_next)
    total = total * keep + gl.sum(weight, 1)
    return weight, top_next, total, keep


@gluon.jit
def start_scores(q_real, q_imag, k, zero, HALF: gl.constexpr):
    """Start the asynchronous products for the scores of a block of keys."""
    s = warpgroup_mma(
        q_real, k.slice(0, HALF, 1).permute([1, 0]), zero, use_acc=False, is_async=True
    )
    return warpgroup_mma(q_imag, k.slice(HALF, HALF, 1).permute([1, 0]), s, is_async=True)


@gluon.jit
def consume(
    which, q, ring, reach, cos, sin, z, lse, num_tokens, length, num_blocks, num_tiles, scale,
    H: gl.constexpr, D: gl.constexpr, PACK: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute one warp group's 64 rows of each tile; loads the next queries before storing."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    slot = 0
    phase = 0
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    dtype: gl.constexpr = ks.dtype
    program = gl.program_id(0)
    real, imag, c, s = load_halves(
        q, program, num_tiles, which, cos, sin, num_tokens, num_blocks, H, D, PACK
    )
    for tile in range(program, num_tiles, gl.num_programs(0)):
        head_block, block, batch = place(tile, num_blocks, H // PACK)
        begin, count, inner, inner_end = key_range(
            reach + batch.to(gl.int64) * num_tokens, block, num_tokens, length, PACK, BLOCK_N, 4
        )
        lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        token = row_tokens(block, which, PACK, gl.SliceLayout(1, SCORES))
        exists = token < num_tokens
        first = first_visible(reach + batch.to(gl.int64) * num_tokens, token, exists, length)
        x = real.to(gl.float32)
        y = imag.to(gl.float32)
        q_real = gl.convert_layout((x * c - y * s).to(dtype), QUERIES)
        q_imag = gl.convert_layout((y * c + x * s).to(dtype), QUERIES)
        top = gl.full([ROWS], FLOOR, gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, D], gl.float32, OUT)
        if count > 0:
            mbarrier.wait(k_full.index(slot), phase)
            score = start_scores(q_real, q_imag, ks.index(slot), zero, D // 2)
            score = warpgroup_mma_wait(0, deps=[score])
            release(k_empty.index(slot))
            weight, top, total, keep = fold_scores(
                score, top, total, begin, first, token, (begin < inner) | (begin >= inner_end),
                scale, BLOCK_N, SCORES,
            )  # fmt: skip
            b_p = gl.convert_layout(weight.to(dtype), WEIGHTS)
            held = slot
            held_phase = phase
            slot, phase = advance(slot, phase, STAGES)
            for i in range(1, count):
                start = begin + i * BLOCK_N
                mbarrier.wait(k_full.index(slot), phase)
                score = start_scores(q_real, q_imag, ks.index(slot), zero, D // 2)
                mbarrier.wait(v_full.index(held), held_phase)
                acc = warpgroup_mma(b_p, vs.index(held), acc, is_async=True)
                score = warpgroup_mma_wait(1, deps=[score])
                release(k_empty.index(slot))
                p_next = b_p
                keep = total
                # Always true. Without this separate basic block, ptxas moves the next wait before
                # the weights, and they are not computed during the product with the values.
                if start < num_tokens:
                    weight, top, total, keep = fold_scores(
                        score, top, total, start, first, token,
                        (start < inner) | (start >= inner_end), scale, BLOCK_N, SCORES,
                    )  # fmt: skip
                    p_next = gl.convert_layout(weight.to(dtype), WEIGHTS)
                acc, b_p, p_next = warpgroup_mma_wait(0, deps=[acc, b_p, p_next])
                release(v_empty.index(held))
                acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, OUT))[:, None]
                b_p = p_next
                held = slot
                held_phase = phase
                slot, phase = advance(slot, phase, STAGES)
            mbarrier.wait(v_full.index(held), held_phase)
            acc = warpgroup_mma(b_p, vs.index(held), acc, is_async=True)
            acc, b_p = warpgroup_mma_wait(0, deps=[acc, b_p])
            release(v_empty.index(held))

        real, imag, c, s = load_halves(
            q, tile + gl.num_programs(0), num_tiles, which, cos, sin, num_tokens, num_blocks,
            H, D, PACK,
        )  # fmt: skip
        divide = gl.where(total == 0, 1.0, total)
        acc = acc / gl.convert_layout(divide, gl.SliceLayout(1, OUT))[:, None]
        head = batch.to(gl.int64) * H + head_block * PACK + lane % PACK
        gl.store(lse + head * num_tokens + token, (top + gl.log2(total)) * LN2, mask=exists)
        out = gl.convert_layout(acc.to(dtype), STORED)
        lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORED))
        token = row_tokens(block, which, PACK, gl.SliceLayout(1, STORED))
        column = gl.arange(0, D, layout=gl.SliceLayout(0, STORED))
        vector = (batch.to(gl.int64) * num_tokens + token) * H + head_block * PACK + lane % PACK
        at = (vector * D)[:, None] + column[None, :]
        gl.store(z + at, out, mask=(token < num_tokens)[:, None])


@gluon.jit(do_not_specialize=["num_tokens", "length", "num_blocks", "num_tiles"])
def specialized_forward_kernel(
    q, k, values, reach, cos, sin, z, lse, num_tokens, length, num_blocks, num_tiles, scale,
    H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, PACK: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q, z [B,T,H,D]; k (rotated) and values: tiles of [B T, K D]; reach [B,T]; lse [B,H,T]."""
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
    fence_async_shared()
    barrier()
    ring = (ks, vs, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (consume, (0, q, ring, reach, cos, sin, z, lse, num_tokens, length, num_blocks,
                       num_tiles, scale, H, D, PACK, BLOCK_N, STAGES)),
            (consume, (1, q, ring, reach, cos, sin, z, lse, num_tokens, length, num_blocks,
                       num_tiles, scale, H, D, PACK, BLOCK_N, STAGES)),
            (produce, (k, values, ring, reach, num_tokens, length, num_blocks, num_tiles,
                       H, K, D, PACK, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def specialized_forward(hop: Hop, k: Tensor, z: Tensor, lse: Tensor, tiles: RingTiles) -> None:
    """Write one window hop into `z` [B, T, H, D] and `lse` [B, H, T] float32; `k` is rotated."""
    batch, num_tokens, heads, size = hop.q.shape
    num_blocks = triton.cdiv(num_tokens, GROUPS.value * ROWS.value // tiles.pack)
    num_tiles = batch * num_blocks * (heads // tiles.pack)
    processors = torch.cuda.get_device_properties(hop.q.device).multi_processor_count
    with torch.cuda.device_of(hop.q):
        specialized_forward_kernel[(min(num_tiles, processors),)](
            hop.q, _tiles_of(k, tiles.block_n), _tiles_of(hop.values, tiles.block_n), hop.reach,
            hop.cos, hop.sin, z, lse, num_tokens, hop.length, num_blocks, num_tiles,
            hop.scale * LOG2E, H=heads, K=hop.k.shape[2], D=size, PACK=tiles.pack,
            BLOCK_N=tiles.block_n, STAGES=tiles.stages, num_warps=4,
        )  # fmt: skip


def _tiles_of(x: Tensor, block: int) -> TensorDescriptor:
    """`x` [B, T, N, D] as a matrix [B T, N D], loaded in tiles [block, D] of one head."""
    batch, num_tokens, heads, size = x.shape
    shape, strides = [batch * num_tokens, heads * size], [heads * size, 1]
    return TensorDescriptor(x, shape, strides, [block, size], gl.NVMMASharedLayout(128, 16, 2))
