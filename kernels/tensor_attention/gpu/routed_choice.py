# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The choice of blocks on the GPU: mean keys, and a streaming top-k that never stores scores.

A program processes a tile of tokens of one key head and makes two passes over the slots before
them. The first finds a bound that at least `top_k` scores of each token reach. The second finds the
best of the scores that reach the bound. It keeps `top_k` blocks: while the best new score of any
token exceeds its worst kept score, such tokens exchange the two. With the bound, there are about as
many exchanges as blocks to choose.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routing import num_parts
from .common import MASKED, dot, load_rotated, load_tile, store_tile
from .launch import padded, precision_of, tma_rows
from .routed_launch import starts_of
from .routed_tiles import choice_launch, has_choice_ring

_SIZES = ["num_tokens", "num_slots", "num_blocks", "window", "num_rows", "first", "first_token"]


@triton.jit(do_not_specialize=_SIZES)
def rotate_stretched_kernel(
    x, out, cos, sin, doc_start, num_rows, stretch,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    num_tokens=0, first=0,
):  # fmt: skip
    """out[b, i, h] = x[b, i, h] rotated to position floor((t - d(t)) / stretch), t = first + i.

    A row is one head; doc_start [B, num_tokens] is for these tokens.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    exists = row < num_rows
    token = row // HEADS
    start = tl.load(doc_start + token, mask=exists, other=0)
    position = (first + token % num_tokens - start) // stretch
    tile = load_rotated(x, row * SIZE, exists, position, cos, sin, SIZE, BLOCK)
    store_tile(tile, out, row * SIZE, exists, SIZE, BLOCK)


def rotate_stretched(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    doc_start: Tensor,
    stretch: int,
    first: int = 0,
) -> Tensor:
    """A copy of `x` [B, Q, H, D] rotated to stretched positions; `x` itself if `cos` is None.

    doc_start [B, Q] is for the tokens of `x`, the tokens of the row from `first` on.
    """
    if cos is None:
        return x
    out = torch.empty_like(x)
    batch, num_tokens, heads, size = x.shape
    num_rows, block_rows = batch * num_tokens * heads, 32
    with torch.cuda.device_of(x):
        rotate_stretched_kernel[(triton.cdiv(num_rows, block_rows),)](
            x, out, cos, sin, doc_start, num_rows, stretch, HEADS=heads, SIZE=size,
            BLOCK_ROWS=block_rows, BLOCK=padded(size), num_tokens=num_tokens, first=first,
        )  # fmt: skip
    return out


@triton.jit
def slot_start(doc_start, slot, num_tokens, exists, BLOCK: tl.constexpr):
    """First token of each slot's block, and of its document (`routing.block_starts`)."""
    last = tl.minimum(slot * BLOCK + BLOCK - 1, num_tokens - 1)
    document = tl.load(doc_start + last, mask=exists, other=0)
    return document + (last - document) // BLOCK * BLOCK, document


@triton.jit(do_not_specialize=_SIZES)
def pooled_key_kernel(
    k, doc_start, means, num_tokens, num_slots,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """means [B, K, P, N, D]: means of keys k [B, T, K, D] over the P parts of each slot's block."""
    POOL: tl.constexpr = BLOCK // PARTS
    slot = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    start, _ = slot_start(doc_start + batch * num_tokens, slot, num_tokens, True, BLOCK)
    for part in tl.static_range(PARTS):
        token = tl.minimum(start + part * POOL + tl.arange(0, POOL), num_tokens - 1)
        row = (batch * num_tokens + token) * K + head
        tile = load_tile(k, row * D, token >= 0, D, BLOCK_D).to(tl.float32)
        mean = tl.sum(tile, 0) / POOL
        place = ((batch * K + head) * PARTS + part) * num_slots + slot
        target = place * D + tl.zeros([1], tl.int64)
        store_tile(mean[None, :], means, target, target >= 0, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def query_sum_kernel(
    q, out, num_rows,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, Q, K, D]: sum of the queries q [B, Q, K GROUP, D]; a row is one key head."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    exists = row < num_rows
    total = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for head in range(GROUP):
        total += load_tile(q, (row * GROUP + head) * SIZE, exists, SIZE, BLOCK).to(tl.float32)
    store_tile(total, out, row * SIZE, exists, SIZE, BLOCK)


@triton.jit
def part_scores(
    b_q, means, row_zero, first, part, num_slots,
    D: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, BLOCK_N] of one part of slots first, first + 1, ...."""
    row = row_zero + part * num_slots + first
    if TMA:
        b_mean = means.load([row, 0])
    else:
        place = tl.arange(0, BLOCK_N)
        listed = first + place < num_slots
        b_mean = load_tile(means, (row + place).to(tl.int64) * D, listed, D, BLOCK_D)
    return dot(b_q, tl.trans(b_mean), PRECISION)


@triton.jit
def mask_slots(score, slot, lowest, highest):
    """Set scores of slots outside (lowest, highest] to -inf."""
    allowed = (slot[None, :] > lowest[:, None]) & (slot[None, :] <= highest[:, None])
    return tl.where(allowed, score, float("-inf"))


@triton.jit
def exchange(kept, ids, score, slot):
    """Replace the worst kept scores by better new ones, the best first; ties: earlier slots first.

    kept, ids [BLOCK_M, KEEP]: scores and slots kept so far. score [BLOCK_M, BLOCK_N]: new scores of
    the slots slot [BLOCK_N], ascending and above all kept slots.
    """
    best = tl.max(score, 1)
    worst = tl.min(kept, 1)
    while tl.max((best > worst).to(tl.int32)) > 0:
        enters = best > worst
        entering = tl.min(tl.where(score == best[:, None], slot[None, :], 2147483647), 1)
        leaving = tl.max(tl.where(kept == worst[:, None], ids, -2147483648), 1)
        here = enters[:, None] & (ids == leaving[:, None])
        kept = tl.where(here, best[:, None], kept)
        ids = tl.where(here, entering[:, None], ids)
        taken = enters[:, None] & (slot[None, :] == entering[:, None])
        score = tl.where(taken, float("-inf"), score)
        best = tl.max(score, 1)
        worst = tl.min(kept, 1)
    return kept, ids


@triton.jit(do_not_specialize=_SIZES)
def choose_kernel(
    q, means, doc_start, choice, num_tokens, num_slots, num_blocks, window, first_token,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, TOP: tl.constexpr,
    KEEP: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """choice [B, Q, K, TOP + 1] int32, in any order. Program: (batch, block of tokens, key head).

    q [B, Q, K, D] is summed over groups; doc_start [B, Q]; means [B, K, P, N, D].
    """
    program = tl.program_id(0)
    block = num_blocks - 1 - program % num_blocks
    key_head = program // num_blocks % K
    batch = (program // num_blocks // K).to(tl.int64)
    token = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = token < num_tokens
    document = tl.load(doc_start + batch * num_tokens + token, mask=exists, other=0)
    vector = ((batch * num_tokens + token) * K + key_head) * D
    b_q = load_tile(q, vector, exists, D, BLOCK_D)
    # Far blocks of a document are adjacent slots; its first block needs no score.
    before = first_token + token - window
    has_far = exists & (before >= document)
    lowest = document // BLOCK
    highest = tl.where(has_far, lowest + (before - document) // BLOCK, -1)
    begin = tl.min(tl.where(has_far, lowest + 1, num_slots))
    end = tl.max(highest) + 1
    row_zero = program // num_blocks * (PARTS * num_slots)
    # Every token may choose slots [begin, inner_end): no mask.
    shared_end = tl.min(highest) + 1
    shared = (shared_end > begin) & (tl.max(lowest) < begin)
    inner_end = begin + tl.where(shared, shared_end - begin, 0) // BLOCK_N * BLOCK_N

    # Both passes load one part of a tile of slots per iteration, so that few loads are in flight
    # and several programs share a multiprocessor.
    column = tl.arange(0, BLOCK_N)
    # A bound that at least TOP scores reach: the TOP-th largest of the maxima of BLOCK_N groups.
    bound = tl.full([BLOCK_M], MASKED, tl.float32)
    if TOP < BLOCK_N:
        largest = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        for region in tl.static_range(2):
            if region == 0:
                region_begin, region_end = begin, inner_end
            else:
                region_begin, region_end = inner_end, end
            for i in range(0, tl.cdiv(region_end - region_begin, BLOCK_N) * PARTS):
                first = region_begin + i // PARTS * BLOCK_N
                score = part_scores(
                    b_q, means, row_zero, first, i % PARTS, num_slots, D, TMA,
                    BLOCK_N, BLOCK_D, PRECISION,
                )  # fmt: skip
                if region != 0:
                    score = mask_slots(score, first + column, lowest, highest)
                largest = tl.maximum(largest, score)
        for _ in range(TOP - 1):
            largest = tl.where(largest == tl.max(largest, 1)[:, None], float("-inf"), largest)
        bound = tl.maximum(tl.max(largest, 1), bound)

    # The blocks kept so far. Ids of empty places are negative and distinct. Places beyond TOP hold
    # infinity and are never replaced.
    place = tl.arange(0, KEEP)
    kept = (
        tl.zeros([BLOCK_M, KEEP], tl.float32)
        + tl.where(place < TOP, float("-inf"), float("inf"))[None, :]
    )
    ids = tl.zeros([BLOCK_M, KEEP], tl.int32) - 1 - place[None, :]
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    for i in range(0, tl.cdiv(end - begin, BLOCK_N) * PARTS):
        first = begin + i // PARTS * BLOCK_N
        score = part_scores(
            b_q, means, row_zero, first, i % PARTS, num_slots, D, TMA, BLOCK_N, BLOCK_D, PRECISION
        )
        best = tl.maximum(best, score)
        if i % PARTS == PARTS - 1:
            best = mask_slots(best, first + column, lowest, highest)
            best = tl.where(best >= bound[:, None], best, float("-inf"))
            kept, ids = exchange(kept, ids, best, first + column)
            best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)

    target = ((batch * num_tokens + token) * K + key_head) * (TOP + 1)
    index = tl.where(ids >= 0, ids - lowest[:, None], -1)
    tl.store(
        choice + target[:, None] + 1 + place[None, :],
        index,
        mask=exists[:, None] & (place < TOP)[None, :],
    )
    tl.store(choice + target, tl.where(has_far, 0, -1), mask=exists)


def summed_queries(q: Tensor, num_key_heads: int) -> Tensor:
    """[B, Q, K, D]: the sum of the queries of each key head's group, rounded once."""
    batch, num_tokens, heads, size = q.shape
    out = q.new_empty(batch, num_tokens, num_key_heads, size)
    num_rows, block_rows = batch * num_tokens * num_key_heads, 32
    with torch.cuda.device_of(q):
        query_sum_kernel[(triton.cdiv(num_rows, block_rows),)](
            q, out, num_rows, GROUP=heads // num_key_heads, SIZE=size, BLOCK_ROWS=block_rows,
            BLOCK=padded(size),
        )  # fmt: skip
    return out


def mean_keys(k: Tensor, doc_start: Tensor, block: int, parts: int) -> Tensor:
    """[B, K, P, N, D]: means of keys k [B, T, K, D] over the P parts of each slot's block."""
    batch, num_keys, key_heads, size = k.shape
    num_slots = triton.cdiv(num_keys, block)
    means = k.new_empty(batch, key_heads, parts, num_slots, size)
    with torch.cuda.device_of(k):
        pooled_key_kernel[(num_slots, key_heads, batch)](
            k, doc_start, means, num_keys, num_slots,
            K=key_heads, D=size, BLOCK=block, PARTS=parts, BLOCK_D=padded(size), num_warps=4,
        )  # fmt: skip
    return means


def write_choice(
    q: Tensor, means: Tensor, starts: Tensor, choice: Tensor, window: int, block: int, first: int
) -> None:
    """Write the choice [B, Q, K, top_k + 1] of summed queries q [B, Q, K, D], in any order.

    means [B, K, P, N, D] are for the whole row, starts [B, Q] for the queries.
    """
    batch, num_tokens, key_heads, size = q.shape
    parts, num_slots = means.shape[2:4]
    top_k = choice.shape[3] - 1
    launch = choice_launch(q, top_k)
    num_blocks = triton.cdiv(num_tokens, launch.tokens)
    rows = tma_rows(means.view(1, -1, 1, size), launch.slots) if launch.tma else means
    with torch.cuda.device_of(q):
        choose_kernel[(batch * num_blocks * key_heads,)](
            q, rows, starts, choice, num_tokens, num_slots, num_blocks,
            window, first, K=key_heads, D=size, BLOCK=block, PARTS=parts, TOP=top_k,
            KEEP=max(2, triton.next_power_of_2(top_k)), TMA=launch.tma,
            BLOCK_M=launch.tokens, BLOCK_N=launch.slots, BLOCK_D=padded(size),
            PRECISION=precision_of(q.dtype), num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip


def choose(
    q: Tensor, k: Tensor, doc_start: Tensor, window: int, block: int, top_k: int, pool: int,
    first: int,
) -> Tensor:  # fmt: skip
    """The choice [B, Q, K, top_k + 1] int32 of the tokens from `first` on, in any order.

    All tensors are contiguous; k [B, T, K, D] and doc_start [B, T] are for the whole row.
    """
    batch, num_tokens = q.shape[:2]
    key_heads = k.shape[2]
    starts = starts_of(doc_start, first, num_tokens)
    q = summed_queries(q, key_heads)
    means = mean_keys(k, doc_start, block, num_parts(block, pool))
    choice = torch.empty(
        batch, num_tokens, key_heads, top_k + 1, dtype=torch.int32, device=q.device
    )
    if has_choice_ring(q, top_k, means.shape[2]):
        from .specialized_choice import specialized_choice

        specialized_choice(q, means, starts, choice, window, block, first)
    else:
        write_choice(q, means, starts, choice, window, block, first)
    return choice
