# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The backward kernel that owns keys: dk and the gradient of the values."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LOG2E,
    add_product,
    dot,
    first_visible,
    load_rotated,
    load_tile,
    locate,
    score_gradient,
    store_gradient,
    store_tile,
)
from .launch import SIZES, Hop, Tiles, Turned, tma_heads, tma_rows
from .tiles import backward_key_tiles

# Rows whose reach a program reads at a time to find the queries that attend to its keys.
_SCAN = 1024


@triton.jit
def gather_dk(
    acc_k, acc_v, b_k, b_v, key, begin, end,
    q, dz, reach, bias, lse, delta, dlse, cos, sin, head_first, per_query, row_zero,
    num_tokens, num_rows, steps, stride, length, scale,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, NEAREST: tl.constexpr,
    MASK: tl.constexpr, TMA: tl.constexpr, STRIDED: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contributions of the queries of rows [begin, end) to dk, dvalues (transposed)."""
    lane = tl.arange(0, BLOCK_M)
    head = head_first + lane % PACK
    for start in range(begin, end, BLOCK_M // PACK):
        row = start + lane // PACK
        token, step, exists = locate(row, num_tokens, num_rows, steps, stride, STRIDED)
        vector = per_query + token.to(tl.int64) * H + head
        scalar = per_query + head * num_tokens + token
        if TMA:
            b_q = q.load([row_zero + start, head_first, 0]).reshape(BLOCK_M, D)
            b_dz = dz.load([row_zero + start, head_first, 0]).reshape(BLOCK_M, E)
        else:
            b_q = load_rotated(q, vector * D, exists, step, cos, sin, D, BLOCK_D)
            b_dz = load_tile(dz, vector * E, exists, E, BLOCK_E)
        offset = tl.load(lse + scalar, mask=exists, other=float("inf")) * -LOG2E
        if bias is not None:
            offset += tl.load(bias + head).to(tl.float32) * LOG2E
        b_delta = tl.load(delta + scalar, mask=exists, other=0.0)
        if dlse is not None:
            b_delta -= tl.load(dlse + scalar, mask=exists, other=0.0)
        score = dot(b_k, tl.trans(b_q), PRECISION)
        inner = dot(b_v, tl.trans(b_dz), PRECISION)
        seen = key[:, None] <= row[None, :] - NEAREST
        if MASK:
            first = first_visible(reach, row, token, step, exists, length)
            seen = seen & (key[:, None] >= first[None, :])
        weight, dscore = score_gradient(
            score, inner, offset[None, :], b_delta[None, :], seen, scale, MASK
        )
        acc_v = add_product(acc_v, weight.to(b_dz.dtype), b_dz, PRECISION)
        acc_k = add_product(acc_k, dscore.to(b_q.dtype), b_q, PRECISION)
    return acc_k, acc_v


@triton.jit
def query_range(
    reach, begin, num_tokens, num_rows, steps, stride, length,
    STRIDED: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Queries that attend to the keys of rows [begin, begin + BLOCK_N): (end, inner end).

    Queries of rows [begin, end) attend to some of the keys; those of rows [begin + BLOCK_N, inner
    end) to all of them. `reach` may vary arbitrarily along a line.
    """
    last_key = tl.minimum(begin + BLOCK_N, num_rows) - 1
    limit = tl.minimum((last_key // steps + 1) * steps, last_key + length)
    end, inner_end = begin, limit
    for start in range(begin, limit, SCAN):
        row = start + tl.arange(0, SCAN)
        token, step, exists = locate(row, num_tokens, num_rows, steps, stride, STRIDED)
        exists = exists & (row < limit)
        first = first_visible(reach, row, token, step, exists, length)
        end = tl.maximum(end, tl.max(tl.where(exists & (first <= last_key), row + 1, begin)))
        cut = exists & (row >= begin + BLOCK_N) & (first > begin)
        inner_end = tl.minimum(inner_end, tl.min(tl.where(cut, row, limit)))
    return end, inner_end


@triton.jit(do_not_specialize=SIZES)
def hop_backward_key_kernel(
    q, k, values, reach, bias, lse, lse_before, q_cos, q_sin, k_cos, k_sin, dk_cos, dk_sin,
    dz, dlse, delta, dk, dvalues, delta_before,
    num_tokens, num_rows, steps, stride, length, num_blocks, scale, softmax_scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    ACCUMULATE: tl.constexpr, TMA: tl.constexpr, STRIDED: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, SCAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [B,T,K,D]; dvalues [B,T,V,E]. If delta_before [B,H,T] is given, the values are the state's
    z: dvalues includes the state's gradient, and delta_before is set to <dvalues, values>.
    Program: (batch, block of rows, key head), heads fastest.
    """
    BLOCK_T: tl.constexpr = BLOCK_M // PACK
    NEAREST: tl.constexpr = 0 if lse_before is None else 1
    G: tl.constexpr = H // K
    program = tl.program_id(0)
    key_head = program % K
    block = program // K % num_blocks
    batch = (program // K // num_blocks).to(tl.int64)
    row_zero = program // K // num_blocks * num_tokens
    per_query = batch * num_tokens * H
    per_value = batch * num_tokens * V
    reach += batch * num_tokens

    begin = block * BLOCK_N
    key = begin + tl.arange(0, BLOCK_N)
    token, step, exists = locate(key, num_tokens, num_rows, steps, stride, STRIDED)
    token = token.to(tl.int64)
    end, inner_end = query_range(
        reach, begin, num_tokens, num_rows, steps, stride, length, STRIDED, BLOCK_N, SCAN
    )
    diagonal_end = tl.minimum(begin + BLOCK_N, end)
    inner_end = begin + BLOCK_N + (inner_end - begin - BLOCK_N) // BLOCK_T * BLOCK_T
    inner_end = tl.maximum(tl.minimum(inner_end, end), diagonal_end)

    vector_k = (batch * num_tokens + token) * K + key_head
    if TMA:
        b_k = k.load([row_zero + begin, key_head * D])
    else:
        b_k = load_rotated(k, vector_k * D, exists, step, k_cos, k_sin, D, BLOCK_D)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if V != H:
        vector_v = per_value + token * V + key_head
        if TMA:
            b_v = values.load([row_zero + begin, key_head * E])
        else:
            b_v = load_tile(values, vector_v * E, exists, E, BLOCK_E)
        acc_v = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for group in range(0, G, PACK):
        head = key_head * G + group
        if V == H:
            vector_v = per_value + token * V + head
            if TMA:
                b_v = values.load([row_zero + begin, head * E])
            else:
                b_v = load_tile(values, vector_v * E, exists, E, BLOCK_E)
            acc_v = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
        for part in tl.static_range(3):
            if part == 0:
                part_begin, part_end = begin, diagonal_end
            elif part == 1:
                part_begin, part_end = diagonal_end, inner_end
            else:
                part_begin, part_end = inner_end, end
            acc_k, acc_v = gather_dk(
                acc_k, acc_v, b_k, b_v, key, part_begin, part_end,
                q, dz, reach, bias, lse, delta, dlse, q_cos, q_sin, head, per_query, row_zero,
                num_tokens, num_rows, steps, stride, length, scale, H, D, E, NEAREST,
                part != 1, TMA, STRIDED, PACK, BLOCK_M, BLOCK_D, BLOCK_E, PRECISION,
            )  # fmt: skip
        if V == H:
            if delta_before is not None:
                scalar = per_query + head * num_tokens + token
                b_before = tl.load(lse_before + scalar, mask=exists, other=float("-inf"))
                b_lse = tl.load(lse + scalar, mask=exists, other=0.0)
                keep = tl.where(b_before > float("-inf"), tl.exp(b_before - b_lse), 0.0)
                own = load_tile(dz, (per_query + token * H + head) * E, exists, E, BLOCK_E)
                acc_v += keep[:, None] * own.to(tl.float32)
                b_delta = tl.sum(acc_v * b_v.to(tl.float32), 1)
                tl.store(delta_before + scalar, b_delta, mask=exists)
            store_tile(acc_v, dvalues, vector_v * E, exists, E, BLOCK_E)
    if V != H:
        store_tile(acc_v, dvalues, vector_v * E, exists, E, BLOCK_E)
    store_gradient(
        acc_k * softmax_scale,
        dk,
        vector_k * D,
        exists,
        step,
        dk_cos,
        dk_sin,
        D,
        BLOCK_D,
        ACCUMULATE,
    )


def backward_keys(
    hop: Hop,
    lse: Tensor,
    dz: Tensor,
    dlse: Tensor | None,
    delta: Tensor,
    dk: Tensor,
    dvalues: Tensor,
    *,
    keys: Turned,
    accumulate: bool,
    delta_before: Tensor | None,
    tiles: Tiles | None = None,
) -> None:
    """Write (or add to) dk, and write the gradient of the values.

    Args:
        hop, lse, dz, dlse, accumulate: as in `backward.hop_backward`.
        delta: <dz, z> [B, H, T].
        dk, dvalues: outputs.
        keys: as in `backward_queries`.
        delta_before: [B, H, T] float32 or None. If given, the values are the state's z: `dvalues`
            includes the state's gradient, and `delta_before` is set to <dvalues, values>.
        tiles: None: from the table.
    """
    tiles = tiles or backward_key_tiles(hop)
    assert tiles.block_n % (tiles.block_m // tiles.pack) == 0
    q, q_cos, q_sin = hop.rotated(hop.q, tiles.rotate_first)
    k, k_cos, k_sin = keys
    values, dz_tiles = hop.values, dz
    if tiles.tma:
        tokens = tiles.block_m // tiles.pack
        q, dz_tiles = tma_heads(q, tokens, tiles.pack), tma_heads(dz, tokens, tiles.pack)
        k, values = tma_rows(k, tiles.block_n), tma_rows(values, tiles.block_n)
    num_blocks = triton.cdiv(hop.rows, tiles.block_n)
    with torch.cuda.device_of(hop.q):
        hop_backward_key_kernel[(hop.q.shape[0] * num_blocks * hop.k.shape[2],)](
            q, k, values, hop.reach, hop.bias, lse, hop.lse_before, q_cos, q_sin,
            k_cos, k_sin, hop.cos, hop.sin, dz_tiles, dlse, delta, dk, dvalues, delta_before,
            *hop.walk(num_blocks), hop.scale, ACCUMULATE=accumulate, TMA=tiles.tma,
            PACK=tiles.pack, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, SCAN=_SCAN,
            num_warps=tiles.warps, num_stages=tiles.stages, **hop.constants(),
        )  # fmt: skip
