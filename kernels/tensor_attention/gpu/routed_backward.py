# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The routed hop backward on the GPU: a kernel that owns queries, and one that owns blocks.

The first iterates over a tile's open blocks and computes dq, delta = <dz, z> and the gradient of
the state. The second iterates over the tiles that read a block and computes dk and dvalues. The
formulas are those of any hop.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LOG2E,
    add_product,
    dot,
    load_rotated,
    load_tile,
    score_gradient,
    store_gradient,
    store_tile,
)
from .launch import tma_heads, tma_rows
from .routed_choice import rotate_stretched, slot_start
from .routed_forward import load_keys, query_rows
from .routed_launch import TILE, Routed
from .routed_lists import Readers, TileLists
from .routed_tiles import (
    Launch,
    backward_key_launch,
    backward_query_launch,
    backward_query_stages,
)

_SIZES = [
    "num_tokens", "num_keys", "first_token", "num_tiles", "num_slots", "window", "stretch",
    "readers_per_row",
]  # fmt: skip


class RoutedGradients(NamedTuple):
    """Gradients of a routed hop; dlse_before is [B, H, Q] float32."""

    dq: Tensor
    dk: Tensor
    dvalues: Tensor
    dz_before: Tensor
    dlse_before: Tensor


@triton.jit(do_not_specialize=_SIZES)
def routed_backward_query_kernel(
    q, k, values, doc_start, entries, counts, z, lse, z_before, lse_before, cos, sin,
    dz, dlse, dq, delta, dz_before, dlse_before,
    num_tokens, num_keys, first_token, num_tiles, window, stretch, scale, softmax_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    CAPACITY: tl.constexpr, TMA: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B,Q,H,D]; dz_before [B,Q,H,E]; delta (minus dlse), dlse_before [B,H,Q].

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
    b_dz = load_tile(dz, vector * E, exists, E, BLOCK_E)
    b_lse = tl.load(lse + scalar, mask=exists, other=0.0)
    offset = tl.where(exists, -b_lse * LOG2E, float("-inf"))
    b_z = load_tile(z, vector * E, exists, E, BLOCK_E)
    b_delta = tl.sum(b_dz.to(tl.float32) * b_z.to(tl.float32), 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + scalar, mask=exists, other=0.0)
    tl.store(delta + scalar, b_delta, mask=exists)

    b_before = tl.load(lse_before + scalar, mask=exists, other=float("-inf"))
    keep = tl.where(b_before > float("-inf"), tl.exp(b_before - b_lse), 0.0)
    b_z = load_tile(z_before, vector * E, exists, E, BLOCK_E)
    b_inner = tl.sum(b_dz.to(tl.float32) * b_z.to(tl.float32), 1)
    tl.store(dlse_before + scalar, keep * (b_inner - b_delta), mask=exists)
    store_tile(keep[:, None] * b_dz.to(tl.float32), dz_before, vector * E, exists, E, BLOCK_E)

    limit = tl.where(exists, first_token + token - window, -1)
    listed = (batch * K + key_head) * num_tiles + tile
    count = tl.load(counts + listed)
    entries += listed * CAPACITY
    acc = tl.zeros([TILE * GROUP, BLOCK_D], tl.float32)
    for place in range(0, count):
        entry = tl.load(entries + place)
        first = (entry >> 32).to(tl.int32)
        last = tl.where(((entry.to(tl.int32) & 0xFFFF) >> lane) & 1 != 0, limit, -1)
        for part in tl.static_range(BLOCK // BLOCK_N):
            start = first + part * BLOCK_N
            b_k = load_keys(k, key_head, key_zero, start, K, D, TMA, BLOCK_N, BLOCK_D)
            b_v = load_keys(values, key_head, key_zero, start, K, E, TMA, BLOCK_N, BLOCK_E)
            score = dot(b_q, tl.trans(b_k), PRECISION)
            inner = dot(b_dz, tl.trans(b_v), PRECISION)
            key = start + tl.arange(0, BLOCK_N)
            seen = key[None, :] <= last[:, None]
            _, dscore = score_gradient(
                score, inner, offset[:, None], b_delta[:, None], seen, scale, True
            )
            acc = add_product(acc, dscore.to(b_k.dtype), b_k, PRECISION)
    store_gradient(
        acc * softmax_scale, dq, vector * D, exists, position, cos, sin, D, BLOCK_D, False
    )


@triton.jit(do_not_specialize=_SIZES)
def routed_backward_key_kernel(
    q, k, values, doc_start, readers, ends, lse, dz, delta, k_cos, k_sin, dk, dvalues,
    num_tokens, num_keys, first_token, num_tiles, num_slots, window, stretch, readers_per_row,
    scale, softmax_scale,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [B,T,K,D], dvalues [B,T,K,E] of the tokens of one slot's block (others remain zero).

    doc_start is [B, T]; the queries are the tokens of the row from `first_token` on. The first
    programs own the first slot of each head, because all tiles of a long document read it.
    """
    program = tl.program_id(0)
    heads = tl.num_programs(0) // (num_slots * (BLOCK // BLOCK_N))
    cell = program % heads
    slot_part = 0
    rest = program - heads
    if rest >= 0:
        slot_part = 1 + rest % (num_slots * (BLOCK // BLOCK_N) - 1)
        cell = rest // (num_slots * (BLOCK // BLOCK_N) - 1)
    slot = slot_part // (BLOCK // BLOCK_N)
    part = slot_part % (BLOCK // BLOCK_N)
    key_head = cell % K
    batch = (cell // K).to(tl.int64)
    row_zero = batch * num_tokens
    key_zero = batch * num_keys
    doc_start += key_zero

    ends += (batch * K + key_head) * num_slots * GROUPS
    begin = tl.load(ends + slot * GROUPS - 1, mask=slot > 0, other=0)
    end = tl.load(ends + (slot + 1) * GROUPS - 1)
    if end > begin:
        block, document = slot_start(doc_start, slot, num_keys, True, BLOCK)
        start = block + part * BLOCK_N
        key = start + tl.arange(0, BLOCK_N)
        b_k = load_keys(k, key_head, key_zero, start, K, D, TMA, BLOCK_N, BLOCK_D)
        b_v = load_keys(values, key_head, key_zero, start, K, E, TMA, BLOCK_N, BLOCK_E)
        acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        acc_v = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
        row = tl.arange(0, TILE * GROUP)
        head = key_head * (H // K) + row % GROUP
        lane = row // GROUP
        readers += (batch * K + key_head) * readers_per_row
        for place in range(begin, end):
            reader = tl.load(readers + place)
            tile = (reader >> 16).to(tl.int32)
            token = tile * TILE + lane
            exists = (token < num_tokens) & (row % GROUP < H // K)
            reads = exists & ((((reader & 0xFFFF).to(tl.int32) >> lane) & 1) != 0)
            if TMA:
                zero = (row_zero + tile * TILE).to(tl.int32)
                b_q = q.load([zero, key_head * (H // K), 0]).reshape(TILE * GROUP, D)
                b_dz = dz.load([zero, key_head * (H // K), 0]).reshape(TILE * GROUP, E)
            else:
                vector = (row_zero + token) * H + head
                b_q = load_tile(q, vector * D, exists, D, BLOCK_D)
                b_dz = load_tile(dz, vector * E, exists, E, BLOCK_E)
            scalar = (batch * H + head) * num_tokens + token
            offset = tl.load(lse + scalar, mask=exists, other=float("inf")) * -LOG2E
            b_delta = tl.load(delta + scalar, mask=exists, other=0.0)
            score = dot(b_k, tl.trans(b_q), PRECISION)
            inner = dot(b_v, tl.trans(b_dz), PRECISION)
            seen = key[:, None] <= tl.where(reads, first_token + token - window, -1)[None, :]
            weight, dscore = score_gradient(
                score, inner, offset[None, :], b_delta[None, :], seen, scale, True
            )
            acc_v = add_product(acc_v, weight.to(b_dz.dtype), b_dz, PRECISION)
            acc_k = add_product(acc_k, dscore.to(b_q.dtype), b_q, PRECISION)
        vector = (key_zero + key) * K + key_head
        store_tile(acc_v, dvalues, vector * E, key >= 0, E, BLOCK_E)
        store_gradient(
            acc_k * softmax_scale, dk, vector * D, key >= 0, (key - document) // stretch,
            k_cos, k_sin, D, BLOCK_D, False,
        )  # fmt: skip


def query_gradients(
    routed: Routed, lists: TileLists, k: Tensor, state: tuple[Tensor, Tensor, Tensor, Tensor],
    dz: Tensor, dlse: Tensor | None, outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    launch: Launch | None = None,
) -> None:  # fmt: skip
    """Write the gradients of the queries and of the state.

    Args:
        routed, lists, dz, dlse: as in `routed_backward`.
        k: [B, T, K, D], rotated.
        state: z, lse, z_before, lse_before.
        outputs: dq, delta, dz_before, dlse_before.
        launch: parameters of the general kernel; None: the shape selects the kernel.
    """
    stages = backward_query_stages(routed) if launch is None else None
    if stages is not None:
        from .specialized_routed_query import specialized_routed_query

        specialized_routed_query(routed, lists, k, state, dz, dlse, outputs, stages)
        return
    launch = launch or backward_query_launch(routed)
    batch, num_tokens = routed.q.shape[:2]
    programs = batch * k.shape[2] * routed.tiles
    k_tiles, v_tiles = k, routed.values
    if launch.tma:
        k_tiles = tma_rows(k, routed.rows_of_block)
        v_tiles = tma_rows(routed.values, routed.rows_of_block)
    with torch.cuda.device_of(k):
        routed_backward_query_kernel[(programs,)](
            routed.q, k_tiles, v_tiles, routed.query_starts, lists.entries, lists.counts, *state,
            routed.cos, routed.sin, dz, dlse, *outputs,
            num_tokens, k.shape[1], routed.first, routed.tiles, routed.window, routed.stretch,
            routed.score_scale, routed.scale, CAPACITY=routed.capacity, TMA=launch.tma,
            num_warps=launch.warps, num_stages=launch.stages, **routed.constants(),
        )  # fmt: skip


def routed_backward(
    routed: Routed, lists: TileLists, readers: Readers, state: tuple[Tensor, Tensor],
    result: tuple[Tensor, Tensor], dz: Tensor, dlse: Tensor | None,
) -> RoutedGradients:  # fmt: skip
    """Gradients of one routed hop.

    Args:
        routed: the inputs of the hop.
        lists: open blocks of each tile.
        readers: tiles that read each block.
        state: (z [B, Q, H, E], lse [B, H, Q]) before the hop.
        result: (z, lse) after the hop.
        dz: gradient of z.
        dlse: gradient of lse; None: zero.
    """
    q, k, values = routed.q, routed.k, routed.values
    z_before, lse_before = state
    z, lse = result
    grads = RoutedGradients(
        torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(values),
        torch.empty_like(z), torch.empty_like(lse),
    )  # fmt: skip
    delta = torch.empty_like(lse)
    k_turned = rotate_stretched(k, routed.cos, routed.sin, routed.doc_start, routed.stretch)
    outputs = (grads.dq, delta, grads.dz_before, grads.dlse_before)
    query_gradients(
        routed, lists, k_turned, (z, lse, z_before, lse_before), dz, dlse, outputs
    )  # fmt: skip

    batch, num_tokens = q.shape[:2]
    key_heads = k.shape[2]
    launch = backward_key_launch(routed)
    q_turned = rotate_stretched(
        q, routed.cos, routed.sin, routed.query_starts, routed.stretch, routed.first
    )
    q_tiles, dz_tiles, k_tiles, v_tiles = q_turned, dz, k_turned, values
    if launch.tma:
        k_tiles = tma_rows(k_turned, routed.rows_of_block)
        v_tiles = tma_rows(values, routed.rows_of_block)
        q_tiles = tma_heads(q_turned, TILE, routed.padded_group)
        dz_tiles = tma_heads(dz, TILE, routed.padded_group)
    parts = routed.block // routed.rows_of_block
    with torch.cuda.device_of(q):
        routed_backward_key_kernel[(batch * key_heads * routed.slots * parts,)](
            q_tiles, k_tiles, v_tiles, routed.doc_start, readers.readers, readers.ends,
            lse, dz_tiles, delta, routed.cos, routed.sin, grads.dk, grads.dvalues,
            num_tokens, k.shape[1], routed.first, routed.tiles, routed.slots, routed.window,
            routed.stretch, readers.readers.shape[1], routed.score_scale, routed.scale,
            GROUPS=routed.tile_groups, TMA=launch.tma, num_warps=launch.warps,
            num_stages=launch.stages, **routed.constants(),
        )  # fmt: skip
    return grads
