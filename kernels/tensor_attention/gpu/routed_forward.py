# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The routed hop forward on the GPU: each tile of queries reads the union of its open blocks.

A program processes TILE tokens of all query heads of one key head. It iterates over its list of
blocks with a running maximum and sum, which start from the state of the window.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    FLOOR,
    LN2,
    LOG2E,
    MASKED,
    add_product,
    dot,
    load_rotated,
    load_tile,
    store_tile,
)
from .launch import tma_rows
from .routed_choice import rotate_stretched
from .routed_launch import Routed
from .routed_lists import TileLists
from .routed_tiles import Launch, forward_launch, forward_stages

_SIZES = ["num_tokens", "num_keys", "first_token", "num_tiles", "window", "stretch"]


@triton.jit
def query_rows(
    program, num_tiles, num_tokens,
    K: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Tile, key head and batch of a program, and its rows: TILE tokens of GROUP heads, heads
    fastest. Programs of one key head are adjacent, so that its keys stay in the cache.
    """
    tile = num_tiles - 1 - program % num_tiles
    key_head = program // num_tiles % K
    batch = (program // num_tiles // K).to(tl.int64)
    row = tl.arange(0, TILE * GROUP)
    token = tile * TILE + row // GROUP
    exists = (token < num_tokens) & (row % GROUP < HEADS)
    return tile, key_head, batch, token, key_head * HEADS + row % GROUP, row // GROUP, exists


@triton.jit
def load_keys(
    k, head, num_rows_before, start, N: tl.constexpr, SIZE: tl.constexpr,
    TMA: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, COLUMNS] tile of one head of `k` [B T, N, SIZE], from token `start` of a row."""
    if TMA:
        tile = k.load([(num_rows_before + start).to(tl.int32), head * SIZE])
    else:
        row = num_rows_before + start + tl.arange(0, BLOCK_N)
        tile = load_tile(k, (row * N + head) * SIZE, row >= 0, SIZE, COLUMNS)
    return tile


@triton.jit(do_not_specialize=_SIZES)
def routed_forward_kernel(
    q, k, values, doc_start, entries, counts, z_before, lse_before, cos, sin, z, lse,
    num_tokens, num_keys, first_token, num_tiles, window, stretch, scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    CAPACITY: tl.constexpr, TMA: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, z_before, z [B,Q,H,.]; k, values [B,T,K,.]; lse_before, lse [B,H,Q]. Program: a tile.

    doc_start [B, Q] is for the queries, the tokens of the row from `first_token` on.
    """
    tile, key_head, batch, token, head, lane, exists = query_rows(
        tl.program_id(0), num_tiles, num_tokens, K, TILE, GROUP, H // K
    )
    row_zero = batch * num_tokens
    key_zero = batch * num_keys
    document = tl.load(doc_start + row_zero + token, mask=exists, other=0)
    position = (first_token + token - document) // stretch
    vector = (row_zero + token) * H + head
    scalar = (batch * H + head) * num_tokens + token
    b_q = load_rotated(q, vector * D, exists, position, cos, sin, D, BLOCK_D)
    lse_zero = tl.load(lse_before + scalar, mask=exists, other=0.0) * LOG2E
    top = tl.maximum(lse_zero, FLOOR)
    total = tl.exp2(lse_zero - top)
    acc = load_tile(z_before, vector * E, exists, E, BLOCK_E).to(tl.float32) * total[:, None]

    limit = tl.where(exists, first_token + token - window, -1)
    listed = (batch * K + key_head) * num_tiles + tile
    count = tl.load(counts + listed)
    entries += listed * CAPACITY
    for place in range(0, count):
        entry = tl.load(entries + place)
        first = (entry >> 32).to(tl.int32)
        last = tl.where(((entry.to(tl.int32) & 0xFFFF) >> lane) & 1 != 0, limit, -1)
        for part in tl.static_range(BLOCK // BLOCK_N):
            start = first + part * BLOCK_N
            b_k = load_keys(k, key_head, key_zero, start, K, D, TMA, BLOCK_N, BLOCK_D)
            score = dot(b_q, tl.trans(b_k), PRECISION)
            key = start + tl.arange(0, BLOCK_N)
            score = tl.where(key[None, :] <= last[:, None], score, MASKED)
            top_next = tl.maximum(top, tl.max(score, 1) * scale)
            weight = tl.exp2(score * scale - top_next[:, None])
            keep = tl.exp2(top - top_next)
            total = total * keep + tl.sum(weight, 1)
            acc = acc * keep[:, None]
            b_v = load_keys(values, key_head, key_zero, start, K, E, TMA, BLOCK_N, BLOCK_E)
            acc = add_product(acc, weight.to(b_v.dtype), b_v, PRECISION)
            top = top_next

    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    store_tile(acc, z, vector * E, exists, E, BLOCK_E)
    tl.store(lse + scalar, (top + tl.log2(total)) * LN2, mask=exists)


def routed_forward(
    routed: Routed, lists: TileLists, z_before: Tensor, lse_before: Tensor, z: Tensor, lse: Tensor,
    launch: Launch | None = None,
) -> None:  # fmt: skip
    """Write z [B, Q, H, E] and lse [B, H, Q] float32 of a hop that starts from a state.

    Args:
        launch: parameters of the general kernel; None: the shape selects the kernel.
    """
    stages = forward_stages(routed) if launch is None else None
    if stages is not None:
        from .specialized_routed import specialized_routed

        specialized_routed(routed, lists, z_before, lse_before, z, lse, stages)
        return
    launch = launch or forward_launch(routed)
    k = rotate_stretched(routed.k, routed.cos, routed.sin, routed.doc_start, routed.stretch)
    values = routed.values
    if launch.tma:
        k, values = tma_rows(k, routed.rows_of_block), tma_rows(values, routed.rows_of_block)
    batch, num_tokens = routed.q.shape[:2]
    with torch.cuda.device_of(routed.q):
        routed_forward_kernel[(batch * routed.k.shape[2] * routed.tiles,)](
            routed.q, k, values, routed.query_starts, lists.entries, lists.counts,
            z_before, lse_before, routed.cos, routed.sin, z, lse,
            num_tokens, routed.k.shape[1], routed.first, routed.tiles, routed.window,
            routed.stretch, routed.score_scale,
            CAPACITY=routed.capacity, TMA=launch.tma, num_warps=launch.warps,
            num_stages=launch.stages, **routed.constants(),
        )  # fmt: skip
