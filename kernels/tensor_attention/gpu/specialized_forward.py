# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The window hop forward on Hopper, warp-specialized (Gluon); bit-identical to `forward`, faster.

While a group waits for its product with the values of one block, it computes the weights of the
next block, and the tensor cores compute the other group's products.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .launch import LOG2E, Hop
from .specialized import (
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    SIZES,
    advance,
    barrier,
    first_visible,
    key_range,
    launch_of,
    load_halves,
    new_ring,
    place,
    produce,
    release,
    row_tokens,
    start_scores,
    tiles_of,
    turn,
)
from .tiles import RingTiles

FLOOR = gl.constexpr(-1.0e20)
MASKED = gl.constexpr(-1.0e30)
LN2 = gl.constexpr(0.6931471805599453)


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
        real, imag = turn(real, imag, c, s)
        q_real = gl.convert_layout(real, QUERIES)
        q_imag = gl.convert_layout(imag, QUERIES)
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


@gluon.jit(do_not_specialize=SIZES)
def specialized_forward_kernel(
    q, k, values, reach, cos, sin, z, lse, num_tokens, length, num_blocks, num_tiles, scale,
    H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, PACK: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q, z [B,T,H,D]; k (rotated) and values: tiles of [B T, K D]; reach [B,T]; lse [B,H,T]."""
    ring = new_ring(k, values, D, BLOCK_N, STAGES)
    fence_async_shared()
    barrier()
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
    launch = launch_of(hop, tiles)
    with torch.cuda.device_of(hop.q):
        specialized_forward_kernel[launch.grid](
            hop.q, tiles_of(k, tiles.block_n), tiles_of(hop.values, tiles.block_n), hop.reach,
            hop.cos, hop.sin, z, lse, *launch.sizes, hop.scale * LOG2E, **launch.constants,
        )  # fmt: skip
