# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gradient of the window hop's queries on Hopper, warp-specialized (Gluon).

The formulas and the order of additions are those of `backward_query`. The scores and <dz, values>
of the next block are computed before the product of this block's gradient with the keys is waited
for.
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
    GROUPS,
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

BASE2 = gl.constexpr(LOG2E)


@gluon.jit
def score_gradient(
    score, inner, offset, delta, start, first, token, is_cut, scale,
    BLOCK_N: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """P (inner - delta); 0 for keys that a row does not attend to."""
    weight = gl.exp2(score * scale + offset[:, None])
    if is_cut:
        key = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= token[:, None])
        weight = gl.where(seen, weight, 0.0)
    return weight * (inner - delta[:, None])


@gluon.jit
def store_halves(
    x, target, tile, num_tiles, which, cos, sin, num_tokens, num_blocks,
    H: gl.constexpr, D: gl.constexpr, PACK: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Rotate a gradient [64, D] back and write it, or add it to `target`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 16), D // 16], [4, 1], [1, 0])
    dtype: gl.constexpr = target.dtype.element_ty
    real, imag = gl.split(x.reshape([ROWS, 2, D // 2]).permute([0, 2, 1]))
    real, imag = gl.convert_layout(real, LAYOUT), gl.convert_layout(imag, LAYOUT)
    before, before_imag, c, s = load_halves(
        target, tile, num_tiles, which, cos, sin, num_tokens, num_blocks, H, D, PACK
    )
    turned = real * c + imag * s
    imag = imag * c - real * s
    if ACCUMULATE:
        turned += before.to(gl.float32)
        imag += before_imag.to(gl.float32)
    head_block, block, batch = place(tile, num_blocks, H // PACK)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    token = row_tokens(block, which, PACK, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, D // 2, layout=gl.SliceLayout(0, LAYOUT))
    vector = (batch.to(gl.int64) * num_tokens + token) * H + head_block * PACK + row % PACK
    at = (vector * D)[:, None] + column[None, :]
    exists = (token < num_tokens)[:, None]
    gl.store(target + at, turned.to(dtype), mask=exists)
    gl.store(target + at + D // 2, imag.to(dtype), mask=exists)


@gluon.jit
def consume(
    which, q, ring, gradients, reach, cos, sin, z, lse, dz, dlse, dq, delta,
    num_tokens, length, num_blocks, num_tiles, scale, softmax_scale,
    H: gl.constexpr, D: gl.constexpr, PACK: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Compute one warp group's 64 rows of each tile. `gradients`: shared memory for its dz."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    b_dz = gradients.index(which)
    dtype: gl.constexpr = ks.dtype
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head_block, block, batch = place(tile, num_blocks, H // PACK)
        batch = batch.to(gl.int64)
        real, imag, c, s = load_halves(
            q, tile, num_tiles, which, cos, sin, num_tokens, num_blocks, H, D, PACK
        )
        lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WHOLE))
        token = row_tokens(block, which, PACK, gl.SliceLayout(1, WHOLE))
        exists = token < num_tokens
        head = head_block * PACK + lane % PACK
        column = gl.arange(0, D, layout=gl.SliceLayout(0, WHOLE))
        at = (((batch * num_tokens + token) * H + head) * D)[:, None] + column[None, :]
        loaded = gl.load(dz + at, mask=exists[:, None], other=0.0)
        if z is not None:
            b_z = gl.load(z + at, mask=exists[:, None], other=0.0)
            row_sum = gl.sum(loaded.to(gl.float32) * b_z.to(gl.float32), 1)
            gl.store(delta + (batch * H + head) * num_tokens + token, row_sum, mask=exists)
        barrier()  # all warps have finished the products with the previous tile's dz
        b_dz.store(loaded)
        fence_async_shared()
        barrier()
        real, imag = turn(real, imag, c, s)
        q_real = gl.convert_layout(real, QUERIES)
        q_imag = gl.convert_layout(imag, QUERIES)
        lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        token = row_tokens(block, which, PACK, gl.SliceLayout(1, SCORES))
        exists = token < num_tokens
        scalar = (batch * H + head_block * PACK + lane % PACK) * num_tokens + token
        if z is not None:
            b_delta = gl.convert_layout(row_sum, gl.SliceLayout(1, SCORES))
        else:
            b_delta = gl.load(delta + scalar, mask=exists, other=0.0)
        if dlse is not None:
            b_delta -= gl.load(dlse + scalar, mask=exists, other=0.0)
        b_lse = gl.load(lse + scalar, mask=exists, other=0.0)
        offset = gl.where(exists, -b_lse * BASE2, float("-inf"))
        first = first_visible(reach + batch * num_tokens, token, exists, length)
        begin, count, inner_begin, inner_end = key_range(
            reach + batch * num_tokens, block, num_tokens, length, PACK, BLOCK_N, 4
        )
        acc = gl.zeros([ROWS, D], gl.float32, OUT)
        if count > 0:
            mbarrier.wait(k_full.index(slot), phase)
            score = start_scores(q_real, q_imag, ks.index(slot), zero, D // 2)
            mbarrier.wait(v_full.index(slot), phase)
            inner = warpgroup_mma(
                b_dz, vs.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True
            )
            score, inner = warpgroup_mma_wait(0, deps=[score, inner])
            release(v_empty.index(slot))
            dscore = score_gradient(
                score, inner, offset, b_delta, begin, first, token,
                (begin < inner_begin) | (begin >= inner_end), scale, BLOCK_N, SCORES,
            )  # fmt: skip
            b_p = gl.convert_layout(dscore.to(dtype), WEIGHTS)
            held = slot
            slot, phase = advance(slot, phase, STAGES)
            for i in range(1, count):
                start = begin + i * BLOCK_N
                mbarrier.wait(k_full.index(slot), phase)
                score = start_scores(q_real, q_imag, ks.index(slot), zero, D // 2)
                mbarrier.wait(v_full.index(slot), phase)
                inner = warpgroup_mma(
                    b_dz, vs.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True
                )
                acc = warpgroup_mma(b_p, ks.index(held), acc, is_async=True)
                score, inner = warpgroup_mma_wait(1, deps=[score, inner])
                p_next = b_p
                if start < num_tokens:  # always true: see `specialized_forward`
                    dscore = score_gradient(
                        score, inner, offset, b_delta, start, first, token,
                        (start < inner_begin) | (start >= inner_end), scale, BLOCK_N, SCORES,
                    )  # fmt: skip
                    p_next = gl.convert_layout(dscore.to(dtype), WEIGHTS)
                acc, b_p, p_next = warpgroup_mma_wait(0, deps=[acc, b_p, p_next])
                release(k_empty.index(held))
                mbarrier.arrive(v_empty.index(slot), count=1)
                b_p = p_next
                held = slot
                slot, phase = advance(slot, phase, STAGES)
            acc = warpgroup_mma(b_p, ks.index(held), acc, is_async=True)
            acc, b_p = warpgroup_mma_wait(0, deps=[acc, b_p])
            release(k_empty.index(held))
        store_halves(
            acc * softmax_scale, dq, tile, num_tiles, which, cos, sin, num_tokens, num_blocks,
            H, D, PACK, ACCUMULATE,
        )  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def specialized_query_kernel(
    q, k, values, reach, cos, sin, z, lse, dz, dlse, dq, delta,
    num_tokens, length, num_blocks, num_tiles, scale, softmax_scale,
    H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, PACK: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """q, z, dz, dq [B,T,H,D]; k (rotated) and values: tiles of [B T, K D]; lse, dlse, delta
    [B,H,T]. If `z` is None, `delta` is an input.
    """
    ring = new_ring(k, values, D, BLOCK_N, STAGES)
    gradients = gl.allocate_shared_memory(k.dtype, [GROUPS, ROWS, D], k.layout)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (consume, (0, q, ring, gradients, reach, cos, sin, z, lse, dz, dlse, dq, delta,
                       num_tokens, length, num_blocks, num_tiles, scale, softmax_scale,
                       H, D, PACK, BLOCK_N, STAGES, ACCUMULATE)),
            (consume, (1, q, ring, gradients, reach, cos, sin, z, lse, dz, dlse, dq, delta,
                       num_tokens, length, num_blocks, num_tiles, scale, softmax_scale,
                       H, D, PACK, BLOCK_N, STAGES, ACCUMULATE)),
            (produce, (k, values, ring, reach, num_tokens, length, num_blocks, num_tiles,
                       H, K, D, PACK, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def specialized_queries(
    hop: Hop,
    k: Tensor,
    z: Tensor | None,
    lse: Tensor,
    dz: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    delta: Tensor,
    *,
    accumulate: bool,
    tiles: RingTiles,
) -> None:
    """Write (or add to) dq, and write delta unless z is None.

    Args:
        k: [B, T, K, D], rotated.
        hop, z, lse, dz, dlse, dq, accumulate: as in `backward_query.backward_queries`.
        delta: <dz, z> [B, H, T] float32.
        tiles: from `tiles.backward_query_ring`.
    """
    launch = launch_of(hop, tiles)
    with torch.cuda.device_of(hop.q):
        specialized_query_kernel[launch.grid](
            hop.q, tiles_of(k, tiles.block_n), tiles_of(hop.values, tiles.block_n), hop.reach,
            hop.cos, hop.sin, z, lse, dz, dlse, dq, delta, *launch.sizes,
            hop.scale * LOG2E, hop.scale, ACCUMULATE=accumulate, **launch.constants,
        )  # fmt: skip
