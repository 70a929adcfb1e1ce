# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The routed hop forward on Hopper, warp-specialized (Gluon); bit-identical to `routed_forward`.

A program processes pairs of neighboring tiles of one key head, one in each of two warp groups. A
producer warp merges the lists of both tiles and loads each block once, into a ring of slots. A
group skips blocks that only the other tile reads. Most blocks are read by both, so there are fewer
loads from the L2 cache, which limit `routed_forward`.
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

from .launch import LOG2E
from .routed_choice import rotate_stretched
from .routed_launch import TILE, Routed
from .routed_lists import TileLists
from .specialized import (
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    advance,
    barrier,
    load_tiles,
    new_ring,
    release,
    start_scores,
    tiles_of,
    turn,
)

SIZES = [
    "num_tokens",
    "num_keys",
    "first_token",
    "num_tiles",
    "num_pairs",
    "num_items",
    "window",
    "stretch",
]
FLOOR = gl.constexpr(-1.0e20)
MASKED = gl.constexpr(-1.0e30)
LN2 = gl.constexpr(0.6931471805599453)
BASE2 = gl.constexpr(LOG2E)
TOKENS = gl.constexpr(TILE)
END = gl.constexpr(0x7FFFFFFF << 32)  # an entry after all blocks


@gluon.jit
def place_of(item, num_pairs, K: gl.constexpr):
    """Pair of tiles (the last first), key head and batch; pairs of one key head are adjacent."""
    rest = item // num_pairs
    return num_pairs - 1 - item % num_pairs, rest % K, rest // K


@gluon.jit
def list_of(entries, counts, row, tile, num_tiles, CAPACITY: gl.constexpr):
    """The list of a tile of a key head, and its length: 0 if the tile does not exist."""
    listed = row.to(gl.int64) * num_tiles + tile
    return entries + listed * CAPACITY, gl.load(counts + listed, mask=tile < num_tiles, other=0)


@gluon.jit
def entry_at(entries, place, count):
    """The entry at `place`; END after the last."""
    return gl.load(entries + place, mask=place < count, other=END)


@gluon.jit
def produce(
    k, values, ring, entries, counts, sizes,
    K: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, CAPACITY: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Load the blocks that either tile of each pair reads, in order."""
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    _, num_keys, _, num_tiles, num_pairs, num_items, _, _ = sizes
    BYTES: gl.constexpr = BLOCK * D * 2
    slot = 0
    phase = 1
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        pair, head, batch = place_of(item, num_pairs, K)
        row = batch * K + head
        left, left_count = list_of(entries, counts, row, 2 * pair, num_tiles, CAPACITY)
        right, right_count = list_of(entries, counts, row, 2 * pair + 1, num_tiles, CAPACITY)
        i = 0
        j = 0
        a = entry_at(left, i, left_count) >> 32
        b = entry_at(right, j, right_count) >> 32
        while (i < left_count) | (j < right_count):
            first = gl.minimum(a, b)
            i += (a == first).to(gl.int32)
            j += (b == first).to(gl.int32)
            a = entry_at(left, i, left_count) >> 32
            b = entry_at(right, j, right_count) >> 32
            token = batch * num_keys + first.to(gl.int32)
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), BYTES)
            load_tiles(k, [token, head * D], k_full.index(slot), ks.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), BYTES)
            load_tiles(values, [token, head * D], v_full.index(slot), vs.index(slot))
            slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def skip_block(ring, slot, phase, STAGES: gl.constexpr):
    """Release a slot without reading it, when it is loaded, so that its phases stay in step."""
    _, _, k_full, k_empty, v_full, v_empty = ring
    mbarrier.wait(k_full.index(slot), phase)
    mbarrier.wait(v_full.index(slot), phase)
    barrier()
    mbarrier.arrive(k_empty.index(slot), count=1)
    mbarrier.arrive(v_empty.index(slot), count=1)
    return advance(slot, phase, STAGES)


@gluon.jit
def load_angles(
    doc_start, cos, sin, token, batch, num_tokens, first_token, stretch,
    D: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Cosines and sines [64, D / 2] of the queries' stretched positions."""
    exists = token < num_tokens
    document = gl.load(doc_start + batch.to(gl.int64) * num_tokens + token, mask=exists, other=0)
    position = (first_token + token - document) // stretch
    column = gl.arange(0, D // 2, layout=gl.SliceLayout(0, LAYOUT))
    angle = position.to(gl.int64)[:, None] * (D // 2) + column[None, :]
    c = gl.load(cos + angle, mask=exists[:, None], other=0.0)
    return c, gl.load(sin + angle, mask=exists[:, None], other=0.0)


@gluon.jit
def load_queries(
    q, doc_start, cos, sin, token, head, batch, num_tokens, first_token, stretch,
    H: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Both halves [64, D / 2] of the queries, rotated to stretched positions and rounded once."""
    exists = token < num_tokens
    column = gl.arange(0, D // 2, layout=gl.SliceLayout(0, LAYOUT))
    vector = (batch.to(gl.int64) * num_tokens + token) * H + head
    at = (vector * D)[:, None] + column[None, :]
    real = gl.load(q + at, mask=exists[:, None], other=0.0)
    imag = gl.load(q + at + D // 2, mask=exists[:, None], other=0.0)
    c, s = load_angles(
        doc_start, cos, sin, token, batch, num_tokens, first_token, stretch, D, LAYOUT
    )
    return turn(real, imag, c, s)


@gluon.jit
def consume(
    which, q, ring, doc_start, entries, counts, z_before, lse_before, cos, sin, z, lse, sizes,
    scale,
    H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr,
    CAPACITY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Compute one tile of each pair: 16 tokens of 4 query heads, heads fastest."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    HALVES: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 16), D // 16], [4, 1], [1, 0])
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    GROUP: gl.constexpr = H // K
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    num_tokens, _, first_token, num_tiles, num_pairs, num_items, window, stretch = sizes
    dtype: gl.constexpr = ks.dtype
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
        lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, HALVES))
        real, imag = load_queries(
            q, doc_start, cos, sin, tile * TOKENS + lane // GROUP, key_head * GROUP + lane % GROUP,
            batch, num_tokens, first_token, stretch, H, D, HALVES,
        )  # fmt: skip
        q_real = gl.convert_layout(real, QUERIES)
        q_imag = gl.convert_layout(imag, QUERIES)

        lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WHOLE))
        token = tile * TOKENS + lane // GROUP
        column = gl.arange(0, D, layout=gl.SliceLayout(0, WHOLE))
        vector = (batch.to(gl.int64) * num_tokens + token) * H + key_head * GROUP + lane % GROUP
        at = (vector * D)[:, None] + column[None, :]
        stored = (token < num_tokens)[:, None]
        acc = gl.convert_layout(gl.load(z_before + at, mask=stored, other=0.0), OUT)

        lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        token = tile * TOKENS + lane // GROUP
        exists = token < num_tokens
        head = batch.to(gl.int64) * H + key_head * GROUP + lane % GROUP
        scalar = head * num_tokens + token
        before = gl.load(lse_before + scalar, mask=exists, other=0.0) * BASE2
        top = gl.maximum(before, FLOOR)
        total = gl.exp2(before - top)
        acc = acc.to(gl.float32) * gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
        limit = gl.where(exists, first_token + token - window, -1)
        key = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SCORES))

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
            s = start_scores(q_real, q_imag, ks.index(slot), zero, D // 2)
            s = warpgroup_mma_wait(0, deps=[s])
            release(k_empty.index(slot))
            reads = ((entry.to(gl.int32) & 0xFFFF) >> (lane // GROUP)) & 1
            last = gl.where(reads != 0, limit, -1) - first.to(gl.int32)
            s = gl.where(key[None, :] <= last[:, None], s, MASKED)
            top_next = gl.maximum(top, gl.max(s, 1) * scale)
            weight = gl.exp2(s * scale - top_next[:, None])
            keep = gl.exp2(top - top_next)
            total = total * keep + gl.sum(weight, 1)
            acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, OUT))[:, None]
            b_p = gl.convert_layout(weight.to(dtype), WEIGHTS)
            mbarrier.wait(v_full.index(slot), phase)
            acc = warpgroup_mma(b_p, vs.index(slot), acc, is_async=True)
            acc, b_p = warpgroup_mma_wait(0, deps=[acc, b_p])
            release(v_empty.index(slot))
            top = top_next
            slot, phase = advance(slot, phase, STAGES)
        while j < other_count:
            slot, phase = skip_block(ring, slot, phase, STAGES)
            j += 1

        divide = gl.where(total == 0, 1.0, total)
        acc = acc / gl.convert_layout(divide, gl.SliceLayout(1, OUT))[:, None]
        gl.store(lse + scalar, (top + gl.log2(total)) * LN2, mask=exists)
        gl.store(z + at, gl.convert_layout(acc.to(dtype), WHOLE), mask=stored)


@gluon.jit(do_not_specialize=SIZES)
def specialized_routed_kernel(
    q, k, values, doc_start, entries, counts, z_before, lse_before, cos, sin, z, lse,
    num_tokens, num_keys, first_token, num_tiles, num_pairs, num_items, window, stretch, scale,
    H: gl.constexpr, K: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr,
    CAPACITY: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Arguments as of `routed_forward_kernel`; k (rotated) and values are tiles of [B T, K D]."""
    ring = new_ring(k, values, D, BLOCK, STAGES)
    sizes = (num_tokens, num_keys, first_token, num_tiles, num_pairs, num_items, window, stretch)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (consume, (0, q, ring, doc_start, entries, counts, z_before, lse_before, cos, sin,
                       z, lse, sizes, scale, H, K, D, BLOCK, CAPACITY, STAGES)),
            (consume, (1, q, ring, doc_start, entries, counts, z_before, lse_before, cos, sin,
                       z, lse, sizes, scale, H, K, D, BLOCK, CAPACITY, STAGES)),
            (produce, (k, values, ring, entries, counts, sizes, K, D, BLOCK, CAPACITY, STAGES)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def specialized_routed(
    routed: Routed, lists: TileLists, z_before: Tensor, lse_before: Tensor, z: Tensor, lse: Tensor,
    stages: int,
) -> None:  # fmt: skip
    """Write z [B, Q, H, E] and lse [B, H, Q] float32 of a hop that starts from a state."""
    k = rotate_stretched(routed.k, routed.cos, routed.sin, routed.doc_start, routed.stretch)
    batch, num_tokens, heads, size = routed.q.shape
    key_heads = k.shape[2]
    num_pairs = triton.cdiv(routed.tiles, 2)
    num_items = batch * key_heads * num_pairs
    processors = torch.cuda.get_device_properties(k.device).multi_processor_count
    with torch.cuda.device_of(k):
        specialized_routed_kernel[(min(num_items, processors),)](
            routed.q, tiles_of(k, routed.block), tiles_of(routed.values, routed.block),
            routed.query_starts, lists.entries, lists.counts, z_before, lse_before,
            routed.cos, routed.sin, z, lse,
            num_tokens, k.shape[1], routed.first, routed.tiles, num_pairs, num_items,
            routed.window, routed.stretch, routed.score_scale,
            H=heads, K=key_heads, D=size, BLOCK=routed.block, CAPACITY=routed.capacity,
            STAGES=stages, num_warps=4,
        )  # fmt: skip
