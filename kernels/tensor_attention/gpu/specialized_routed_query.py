# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gradients of the routed hop's queries and state on Hopper, warp-specialized (Gluon).

Formulas, order of additions and bits are those of `routed_backward_query_kernel`. As in
`specialized_routed`, two neighboring tiles share the loads of the blocks that both read.
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

from .routed_launch import Routed
from .routed_lists import TileLists
from .specialized import (
    GROUPS,
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    advance,
    barrier,
    new_ring,
    release,
    start_scores,
    tiles_of,
)
from .specialized_routed import (
    BASE2,
    SIZES,
    TOKENS,
    entry_at,
    list_of,
    load_angles,
    load_queries,
    place_of,
    produce,
    skip_block,
)


@gluon.jit
def state_gradients(
    which, gradients, z, lse, z_before, lse_before, dz, dlse, delta, dz_before, dlse_before,
    tile, key_head, batch, num_tokens,
    H: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Write delta (minus dlse), the gradient of the state, and dz into shared memory.

    Returns delta [64] of a tile's rows.
    """
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WHOLE))
    token = tile * TOKENS + lane // GROUP
    exists = token < num_tokens
    column = gl.arange(0, D, layout=gl.SliceLayout(0, WHOLE))
    head = key_head * GROUP + lane % GROUP
    vector = (batch.to(gl.int64) * num_tokens + token) * H + head
    at = (vector * D)[:, None] + column[None, :]
    scalar = (batch.to(gl.int64) * H + head) * num_tokens + token
    b_dz = gl.load(dz + at, mask=exists[:, None], other=0.0)
    barrier()  # all warps have finished the products with the previous tile's dz
    gradients.index(which).store(b_dz)
    fence_async_shared()
    barrier()
    wide = b_dz.to(gl.float32)
    b_z = gl.load(z + at, mask=exists[:, None], other=0.0)
    b_delta = gl.sum(wide * b_z.to(gl.float32), 1)
    if dlse is not None:
        b_delta -= gl.load(dlse + scalar, mask=exists, other=0.0)
    gl.store(delta + scalar, b_delta, mask=exists)

    b_lse = gl.load(lse + scalar, mask=exists, other=0.0)
    b_before = gl.load(lse_before + scalar, mask=exists, other=float("-inf"))
    keep = gl.where(b_before > float("-inf"), gl.exp(b_before - b_lse), 0.0)
    b_z = gl.load(z_before + at, mask=exists[:, None], other=0.0)
    b_inner = gl.sum(wide * b_z.to(gl.float32), 1)
    gl.store(dlse_before + scalar, keep * (b_inner - b_delta), mask=exists)
    dtype: gl.constexpr = dz_before.dtype.element_ty
    gl.store(dz_before + at, (keep[:, None] * wide).to(dtype), mask=exists[:, None])
    return b_delta


@gluon.jit
def consume(
    which, ring, gradients, lists, queries, outputs, states, scales, sizes,
    H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr,
    CAPACITY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute one tile of each pair: 16 tokens of 4 query heads, heads fastest."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    HALVES: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 16), D // 16], [4, 1], [1, 0])
    GROUP: gl.constexpr = H // K
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    entries, counts = lists
    q, doc_start, cos, sin = queries
    dq, delta, dz_before, dlse_before = outputs
    z, lse, z_before, lse_before, dz, dlse = states
    scale, softmax_scale = scales
    num_tokens, _, first_token, num_tiles, num_pairs, num_items, window, stretch = sizes
    dtype: gl.constexpr = ks.dtype
    b_dz = gradients.index(which)
    zero = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    slot = 0
    phase = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        pair, key_head, batch = place_of(item, num_pairs, K)
        tile = 2 * pair + which
        own, count = list_of(entries, counts, batch * K + key_head, tile, num_tiles, CAPACITY)
        other, other_count = list_of(
            entries, counts, batch * K + key_head, 2 * pair + 1 - which, num_tiles, CAPACITY
        )
        b_delta = state_gradients(
            which, gradients, z, lse, z_before, lse_before, dz, dlse, delta, dz_before,
            dlse_before, tile, key_head, batch, num_tokens, H, D, GROUP,
        )  # fmt: skip
        b_delta = gl.convert_layout(b_delta, gl.SliceLayout(1, SCORES))
        half_lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, HALVES))
        half_token = tile * TOKENS + half_lane // GROUP
        half_head = key_head * GROUP + half_lane % GROUP
        real, imag = load_queries(
            q, doc_start, cos, sin, half_token, half_head, batch, num_tokens, first_token,
            stretch, H, D, HALVES,
        )  # fmt: skip
        q_real = gl.convert_layout(real, QUERIES)
        q_imag = gl.convert_layout(imag, QUERIES)

        lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        token = tile * TOKENS + lane // GROUP
        exists = token < num_tokens
        head = batch.to(gl.int64) * H + key_head * GROUP + lane % GROUP
        b_lse = gl.load(lse + head * num_tokens + token, mask=exists, other=0.0)
        offset = gl.where(exists, -b_lse * BASE2, float("-inf"))
        limit = gl.where(exists, first_token + token - window, -1)
        key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SCORES))
        acc = gl.zeros([ROWS, D], gl.float32, OUT)

        j = 0
        b = entry_at(other, j, other_count) >> 32
        for i in range(0, count):
            entry = gl.load(own + i)
            first = entry >> 32
            while b < first:
                slot, phase = skip_block(ring, slot, phase, STAGES)
                j += 1
                b = entry_at(other, j, other_count) >> 32
            j += (b == first).to(gl.int32)
            b = entry_at(other, j, other_count) >> 32

            mbarrier.wait(k_full.index(slot), phase)
            score = start_scores(q_real, q_imag, ks.index(slot), zero, D // 2)
            mbarrier.wait(v_full.index(slot), phase)
            inner = warpgroup_mma(
                b_dz, vs.index(slot).permute([1, 0]), zero, use_acc=False, is_async=True
            )
            score, inner = warpgroup_mma_wait(0, deps=[score, inner])
            release(v_empty.index(slot))
            reads = ((entry.to(gl.int32) & 0xFFFF) >> (lane // GROUP)) & 1
            last = gl.where(reads != 0, limit, -1) - first.to(gl.int32)
            weight = gl.exp2(score * scale + offset[:, None])
            weight = gl.where(key[None, :] <= last[:, None], weight, 0.0)
            dscore = weight * (inner - b_delta[:, None])
            b_p = gl.convert_layout(dscore.to(dtype), WEIGHTS)
            acc = warpgroup_mma(b_p, ks.index(slot), acc, is_async=True)
            acc, b_p = warpgroup_mma_wait(0, deps=[acc, b_p])
            release(k_empty.index(slot))
            slot, phase = advance(slot, phase, STAGES)
        while j < other_count:
            slot, phase = skip_block(ring, slot, phase, STAGES)
            j += 1

        real, imag = gl.split((acc * softmax_scale).reshape([ROWS, 2, D // 2]).permute([0, 2, 1]))
        real, imag = gl.convert_layout(real, HALVES), gl.convert_layout(imag, HALVES)
        c, s = load_angles(
            doc_start, cos, sin, half_token, batch, num_tokens, first_token, stretch, D, HALVES
        )
        column = gl.arange(0, D // 2, layout=gl.SliceLayout(0, HALVES))
        vector = (batch.to(gl.int64) * num_tokens + half_token) * H + half_head
        at = (vector * D)[:, None] + column[None, :]
        stored = (half_token < num_tokens)[:, None]
        gl.store(dq + at, (real * c + imag * s).to(dtype), mask=stored)
        gl.store(dq + at + D // 2, (imag * c - real * s).to(dtype), mask=stored)


@gluon.jit(do_not_specialize=SIZES)
def specialized_routed_query_kernel(
    q, k, values, doc_start, entries, counts, z, lse, z_before, lse_before, cos, sin,
    dz, dlse, dq, delta, dz_before, dlse_before,
    num_tokens, num_keys, first_token, num_tiles, num_pairs, num_items, window, stretch, scale,
    softmax_scale,
    H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr,
    CAPACITY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `routed_backward_query_kernel`; k (rotated) and values are tiles of [B T, K D]."""
    ring = new_ring(k, values, D, BLOCK, STAGES)
    gradients = gl.allocate_shared_memory(k.dtype, [GROUPS, ROWS, D], k.layout)
    lists = (entries, counts)
    queries = (q, doc_start, cos, sin)
    outputs = (dq, delta, dz_before, dlse_before)
    states = (z, lse, z_before, lse_before, dz, dlse)
    sizes = (num_tokens, num_keys, first_token, num_tiles, num_pairs, num_items, window, stretch)
    scales = (scale, softmax_scale)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (consume, (0, ring, gradients, lists, queries, outputs, states, scales, sizes,
                       H, K, D, BLOCK, CAPACITY, STAGES)),
            (consume, (1, ring, gradients, lists, queries, outputs, states, scales, sizes,
                       H, K, D, BLOCK, CAPACITY, STAGES)),
            (produce, (k, values, ring, entries, counts, sizes, K, D, BLOCK, CAPACITY, STAGES)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def specialized_routed_query(
    routed: Routed,
    lists: TileLists,
    k: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    dz: Tensor,
    dlse: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    stages: int,
) -> None:
    """Write the gradients of the queries and of the state.

    Args:
        routed, lists: as in `routed_backward`.
        k: [B, T, K, D], rotated.
        state: z, lse, z_before, lse_before.
        dz, dlse: gradients of z and lse.
        outputs: dq, delta, dz_before, dlse_before.
        stages: slots of the ring, from `routed_tiles.backward_query_stages`.
    """
    batch, num_tokens, heads, size = routed.q.shape
    key_heads = k.shape[2]
    num_pairs = triton.cdiv(routed.tiles, 2)
    num_items = batch * key_heads * num_pairs
    processors = torch.cuda.get_device_properties(k.device).multi_processor_count
    with torch.cuda.device_of(k):
        specialized_routed_query_kernel[(min(num_items, processors),)](
            routed.q, tiles_of(k, routed.block), tiles_of(routed.values, routed.block),
            routed.query_starts, lists.entries, lists.counts, *state, routed.cos, routed.sin,
            dz, dlse, *outputs,
            num_tokens, k.shape[1], routed.first, routed.tiles, num_pairs, num_items,
            routed.window, routed.stretch, routed.score_scale, routed.scale,
            H=heads, K=key_heads, D=size, BLOCK=routed.block, CAPACITY=routed.capacity,
            STAGES=stages, num_warps=4,
        )  # fmt: skip
