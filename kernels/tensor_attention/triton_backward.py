# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
"""One hop backward on the GPU: two kernels, each program owns what it writes (no atomics).

The first owns queries: dq, the gradient of the bias per token, of the state's log-sum-exp, and
delta = <dz, z>. The second owns keys: dk and the gradient of the values. Where the values are the
state itself (every hop but the first of `tensor_attention`) that is the state's whole gradient. The formulas are in `kernels/README.md`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import (
    LOG2E,
    Tiles,
    add_product,
    first_visible,
    lines_of,
    load_rotated,
    load_tile,
    locate,
    padded,
    precision_of,
    product,
    rotate,
    store_gradient,
    store_tile,
)
from .triton_tiles import backward_key_tiles, backward_query_tiles


@triton.jit
def score_gradient(
    score, inner, offset, correction, seen, scale, MASK: tl.constexpr
):  # fmt: skip
    """Weights P = exp2(score * scale + offset) and their scores' gradient P (inner + correction).

    `offset` is (bias - lse) in base 2 and `correction` is dlse - delta, broadcast to the tile.
    """
    weight = tl.exp2(score * scale + offset)
    if MASK:
        weight = tl.where(seen, weight, 0.0)
    return weight, weight * (inner + correction)


@triton.jit
def gather_dq(
    acc, bias_sum, b_q, b_dz, first, last, offset, correction, begin, end,
    k, values, key_head, value_head, cos, sin, num_tokens, num_rows, steps, stride, scale,
    K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    MASK: tl.constexpr, SUM: tl.constexpr, STRIDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq (and to the sum of dscore) what the keys of rows [begin, end) contribute."""
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        token, step, exists = locate(key, num_tokens, num_rows, steps, stride, STRIDED)
        token = token.to(tl.int64)
        b_k = load_rotated(k, (token * K + key_head) * D, exists, step, cos, sin, D, BLOCK_D)
        b_v = load_tile(values, (token * V + value_head) * E, exists, E, BLOCK_E)
        score = product(b_q, tl.trans(b_k), PRECISION)
        inner = product(b_dz, tl.trans(b_v), PRECISION)
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        _, dscore = score_gradient(
            score, inner, offset[:, None], correction[:, None], seen, scale, MASK
        )
        if SUM:
            bias_sum += tl.sum(dscore, 1)
        acc = add_product(acc, dscore.to(b_k.dtype), b_k, PRECISION)
    return acc, bias_sum


@triton.jit
def hop_backward_query_kernel(
    q, k, values, reach, bias, z, lse, z_before, lse_before, q_cos, q_sin, k_cos, k_sin,
    dz, dlse, dq, delta, dbias, dz_before, dlse_before,
    num_tokens, num_rows, steps, stride, length, num_blocks, scale, softmax_scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    ACCUMULATE: tl.constexpr, STRIDED: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [B,T,H,D]; delta, dbias, dlse_before [B,H,T]; dz_before [B,T,H,E]. `z` None: `delta` is
    given. Program: (batch, block of rows from the last, group of PACK heads), heads fastest.
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
    k += batch * num_tokens * K * D
    values += batch * num_tokens * V * E
    reach += batch * num_tokens

    lane = tl.arange(0, BLOCK_M)
    head = head_block * PACK + lane % PACK
    row = block * BLOCK_T + lane // PACK
    token, step, exists = locate(row, num_tokens, num_rows, steps, stride, STRIDED)
    first = first_visible(reach, row, token, step, exists, length)
    token = token.to(tl.int64)
    vector = per_query + token * H + head  # which head of which token, as in q, z, dz
    scalar = per_query + head * num_tokens + token  # the same, as in lse, delta, dlse
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
    correction = -b_delta
    if dlse is not None:
        correction += tl.load(dlse + scalar, mask=exists, other=0.0)

    if lse_before is not None:
        b_lse_before = tl.load(lse_before + scalar, mask=exists, other=float("-inf"))
        keep = tl.where(b_lse_before > float("-inf"), tl.exp(b_lse_before - b_lse), 0.0)
        b_z_before = load_tile(z_before, vector * E, exists, E, BLOCK_E).to(tl.float32)
        inner = tl.sum(b_dz.to(tl.float32) * b_z_before, 1)
        tl.store(dlse_before + scalar, keep * (inner + correction), mask=exists)
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
            acc, bias_sum, b_q, b_dz, first, row - NEAREST, offset, correction,
            part_begin, part_end, k, values, key_head, value_head, k_cos, k_sin,
            num_tokens, num_rows, steps, stride, scale, K, V, D, E, part != 1,
            dbias is not None, STRIDED, BLOCK_N, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    if dbias is not None:
        tl.store(dbias + scalar, bias_sum, mask=exists)
    store_gradient(
        acc * softmax_scale, dq, vector * D, exists, step, q_cos, q_sin, D, BLOCK_D, ACCUMULATE
    )


@triton.jit
def gather_dk(
    acc_k, acc_v, b_k, b_v, key, begin, end,
    q, dz, reach, bias, lse, delta, dlse, cos, sin, head_first, per_query,
    num_tokens, num_rows, steps, stride, length, scale,
    H: tl.constexpr, D: tl.constexpr, E: tl.constexpr, NEAREST: tl.constexpr,
    MASK: tl.constexpr, STRIDED: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk and dvalues what the queries of rows [begin, end) contribute (tiles transposed)."""
    lane = tl.arange(0, BLOCK_M)
    head = head_first + lane % PACK
    for start in range(begin, end, BLOCK_M // PACK):
        row = start + lane // PACK
        token, step, exists = locate(row, num_tokens, num_rows, steps, stride, STRIDED)
        vector = per_query + token.to(tl.int64) * H + head
        scalar = per_query + head * num_tokens + token
        b_q = load_rotated(q, vector * D, exists, step, cos, sin, D, BLOCK_D)
        b_dz = load_tile(dz, vector * E, exists, E, BLOCK_E)
        offset = tl.load(lse + scalar, mask=exists, other=float("inf")) * -LOG2E
        if bias is not None:
            offset += tl.load(bias + head).to(tl.float32) * LOG2E
        correction = -tl.load(delta + scalar, mask=exists, other=0.0)
        if dlse is not None:
            correction += tl.load(dlse + scalar, mask=exists, other=0.0)
        score = product(b_k, tl.trans(b_q), PRECISION)
        inner = product(b_v, tl.trans(b_dz), PRECISION)
        seen = key[:, None] <= row[None, :] - NEAREST
        if MASK:
            first = first_visible(reach, row, token, step, exists, length)
            seen = seen & (key[:, None] >= first[None, :])
        weight, dscore = score_gradient(
            score, inner, offset[None, :], correction[None, :], seen, scale, MASK
        )
        acc_v = add_product(acc_v, weight.to(b_dz.dtype), b_dz, PRECISION)
        acc_k = add_product(acc_k, dscore.to(b_q.dtype), b_q, PRECISION)
    return acc_k, acc_v


@triton.jit
def query_range(
    reach, begin, num_tokens, num_rows, steps, stride, length,
    STRIDED: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Which queries see the keys of rows [begin, begin + BLOCK_N): (end, end of the inner run).

    Queries of rows [begin, end) see some of the keys; those from begin + BLOCK_N up to the end of
    the inner run see all of them. Nothing is assumed of how `reach` varies along a line.
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


@triton.jit
def hop_backward_key_kernel(
    q, k, values, reach, bias, lse, lse_before, q_cos, q_sin, k_cos, k_sin,
    dz, dlse, delta, dk, dvalues, delta_before,
    num_tokens, num_rows, steps, stride, length, num_blocks, scale, softmax_scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    ACCUMULATE: tl.constexpr, IS_STATE: tl.constexpr, HAS_STATE: tl.constexpr,
    STRIDED: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, SCAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [B,T,K,D]; dvalues [B,T,V,E], the state's own share included if the values are the state
    (IS_STATE); delta_before [B,H,T] = <dvalues, values>. Program: (batch, block of rows, key head).
    """
    BLOCK_T: tl.constexpr = BLOCK_M // PACK
    NEAREST: tl.constexpr = 1 if HAS_STATE else 0
    G: tl.constexpr = H // K
    program = tl.program_id(0)
    key_head = program % K
    block = program // K % num_blocks
    batch = (program // K // num_blocks).to(tl.int64)
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
    b_k = load_rotated(k, vector_k * D, exists, step, k_cos, k_sin, D, BLOCK_D)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if V != H:
        vector_v = per_value + token * V + key_head
        b_v = load_tile(values, vector_v * E, exists, E, BLOCK_E)
        acc_v = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for group in range(0, G, PACK):
        head = key_head * G + group
        if V == H:
            vector_v = per_value + token * V + head
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
                q, dz, reach, bias, lse, delta, dlse, q_cos, q_sin, head, per_query,
                num_tokens, num_rows, steps, stride, length, scale, H, D, E, NEAREST,
                part != 1, STRIDED, PACK, BLOCK_M, BLOCK_D, BLOCK_E, PRECISION,
            )  # fmt: skip
        if V == H:
            if IS_STATE:
                scalar = per_query + head * num_tokens + token
                b_before = tl.load(lse_before + scalar, mask=exists, other=float("-inf"))
                b_lse = tl.load(lse + scalar, mask=exists, other=0.0)
                keep = tl.where(b_before > float("-inf"), tl.exp(b_before - b_lse), 0.0)
                own = load_tile(dz, (per_query + token * H + head) * E, exists, E, BLOCK_E)
                acc_v += keep[:, None] * own.to(tl.float32)
                if delta_before is not None:
                    b_delta = tl.sum(acc_v * b_v.to(tl.float32), 1)
                    tl.store(delta_before + scalar, b_delta, mask=exists)
            store_tile(acc_v, dvalues, vector_v * E, exists, E, BLOCK_E)
    if V != H:
        store_tile(acc_v, dvalues, vector_v * E, exists, E, BLOCK_E)
    store_gradient(
        acc_k * softmax_scale, dk, vector_k * D, exists, step, k_cos, k_sin, D, BLOCK_D, ACCUMULATE
    )


class HopGradients(NamedTuple):
    """What the backward of a hop returns beside dq, dk, dvalues; None where there is no such input.

    All are float32 [B, H, T]: `dbias` holds each token's share of the gradient of the bias,
    `dlse_before` the gradient of the state's log-sum-exp, `delta_before` the row sums <dz, z> that
    the backward of the hop before begins with (when the values are the state).
    """

    dbias: Tensor | None
    dlse_before: Tensor | None
    delta_before: Tensor | None


def hop_backward(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    reach: Tensor,
    bias: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    stride: int,
    length: int,
    scale: float,
    lse: Tensor,
    dz: Tensor,
    dlse: Tensor | None,
    z_or_delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    accumulate: bool,
    dvalues: Tensor,
    dz_before: Tensor | None = None,
    query_tiles: Tiles | None = None,
    key_tiles: Tiles | None = None,
) -> HopGradients:
    """Write the gradients of one hop; all tensors contiguous, arguments as in `hop_forward`.

    Args:
        lse: [B, H, T] of this hop; dz [B, T, H, E] and dlse [B, H, T]: the arriving gradients.
        z_or_delta: z [B, T, H, E] of this hop, or delta = <dz, z> [B, H, T] where it is known.
        dq, dk: written, or added to if `accumulate`.
        dvalues: written; with `dz_before` None the state's z is `values` and its gradient is
            included here, otherwise it goes to `dz_before`.
    """
    batch, num_tokens, heads, size = q.shape
    key_heads, value_heads, value_size = k.shape[2], values.shape[2], values.shape[3]
    lines = lines_of(num_tokens, stride)
    shape = (q.dtype, size, value_size, lines.steps, length, heads // value_heads)
    query_tiles = query_tiles or backward_query_tiles(*shape)
    key_tiles = key_tiles or backward_key_tiles(*shape)
    assert key_tiles.block_n % (key_tiles.block_m // key_tiles.pack) == 0
    z_before, lse_before = state or (None, None)
    is_state = state is not None and dz_before is None
    rows = (batch, heads, num_tokens)
    delta_is_known = z_or_delta.dim() == 3
    delta = z_or_delta if delta_is_known else q.new_empty(rows, dtype=torch.float32)
    results = HopGradients(
        dbias=None if bias is None else torch.empty_like(delta),
        dlse_before=None if state is None else torch.empty_like(delta),
        delta_before=torch.empty_like(delta) if is_state else None,
    )
    cos, sin = rotary or (None, None)
    common = {
        "H": heads, "K": key_heads, "V": value_heads, "D": size, "E": value_size,
        "STRIDED": stride > 1, "ACCUMULATE": accumulate, "BLOCK_D": padded(size),
        "BLOCK_E": padded(value_size), "PRECISION": precision_of(q.dtype),
    }  # fmt: skip
    walk = (num_tokens, lines.rows, lines.steps, stride, length)

    with torch.cuda.device_of(q):
        t = query_tiles
        k_ready, k_cos, k_sin = k, cos, sin
        if rotary is not None and t.rotate_first:
            k_ready, k_cos, k_sin = rotate(k, *rotary, stride), None, None
        num_blocks = triton.cdiv(lines.rows, t.block_m // t.pack)
        hop_backward_query_kernel[(batch * num_blocks * (heads // t.pack),)](
            q, k_ready, values, reach, bias, None if delta_is_known else z_or_delta, lse,
            z_before, lse_before, cos, sin, k_cos, k_sin, dz, dlse, dq, delta,
            results.dbias, dz_before, results.dlse_before,
            *walk, num_blocks, scale * 1.4426950408889634, scale,
            PACK=t.pack, BLOCK_M=t.block_m, BLOCK_N=t.block_n,
            num_warps=t.warps, num_stages=t.stages, **common,
        )  # fmt: skip
        del k_ready

        t = key_tiles
        q_ready, q_cos, q_sin = q, cos, sin
        if rotary is not None and t.rotate_first:
            q_ready, q_cos, q_sin = rotate(q, *rotary, stride), None, None
        num_blocks = triton.cdiv(lines.rows, t.block_n)
        hop_backward_key_kernel[(batch * num_blocks * key_heads,)](
            q_ready, k, values, reach, bias, lse, lse_before, q_cos, q_sin, cos, sin,
            dz, dlse, delta, dk, dvalues, results.delta_before,
            *walk, num_blocks, scale * 1.4426950408889634, scale,
            IS_STATE=is_state, HAS_STATE=state is not None,
            PACK=t.pack, BLOCK_M=t.block_m, BLOCK_N=t.block_n, SCAN=_SCAN,
            num_warps=t.warps, num_stages=t.stages, **common,
        )  # fmt: skip
    return results


# Rows whose reach one program looks at together when it finds the queries that see its keys.
_SCAN = 1024
