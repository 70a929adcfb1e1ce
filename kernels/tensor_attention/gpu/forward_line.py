# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""One hop forward for short lines: a tile contains whole lines, so there is no loop over keys.

Unlike the general kernel, a program loads and rotates its keys once for all query heads that share
them, and reads the values, which are also the state's z, once.
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
    dot,
    first_visible,
    load_rotated,
    load_tile,
    locate,
    store_tile,
)
from .launch import SIZES, Hop
from .tiles import LineTiles


@triton.jit(do_not_specialize=SIZES)
def hop_forward_line_kernel(
    q, k, values, reach, bias, lse_before, cos, sin, z, lse,
    num_tokens, num_rows, steps, stride, length, num_blocks, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    STRIDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As the general kernel, for values per query head (V = H) that are the state's z, if there is
    a state. Program: (batch, block of whole lines, key head).
    """
    NEAREST: tl.constexpr = 0 if lse_before is None else 1
    program = tl.program_id(0)
    key_head = program % K
    block = program // K % num_blocks
    batch = (program // K // num_blocks).to(tl.int64)
    reach += batch * num_tokens

    lane = tl.arange(0, BLOCK)
    rows_per_block = BLOCK // steps * steps
    row = block * rows_per_block + lane
    token, step, exists = locate(row, num_tokens, num_rows, steps, stride, STRIDED)
    exists = exists & (lane < rows_per_block)
    first = first_visible(reach, row, token, step, exists, length)
    token = token.to(tl.int64)
    seen = (row[None, :] >= first[:, None]) & (row[None, :] <= row[:, None] - NEAREST)

    vector_k = (batch * num_tokens + token) * K + key_head
    b_k = load_rotated(k, vector_k * D, exists, step, cos, sin, D, BLOCK_D)
    for head in range(key_head * (H // K), (key_head + 1) * (H // K)):
        vector = (batch * num_tokens + token) * H + head
        scalar = (batch * H + head) * num_tokens + token
        b_q = load_rotated(q, vector * D, exists, step, cos, sin, D, BLOCK_D)
        score = dot(b_q, tl.trans(b_k), PRECISION) * scale
        if bias is not None:
            score += tl.load(bias + head).to(tl.float32) * LOG2E
        score = tl.where(seen, score, MASKED)
        top = tl.maximum(tl.max(score, 1), FLOOR)
        if lse_before is not None:
            lse_zero = tl.load(lse_before + scalar, mask=exists, other=0.0) * LOG2E
            top = tl.maximum(top, lse_zero)
        weight = tl.exp2(score - top[:, None])
        total = tl.sum(weight, 1)
        b_v = load_tile(values, vector * E, exists, E, BLOCK_E)
        acc = dot(weight.to(b_v.dtype), b_v, PRECISION)
        if lse_before is not None:
            kept = tl.exp2(lse_zero - top)
            total += kept
            acc += kept[:, None] * b_v.to(tl.float32)
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        store_tile(acc, z, vector * E, exists, E, BLOCK_E)
        tl.store(lse + scalar, (top + tl.log2(total)) * LN2, mask=exists)


def forward_lines(hop: Hop, z: Tensor, lse: Tensor, tiles: LineTiles) -> None:
    """Write one hop into `z` [B, T, H, E] and `lse` [B, H, T] float32, both contiguous."""
    assert hop.steps <= tiles.block
    assert hop.values.shape[2] == hop.q.shape[2]
    assert hop.z_before is None or hop.z_before is hop.values
    num_blocks = triton.cdiv(hop.rows, tiles.block // hop.steps * hop.steps)
    with torch.cuda.device_of(hop.q):
        hop_forward_line_kernel[(hop.q.shape[0] * num_blocks * hop.k.shape[2],)](
            hop.q, hop.k, hop.values, hop.reach, hop.bias, hop.lse_before, hop.cos, hop.sin,
            z, lse, *hop.walk(num_blocks), BLOCK=tiles.block,
            num_warps=tiles.warps, num_stages=tiles.stages, **hop.constants(),
        )  # fmt: skip
