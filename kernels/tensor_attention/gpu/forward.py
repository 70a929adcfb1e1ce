# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""One hop forward on the GPU: banded causal attention over rows, starting from a state.

Each program processes one tile of queries (block_m / pack tokens of `pack` query heads that share a
key head). It iterates over their keys, from the first row that any of its queries reaches to the
diagonal, with a running maximum and sum as in FlashAttention-2 (Dao, 2023). The state of the
previous hop acts as one more key: it sets the initial maximum, sum and values.
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
    first_visible,
    load_rotated,
    load_tile,
    locate,
    store_tile,
)
from .forward_line import forward_lines
from .launch import SIZES, Hop, Tiles, tma_rows
from .tiles import forward_line_tiles, forward_ring, forward_tiles


@triton.jit
def attend(
    acc, top, total, q, first, last, offset, begin, end, row_zero,
    k, values, key_head, value_head, cos, sin, num_tokens, num_rows, steps, stride, scale,
    K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    MASK: tl.constexpr, TMA: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys of rows [begin, end) to the running (values, maximum, sum), base 2."""
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        token, step, exists = locate(key, num_tokens, num_rows, steps, stride, STRIDED)
        token = token.to(tl.int64)
        if TMA:
            b_k = k.load([row_zero + start, key_head * D])
        else:
            b_k = load_rotated(k, (token * K + key_head) * D, exists, step, cos, sin, D, BLOCK_D)
        score = dot(q, tl.trans(b_k), PRECISION)
        if MASK:
            seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
            score = tl.where(seen, score, MASKED)
        top_next = tl.maximum(top, tl.max(score, 1) * scale + offset)
        weight = tl.exp2(score * scale + (offset - top_next)[:, None])
        keep = tl.exp2(top - top_next)
        total = total * keep + tl.sum(weight, 1)
        acc = acc * keep[:, None]
        if TMA:
            b_v = values.load([row_zero + start, value_head * E])
        else:
            b_v = load_tile(values, (token * V + value_head) * E, exists, E, BLOCK_E)
        acc = add_product(acc, weight.to(b_v.dtype), b_v, PRECISION)
        top = top_next
    return acc, top, total


@triton.jit(do_not_specialize=SIZES)
def hop_forward_kernel(
    q, k, values, reach, bias, z_before, lse_before, q_cos, q_sin, k_cos, k_sin, z, lse,
    num_tokens, num_rows, steps, stride, length, num_blocks, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    TMA: tl.constexpr, STRIDED: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q [B,T,H,D], k [B,T,K,D], values [B,T,V,E], reach [B,T], state and results z [B,T,H,E], lse
    [B,H,T]. Program: (batch, block of rows from the last, group of PACK heads), heads fastest.
    """
    BLOCK_T: tl.constexpr = BLOCK_M // PACK
    NEAREST: tl.constexpr = 0 if lse_before is None else 1
    program = tl.program_id(0)
    head_block = program % (H // PACK)
    block = num_blocks - 1 - program // (H // PACK) % num_blocks
    batch = (program // (H // PACK) // num_blocks).to(tl.int64)
    key_head = head_block * PACK // (H // K)
    value_head = head_block * PACK // (H // V)
    q += batch * num_tokens * H * D
    row_zero = program // (H // PACK) // num_blocks * num_tokens
    if not TMA:
        k += batch * num_tokens * K * D
        values += batch * num_tokens * V * E
    reach += batch * num_tokens
    z += batch * num_tokens * H * E
    lse += batch * num_tokens * H

    # The queries: PACK heads of BLOCK_T tokens, heads fastest.
    lane = tl.arange(0, BLOCK_M)
    head = head_block * PACK + lane % PACK
    row = block * BLOCK_T + lane // PACK
    token, step, exists = locate(row, num_tokens, num_rows, steps, stride, STRIDED)
    first = first_visible(reach, row, token, step, exists, length)
    token = token.to(tl.int64)
    b_q = load_rotated(q, (token * H + head) * D, exists, step, q_cos, q_sin, D, BLOCK_D)
    state_row = head.to(tl.int64) * num_tokens + token
    if bias is not None:
        offset = tl.load(bias + head).to(tl.float32) * LOG2E
    else:
        offset = tl.zeros([BLOCK_M], tl.float32)

    if lse_before is not None:
        lse_before += batch * num_tokens * H
        z_before += batch * num_tokens * H * E
        lse_zero = tl.load(lse_before + state_row, mask=exists, other=0.0) * LOG2E
        top = tl.maximum(lse_zero, FLOOR)
        total = tl.exp2(lse_zero - top)
        acc = load_tile(z_before, (token * H + head) * E, exists, E, BLOCK_E).to(tl.float32)
        acc = acc * total[:, None]
    else:
        top = tl.full([BLOCK_M], FLOOR, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)

    # Three ranges of keys: masked by window or document, read by all queries, masked by causality.
    end = tl.minimum((block + 1) * BLOCK_T, num_rows)
    begin = tl.min(tl.where(first <= row - NEAREST, first, end)) // BLOCK_N * BLOCK_N
    inner_end = (block * BLOCK_T + 1 - NEAREST) // BLOCK_N * BLOCK_N
    inner = tl.cdiv(tl.max(tl.where(exists, first, 0)), BLOCK_N) * BLOCK_N
    inner = tl.maximum(tl.minimum(inner, inner_end), begin)
    inner_end = tl.maximum(inner, inner_end)
    for part in tl.static_range(3):
        if part == 0:
            part_begin, part_end = begin, inner
        elif part == 1:
            part_begin, part_end = inner, inner_end
        else:
            part_begin, part_end = inner_end, end
        acc, top, total = attend(
            acc, top, total, b_q, first, row - NEAREST, offset, part_begin, part_end,
            row_zero, k, values, key_head, value_head, k_cos, k_sin,
            num_tokens, num_rows, steps, stride, scale, K, V, D, E, part != 1, TMA, STRIDED,
            BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip

    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    store_tile(acc, z, (token * H + head) * E, exists, E, BLOCK_E)
    tl.store(lse + state_row, (top + tl.log2(total)) * LN2, mask=exists)


def hop_forward(hop: Hop, z: Tensor, lse: Tensor, tiles: Tiles | None = None) -> None:
    """Write one hop into `z` [B, T, H, E] and `lse` [B, H, T] float32, both contiguous.

    Args:
        tiles: tiles of the general kernel; None: the table chooses the kernel and its tiles.
    """
    line_tiles = forward_line_tiles(hop) if tiles is None else None
    if line_tiles is not None:
        forward_lines(hop, z, lse, line_tiles)
        return
    ring = forward_ring(hop) if tiles is None else None
    if ring is not None:
        from .specialized_forward import specialized_forward

        specialized_forward(hop, hop.rotated(hop.k, True)[0], z, lse, ring)
        return
    tiles = tiles or forward_tiles(hop)
    k, k_cos, k_sin = hop.rotated(hop.k, tiles.rotate_first)
    values = hop.values
    if tiles.tma:
        k, values = tma_rows(k, tiles.block_n), tma_rows(values, tiles.block_n)
    num_blocks = triton.cdiv(hop.rows, tiles.block_m // tiles.pack)
    batch, heads = hop.q.shape[0], hop.q.shape[2]
    with torch.cuda.device_of(hop.q):
        hop_forward_kernel[(batch * num_blocks * (heads // tiles.pack),)](
            hop.q, k, values, hop.reach, hop.bias, hop.z_before, hop.lse_before,
            hop.cos, hop.sin, k_cos, k_sin, z, lse, *hop.walk(num_blocks),
            TMA=tiles.tma, PACK=tiles.pack, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            num_warps=tiles.warps, num_stages=tiles.stages, **hop.constants(),
        )  # fmt: skip
