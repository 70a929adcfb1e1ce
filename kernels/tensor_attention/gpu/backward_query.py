# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The backward kernel that owns queries: gradients of q, the bias and the state's log-sum-exp."""

from typing import NamedTuple

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
from .launch import SIZES, Hop, Tiles, Turned, tma_rows
from .tiles import backward_query_ring, backward_query_tiles


@triton.jit
def gather_dq(
    acc, bias_sum, b_q, b_dz, first, last, offset, delta, begin, end,
    row_zero, k, values, key_head, value_head, cos, sin, num_tokens, num_rows, steps, stride, scale,
    K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    MASK: tl.constexpr, SUM: tl.constexpr, TMA: tl.constexpr, STRIDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contributions of keys in rows [begin, end) to dq (and to the sum of dscore)."""
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        token, step, exists = locate(key, num_tokens, num_rows, steps, stride, STRIDED)
        token = token.to(tl.int64)
        if TMA:
            b_k = k.load([row_zero + start, key_head * D])
            b_v = values.load([row_zero + start, value_head * E])
        else:
            b_k = load_rotated(k, (token * K + key_head) * D, exists, step, cos, sin, D, BLOCK_D)
            b_v = load_tile(values, (token * V + value_head) * E, exists, E, BLOCK_E)
        score = dot(b_q, tl.trans(b_k), PRECISION)
        inner = dot(b_dz, tl.trans(b_v), PRECISION)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        _, dscore = score_gradient(score, inner, offset[:, None], delta[:, None], seen, scale, MASK)
        if SUM:
            bias_sum += tl.sum(dscore, 1)
        acc = add_product(acc, dscore.to(b_k.dtype), b_k, PRECISION)
    return acc, bias_sum


@triton.jit(do_not_specialize=SIZES)
def hop_backward_query_kernel(
    q, k, values, reach, bias, z, lse, z_before, lse_before, q_cos, q_sin, k_cos, k_sin,
    dz, dlse, dq, delta, dbias, dz_before, dlse_before,
    num_tokens, num_rows, steps, stride, length, num_blocks, scale, softmax_scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    ACCUMULATE: tl.constexpr, TMA: tl.constexpr, STRIDED: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B,T,H,D]; delta, dbias, dlse_before [B,H,T]; dz_before [B,T,H,E]. If `z` is None, `delta`
    is an input. Program: (batch, block of rows from the last, group of PACK heads), heads fastest.
    """
    BLOCK_T: tl.constexpr = BLOCK_M // PACK
    NEAREST: tl.constexpr = 0 if lse_before is None else 1
    program = tl.program_id(0)
    head_block = program % (H // PACK)
    block = num_blocks - 1 - program // (H // PACK) % num_blocks
    batch = (program // (H // PACK) // num_blocks).to(tl.int64)
    key_head = head_block * PACK // (H // K)
    value_head = head_block * PACK // (H // V)
    per_query = batch * num_tokens * H
    row_zero = program // (H // PACK) // num_blocks * num_tokens
    if not TMA:
        k += batch * num_tokens * K * D
        values += batch * num_tokens * V * E
    reach += batch * num_tokens

    lane = tl.arange(0, BLOCK_M)
    head = head_block * PACK + lane % PACK
    row = block * BLOCK_T + lane // PACK
    token, step, exists = locate(row, num_tokens, num_rows, steps, stride, STRIDED)
    first = first_visible(reach, row, token, step, exists, length)
    token = token.to(tl.int64)
    vector = per_query + token * H + head  # index of the token's head in q, z, dz
    scalar = per_query + head * num_tokens + token  # its index in lse, delta, dlse
    b_q = load_rotated(q, vector * D, exists, step, q_cos, q_sin, D, BLOCK_D)
    b_dz = load_tile(dz, vector * E, exists, E, BLOCK_E)
    b_lse = tl.load(lse + scalar, mask=exists, other=0.0)
    offset = tl.where(exists, -b_lse * LOG2E, float("-inf"))
    if bias is not None:
        offset += tl.load(bias + head).to(tl.float32) * LOG2E
    if z is not None:
        b_z = load_tile(z, vector * E, exists, E, BLOCK_E)
        b_delta = tl.sum(b_dz.to(tl.float32) * b_z.to(tl.float32), 1)
        tl.store(delta + scalar, b_delta, mask=exists)
    else:
        b_delta = tl.load(delta + scalar, mask=exists, other=0.0)
    if dlse is not None:
        b_delta -= tl.load(dlse + scalar, mask=exists, other=0.0)

    if lse_before is not None:
        b_lse_before = tl.load(lse_before + scalar, mask=exists, other=float("-inf"))
        keep = tl.where(b_lse_before > float("-inf"), tl.exp(b_lse_before - b_lse), 0.0)
        b_z_before = load_tile(z_before, vector * E, exists, E, BLOCK_E).to(tl.float32)
        inner = tl.sum(b_dz.to(tl.float32) * b_z_before, 1)
        tl.store(dlse_before + scalar, keep * (inner - b_delta), mask=exists)
        if dz_before is not None:
            kept = keep[:, None] * b_dz.to(tl.float32)
            store_tile(kept, dz_before, vector * E, exists, E, BLOCK_E)

    end = tl.minimum((block + 1) * BLOCK_T, num_rows)
    begin = tl.min(tl.where(first <= row - NEAREST, first, end)) // BLOCK_N * BLOCK_N
    inside_end = (block * BLOCK_T + 1 - NEAREST) // BLOCK_N * BLOCK_N
    inside = tl.cdiv(tl.max(tl.where(exists, first, 0)), BLOCK_N) * BLOCK_N
    inside = tl.maximum(tl.minimum(inside, inside_end), begin)
    inside_end = tl.maximum(inside, inside_end)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bias_sum = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(3):
        if part == 0:
            part_begin, part_end = begin, inside
        elif part == 1:
            part_begin, part_end = inside, inside_end
        else:
            part_begin, part_end = inside_end, end
        acc, bias_sum = gather_dq(
            acc, bias_sum, b_q, b_dz, first, row - NEAREST, offset, b_delta,
            part_begin, part_end, row_zero, k, values, key_head, value_head, k_cos, k_sin,
            num_tokens, num_rows, steps, stride, scale, K, V, D, E, part != 1,
            dbias is not None, TMA, STRIDED, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    if dbias is not None:
        tl.store(dbias + scalar, bias_sum, mask=exists)
    store_gradient(
        acc * softmax_scale, dq, vector * D, exists, step, q_cos, q_sin, D, BLOCK_D, ACCUMULATE
    )


class QueryGradients(NamedTuple):
    """Outputs of the kernel other than dq, each float32 [B, H, T] and contiguous.

    `delta` is <dz, z>. `dbias` is each token's contribution to the bias's gradient (None: no bias).
    `dlse_before` is the gradient of the state's log-sum-exp (None: no state).
    """

    delta: Tensor
    dbias: Tensor | None
    dlse_before: Tensor | None


def backward_queries(
    hop: Hop,
    z: Tensor | None,
    lse: Tensor,
    dz: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    grads: QueryGradients,
    *,
    keys: Turned,
    accumulate: bool,
    dz_before: Tensor | None,
    tiles: Tiles | None = None,
) -> None:
    """Write (or add to) dq and fill `grads`.

    Args:
        hop, lse, dz, dlse, accumulate: as in `backward.hop_backward`.
        z: result of the hop, [B, T, H, E]; None: `grads.delta` is read instead.
        dq: output.
        grads: outputs.
        keys: from `Hop.rotated`: the keys, already rotated if the tiles need it.
        dz_before: output, the gradient of `hop.z_before`; None if that is `hop.values`.
        tiles: tiles of the general kernel; None: the table chooses the kernel and its tiles.
    """
    ring = backward_query_ring(hop) if tiles is None else None
    if ring is not None:
        from .specialized_query import specialized_queries

        specialized_queries(
            hop, keys[0], z, lse, dz, dlse, dq, grads.delta, accumulate=accumulate, tiles=ring
        )
        return
    tiles = tiles or backward_query_tiles(hop)
    k, k_cos, k_sin = keys
    values = hop.values
    if tiles.tma:
        k, values = tma_rows(k, tiles.block_n), tma_rows(values, tiles.block_n)
    num_blocks = triton.cdiv(hop.rows, tiles.block_m // tiles.pack)
    batch, heads = hop.q.shape[0], hop.q.shape[2]
    with torch.cuda.device_of(hop.q):
        hop_backward_query_kernel[(batch * num_blocks * (heads // tiles.pack),)](
            hop.q, k, values, hop.reach, hop.bias, z, lse, hop.z_before, hop.lse_before,
            hop.cos, hop.sin, k_cos, k_sin, dz, dlse, dq, grads.delta, grads.dbias, dz_before,
            grads.dlse_before, *hop.walk(num_blocks), hop.scale,
            ACCUMULATE=accumulate, TMA=tiles.tma, PACK=tiles.pack,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            num_warps=tiles.warps, num_stages=tiles.stages, **hop.constants(),
        )  # fmt: skip
