# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The choice of blocks on Hopper, warp-specialized (Gluon); the same choice as `routed_choice`.

One program per multiprocessor processes many tiles of tokens of one key head. A producer warp loads
the means of 64 slots at a time into a ring, for two warp groups of 64 tokens each. Both passes of
`routed_choice` are here. The second appends scores that reach the bound to a list of candidates per
token, in global memory that stays in the L2 cache. Its places are counted by a product with a
triangular matrix. The best are kept at the end of a tile, or when a list is almost full.
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

from .specialized import (
    GROUPS,
    PRODUCER_REGISTERS,
    REGISTERS,
    ROWS,
    advance,
    barrier,
    load_tiles,
    place,
    release,
)
from .specialized_candidates import CAPACITY, keep_best

SIZES = ["num_tokens", "num_slots", "num_blocks", "num_tiles", "window", "first_token"]
SLOTS = gl.constexpr(64)  # slots per tile of scores
TOKENS = gl.constexpr(GROUPS.value * ROWS.value)  # tokens per tile
# Places of a list are counted in floats from 1024 on, whose bits are FIRST_PLACE << PLACE_BITS.
ZERO_PLACE = gl.constexpr(1024.0)
FIRST_PLACE = gl.constexpr(0x44800000 >> 13)
PLACE_BITS = gl.constexpr(13)
MASKED = gl.constexpr(-1.0e30)
# The first pass visits at least so many tiles of slots, evenly spaced, if there are as many. Fewer
# tiles take less time but yield a lower bound, and more candidates.
SAMPLED_TILES = 16


@gluon.jit
def far_slots(doc_start, token, num_tokens, window, first_token, BLOCK: gl.constexpr):
    """Whether tokens have far blocks, and the range (lowest, highest] of their slots."""
    exists = token < num_tokens
    document = gl.load(doc_start + token, mask=exists, other=0)
    before = first_token + token - window
    has_far = exists & (before >= document)
    lowest = document // BLOCK
    return has_far, lowest, gl.where(has_far, lowest + (before - document) // BLOCK, -1)


@gluon.jit
def slot_tiles(
    doc_start, block, num_tokens, num_slots, window, first_token,
    BLOCK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """First slot of a tile of tokens, its tiles of slots, and how many of these need no mask."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    token = block * TOKENS + gl.arange(0, TOKENS, layout=LAYOUT)
    has_far, lowest, highest = far_slots(doc_start, token, num_tokens, window, first_token, BLOCK)
    begin = gl.min(gl.where(has_far, lowest + 1, num_slots), 0)
    count = (gl.maximum(gl.max(highest, 0) + 1 - begin, 0) + SLOTS - 1) // SLOTS
    shared_end = gl.min(highest, 0) + 1
    unmasked = 0
    if (shared_end > begin) & (gl.max(lowest, 0) < begin):
        unmasked = (shared_end - begin) // SLOTS
    return begin, count, unmasked


@gluon.jit
def produce(
    means, ring, doc_start, sizes,
    K: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, PARTS: gl.constexpr,
    SAMPLE: gl.constexpr, TOGETHER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the means of both passes over all tiles, as slots of the ring become empty."""
    memory, full, empty = ring
    num_tokens, num_slots, num_blocks, num_tiles, window, first_token = sizes
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, block, batch = place(tile, num_blocks, K)
        begin, count, _ = slot_tiles(
            doc_start + batch.to(gl.int64) * num_tokens, block, num_tokens, num_slots,
            window, first_token, BLOCK, 1,
        )  # fmt: skip
        row = (batch * K + head) * (PARTS * num_slots) + begin
        step = gl.maximum(count // SAMPLE, 1)
        for second in gl.static_range(2):
            for i in range(0, count, 1 if second else step):
                for part in gl.static_range(0, PARTS, TOGETHER):
                    mbarrier.wait(empty.index(slot), phase)
                    mbarrier.expect(full.index(slot), TOGETHER * SLOTS * D * 2)
                    for j in gl.static_range(TOGETHER):
                        at = row + (part + j) * num_slots + i * SLOTS
                        target = memory.index(slot).slice(j * SLOTS, SLOTS, 0)
                        load_tiles(means, [at, 0], full.index(slot), target)
                    slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def best_scores(
    b_q, ring, slot, phase, zero, PARTS: gl.constexpr, TOGETHER: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Scores [64, SLOTS] of the next tile of slots: those of their best parts."""
    memory, full, empty = ring
    best = zero
    for part in gl.static_range(0, PARTS, TOGETHER):
        mbarrier.wait(full.index(slot), phase)
        b_mean = memory.index(slot)
        score = start_product(b_q, b_mean.slice(0, SLOTS, 0), zero)
        if TOGETHER == 2:
            other = start_product(b_q, b_mean.slice(SLOTS, SLOTS, 0), zero)
            score, other = warpgroup_mma_wait(0, deps=[score, other])
        else:
            score = warpgroup_mma_wait(0, deps=[score])
        release(empty.index(slot))
        slot, phase = advance(slot, phase, STAGES)
        if TOGETHER == 2:
            score = gl.maximum(score, other)
        best = score if part == 0 else gl.maximum(best, score)
    return best, slot, phase


@gluon.jit
def start_product(b_q, b_mean, zero):
    """Start the asynchronous product of queries with means."""
    return warpgroup_mma(b_q, b_mean.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def mask_slots(score, slot, lowest, highest):
    """Set scores of slots outside (lowest, highest] to -inf."""
    allowed = (slot[None, :] > lowest[:, None]) & (slot[None, :] <= highest[:, None])
    return gl.where(allowed, score, float("-inf"))


@gluon.jit
def load_queries(
    q, tile, num_tiles, which, num_tokens, num_blocks,
    K: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The summed queries [64, D] of a warp group in a tile."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    head, block, batch = place(tile, num_blocks, K)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    token = block * TOKENS + which * ROWS + row
    column = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    vector = (batch.to(gl.int64) * num_tokens + token) * K + head
    exists = (token < num_tokens) & (tile < num_tiles)
    return gl.load(q + (vector * D)[:, None] + column[None, :], mask=exists[:, None], other=0.0)


@gluon.jit
def consume(
    which, q, ring, upto, doc_start, choice, scratch, sizes,
    K: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, PARTS: gl.constexpr, TOP: gl.constexpr,
    KEEP: gl.constexpr, SAMPLE: gl.constexpr, TOGETHER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Choose for one warp group's 64 tokens of each tile. `scratch` holds its candidates."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    KEPT: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    num_tokens, num_slots, num_blocks, num_tiles, window, first_token = sizes
    lists = scratch + (gl.program_id(0) * GROUPS + which) * (2 * ROWS * CAPACITY)
    zero = gl.zeros([ROWS, SLOTS], gl.float32, SCORES)
    column = gl.arange(0, SLOTS, layout=gl.SliceLayout(0, SCORES))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    scores = (lists + row * CAPACITY - (FIRST_PLACE + 1))[:, None]
    kept_column = gl.arange(0, KEEP, layout=gl.SliceLayout(0, KEPT))
    kept_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, KEPT))
    slot = 0
    phase = 0
    loaded = load_queries(q, gl.program_id(0), num_tiles, which, num_tokens, num_blocks, K, D)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, block, batch = place(tile, num_blocks, K)
        starts = doc_start + batch.to(gl.int64) * num_tokens
        begin, num_chunks, unmasked = slot_tiles(
            starts, block, num_tokens, num_slots, window, first_token, BLOCK, 4
        )
        token = block * TOKENS + which * ROWS
        _, lowest, highest = far_slots(starts, token + row, num_tokens, window, first_token, BLOCK)
        b_q = gl.convert_layout(loaded, OPERAND)

        # A bound that at least TOP scores reach: the TOP-th largest of the maxima of 64 groups.
        # With fewer tiles of slots, the bound is lower: it is reached by more scores.
        largest = gl.full([ROWS, SLOTS], float("-inf"), gl.float32, SCORES)
        for i in range(0, num_chunks, gl.maximum(num_chunks // SAMPLE, 1)):
            best, slot, phase = best_scores(b_q, ring, slot, phase, zero, PARTS, TOGETHER, STAGES)
            if i >= unmasked:
                best = mask_slots(best, begin + i * SLOTS + column, lowest, highest)
            largest = gl.maximum(largest, best)
        for _ in range(TOP - 1):
            largest = gl.where(largest == gl.max(largest, 1)[:, None], float("-inf"), largest)
        bound = gl.maximum(gl.max(largest, 1), MASKED)

        # Ids of empty places are negative and distinct. Places beyond TOP hold infinity.
        empty_score = gl.where(kept_column < TOP, float("-inf"), float("inf"))
        kept = gl.zeros([ROWS, KEEP], gl.float32, KEPT) + empty_score[None, :]
        ids = gl.zeros([ROWS, KEEP], gl.int32, KEPT) - 1 - kept_column[None, :]
        total = gl.full([ROWS], ZERO_PLACE, gl.float32, gl.SliceLayout(1, SCORES))
        taken = TOP
        for i in range(0, num_chunks):
            best, slot, phase = best_scores(b_q, ring, slot, phase, zero, PARTS, TOGETHER, STAGES)
            label = begin + i * SLOTS + column
            if i >= unmasked:
                best = mask_slots(best, label, lowest, highest)
            enters = best >= bound[:, None]
            mark = gl.convert_layout(enters.to(q.dtype.element_ty), OPERAND)
            number = warpgroup_mma(mark, upto, zero + total[:, None], is_async=True)
            number = warpgroup_mma_wait(0, deps=[number])
            target = scores + (number.to(gl.int32, bitcast=True) >> PLACE_BITS)
            gl.store(target, best, mask=enters)
            target = (target + ROWS * CAPACITY).to(gl.pointer_type(gl.int32), bitcast=True)
            gl.store(target, gl.zeros_like(number).to(gl.int32) + label[None, :], mask=enters)
            total = gl.max(number, 1)
            if gl.max(total, 0) > ZERO_PLACE + (CAPACITY - SLOTS):
                count = (total - ZERO_PLACE).to(gl.int32)
                kept, ids = keep_best(kept, ids, lists, count, taken, KEEP, KEPT)
                worst = gl.convert_layout(gl.min(kept, 1), gl.SliceLayout(1, SCORES))
                bound = gl.maximum(bound, worst)
                total = gl.zeros_like(total) + ZERO_PLACE
                taken = 0
        loaded = load_queries(
            q, tile + gl.num_programs(0), num_tiles, which, num_tokens, num_blocks, K, D
        )
        count = (total - ZERO_PLACE).to(gl.int32)
        kept, ids = keep_best(kept, ids, lists, count, taken, KEEP, KEPT)

        token = token + kept_row
        has_far, lowest, _ = far_slots(starts, token, num_tokens, window, first_token, BLOCK)
        target = ((batch.to(gl.int64) * num_tokens + token) * K + head) * (TOP + 1)
        exists = token < num_tokens
        gl.store(
            choice + target[:, None] + 1 + kept_column[None, :],
            gl.where(ids >= 0, ids - lowest[:, None], -1),
            mask=exists[:, None] & (kept_column < TOP)[None, :],
        )
        gl.store(choice + target, gl.where(has_far, 0, -1), mask=exists)


@gluon.jit
def new_memory(means, D: gl.constexpr, TOGETHER: gl.constexpr, STAGES: gl.constexpr):
    """The ring of slots with its barriers, and the triangular matrix of `consume`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    memory = gl.allocate_shared_memory(means.dtype, [STAGES, TOGETHER * SLOTS, D], means.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=GROUPS)
    # [i, j] = 1 if i <= j: a product with it counts the marked columns up to each column.
    upto = gl.allocate_shared_memory(means.dtype, [SLOTS, SLOTS], means.layout)
    i = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, LAYOUT))
    j = gl.arange(0, SLOTS, layout=gl.SliceLayout(0, LAYOUT))
    upto.store((i[:, None] <= j[None, :]).to(means.dtype))
    return (memory, full, empty), upto


@gluon.jit(do_not_specialize=SIZES)
def specialized_choice_kernel(
    q, means, doc_start, choice, scratch,
    num_tokens, num_slots, num_blocks, num_tiles, window, first_token,
    K: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, PARTS: gl.constexpr, TOP: gl.constexpr,
    KEEP: gl.constexpr, SAMPLE: gl.constexpr, TOGETHER: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """choice [B, Q, K, TOP + 1] int32, in any order; arguments as of `routed_choice`."""
    ring, upto = new_memory(means, D, TOGETHER, STAGES)
    fence_async_shared()
    barrier()
    sizes = (num_tokens, num_slots, num_blocks, num_tiles, window, first_token)
    gl.warp_specialize(
        [
            (consume, (0, q, ring, upto, doc_start, choice, scratch, sizes,
                       K, D, BLOCK, PARTS, TOP, KEEP, SAMPLE, TOGETHER, STAGES)),
            (consume, (1, q, ring, upto, doc_start, choice, scratch, sizes,
                       K, D, BLOCK, PARTS, TOP, KEEP, SAMPLE, TOGETHER, STAGES)),
            (produce, (means, ring, doc_start, sizes,
                       K, D, BLOCK, PARTS, SAMPLE, TOGETHER, STAGES)),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def specialized_choice(
    q: Tensor, means: Tensor, starts: Tensor, choice: Tensor, window: int, block: int, first: int
) -> None:
    """Write the choice [B, Q, K, top_k + 1] of summed queries q [B, Q, K, D], in any order.

    means [B, K, P, N, D] are for the whole row, starts [B, Q] for the queries.
    """
    batch, num_tokens, heads, size = q.shape
    parts, num_slots = means.shape[2:4]
    top_k = choice.shape[3] - 1
    together = 2 if parts % 2 == 0 else 1
    num_blocks = triton.cdiv(num_tokens, TOKENS.value)
    num_tiles = batch * num_blocks * heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs = min(num_tiles, processors)
    places = programs * TOKENS.value * 2 * CAPACITY.value
    scratch = torch.empty(places, dtype=torch.float32, device=q.device)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    tiles = TensorDescriptor(
        means, [means.numel() // size, size], [size, 1], [SLOTS.value, size], layout
    )
    with torch.cuda.device_of(q):
        specialized_choice_kernel[(programs,)](
            q, tiles, starts, choice, scratch,
            num_tokens, num_slots, num_blocks, num_tiles, window, first,
            K=heads, D=size, BLOCK=block, PARTS=parts, TOP=top_k,
            KEEP=max(2, triton.next_power_of_2(top_k)), SAMPLE=SAMPLED_TILES, TOGETHER=together,
            STAGES=8 // together, num_warps=4,
        )  # fmt: skip
