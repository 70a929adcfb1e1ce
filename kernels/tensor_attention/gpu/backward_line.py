# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The backward pass of a hop with short lines: one kernel that reads each tensor once.

If a line fits in one tile, the tile's queries attend only to the tile's keys. One program can then
compute dq, dk and the gradient of the values of its lines. It computes the score tile once instead
of twice (for queries and for keys).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward_query import QueryGradients
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
from .launch import SIZES, Hop
from .tiles import LineTiles


@triton.jit(do_not_specialize=SIZES)
def hop_backward_line_kernel(
    q, k, values, reach, bias, z, lse, lse_before, cos, sin, dz, dlse,
    dq, dk, dvalues, delta, dbias, dlse_before, delta_before,
    num_tokens, num_rows, steps, stride, length, num_blocks, scale, softmax_scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    ACCUMULATE: tl.constexpr, STRIDED: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As the kernels that own queries and keys, for values per query head (V = H) that are the
    state's z, if there is a state. Program: (batch, block of whole lines, key head).
    """
    NEAREST: tl.constexpr = 0 if lse_before is None else 1
    program = tl.program_id(0)
    key_head = program % K
    block = program // K % num_blocks
    batch = (program // K // num_blocks).to(tl.int64)
    per_query = batch * num_tokens * H
    reach += batch * num_tokens

    lane = tl.arange(0, BLOCK)
    rows_per_block = BLOCK // steps * steps
    row = block * rows_per_block + lane
    token, step, exists = locate(row, num_tokens, num_rows, steps, stride, STRIDED)
    exists = exists & (lane < rows_per_block)
    first = first_visible(reach, row, token, step, exists, length)
    token = token.to(tl.int64)
    # Lanes without a token are after all queries of their line, so no query attends to them.
    seen = (row[None, :] >= first[:, None]) & (row[None, :] <= row[:, None] - NEAREST)
    seen = seen & exists[:, None]

    vector_k = (batch * num_tokens + token) * K + key_head
    b_k = load_rotated(k, vector_k * D, exists, step, cos, sin, D, BLOCK_D)
    acc_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for head in range(key_head * (H // K), (key_head + 1) * (H // K)):
        vector = per_query + token * H + head
        scalar = per_query + head * num_tokens + token
        b_q = load_rotated(q, vector * D, exists, step, cos, sin, D, BLOCK_D)
        b_v = load_tile(values, vector * E, exists, E, BLOCK_E)
        b_dz = load_tile(dz, vector * E, exists, E, BLOCK_E)
        b_lse = tl.load(lse + scalar, mask=exists, other=0.0)
        offset = -b_lse * LOG2E
        if bias is not None:
            offset += tl.load(bias + head).to(tl.float32) * LOG2E
        if z is not None:
            b_z = load_tile(z, vector * E, exists, E, BLOCK_E)
            b_delta = tl.sum(b_dz.to(tl.float32) * b_z.to(tl.float32), 1)
        else:
            b_delta = tl.load(delta + scalar, mask=exists, other=0.0)
        if dlse is not None:
            b_delta -= tl.load(dlse + scalar, mask=exists, other=0.0)

        score = dot(b_q, tl.trans(b_k), PRECISION)
        inner = dot(b_dz, tl.trans(b_v), PRECISION)
        weight, dscore = score_gradient(
            score, inner, offset[:, None], b_delta[:, None], seen, scale, True
        )
        if dbias is not None:
            tl.store(dbias + scalar, tl.sum(dscore, 1), mask=exists)
        weight, dscore = weight.to(b_dz.dtype), dscore.to(b_q.dtype)
        dvalue = dot(tl.trans(weight), b_dz, PRECISION)
        if lse_before is not None:
            b_before = tl.load(lse_before + scalar, mask=exists, other=float("-inf"))
            keep = tl.where(b_before > float("-inf"), tl.exp(b_before - b_lse), 0.0)
            own = tl.sum(tl.where(row[None, :] == row[:, None], inner, 0.0), 1)  # <dz, z_before>
            tl.store(dlse_before + scalar, keep * (own - b_delta), mask=exists)
            # Loaded again (from the cache): keeping them during the products needs registers.
            dvalue += keep[:, None] * load_tile(dz, vector * E, exists, E, BLOCK_E).to(tl.float32)
            b_v = load_tile(values, vector * E, exists, E, BLOCK_E)
            tl.store(delta_before + scalar, tl.sum(dvalue * b_v.to(tl.float32), 1), mask=exists)
        store_tile(dvalue, dvalues, vector * E, exists, E, BLOCK_E)
        dq_tile = dot(dscore, b_k, PRECISION) * softmax_scale
        store_gradient(dq_tile, dq, vector * D, exists, step, cos, sin, D, BLOCK_D, ACCUMULATE)
        acc_k = add_product(acc_k, tl.trans(dscore), b_q, PRECISION)
    store_gradient(
        acc_k * softmax_scale, dk, vector_k * D, exists, step, cos, sin, D, BLOCK_D, ACCUMULATE
    )


def backward_lines(
    hop: Hop,
    z: Tensor | None,
    lse: Tensor,
    dz: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dvalues: Tensor,
    grads: QueryGradients,
    *,
    accumulate: bool,
    delta_before: Tensor | None,
    tiles: LineTiles,
) -> None:
    """Write (or add to) dq and dk, write dvalues, and fill `grads` except `delta`.

    Args:
        hop, lse, dz, dlse, accumulate: as in `backward.hop_backward`.
        z: None: `grads.delta` is read instead.
        dq, dk, dvalues: outputs.
        grads: outputs.
        delta_before: as in `backward_keys`.
        tiles: rows of a tile, at least `hop.steps`, and its warps and stages.
    """
    assert hop.steps <= tiles.block
    assert hop.values.shape[2] == hop.q.shape[2]
    assert (hop.lse_before is None) == (delta_before is None)
    num_blocks = triton.cdiv(hop.rows, tiles.block // hop.steps * hop.steps)
    with torch.cuda.device_of(hop.q):
        hop_backward_line_kernel[(hop.q.shape[0] * num_blocks * hop.k.shape[2],)](
            hop.q, hop.k, hop.values, hop.reach, hop.bias, z, lse, hop.lse_before,
            hop.cos, hop.sin, dz, dlse, dq, dk, dvalues, grads.delta, grads.dbias,
            grads.dlse_before, delta_before, *hop.walk(num_blocks), hop.scale,
            ACCUMULATE=accumulate, BLOCK=tiles.block,
            num_warps=tiles.warps, num_stages=tiles.stages, **hop.constants(),
        )  # fmt: skip
