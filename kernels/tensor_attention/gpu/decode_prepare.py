# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The first kernel of a new token: rotate and cache it, and score the far blocks.

Each part is independent of the others, so that many programs share the work: one per head of the
token, then one per tile of slots of a key head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routed_decode import Step
from .common import load_tile
from .launch import is_interpreted, padded


@triton.jit
def rotate_head(
    q, k, v, cos, sin, turned, near_k, far_k, values, batch, head, near_room, key_room, value_room,
    B: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rotate the token's query or key `head`, or copy its values, to where they are read."""
    if head < H + K:
        half = tl.arange(0, BLOCK_D // 2)
        inside = half < D // 2
        if head < H:  # noqa: SIM108 - in Triton a branch
            source = q + (batch * H + head) * D
        else:
            source = k + (batch * K + head - H) * D
        real = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        imag = tl.load(source + D // 2 + half, mask=inside, other=0.0).to(tl.float32)
        for which in tl.static_range(2):
            angle = (which * B + batch) * D + half
            c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + D // 2 + angle, mask=inside, other=0.0).to(tl.float32)
            if head < H:
                target = turned + ((which * B + batch) * H + head) * D
            elif which == 0:
                target = near_k + batch.to(tl.int64) * near_room * (K * D) + (head - H) * D
            else:
                target = far_k + batch.to(tl.int64) * key_room * (K * D) + (head - H) * D
            dtype = turned.dtype.element_ty
            tl.store(target + half, (real * c - imag * s).to(dtype), mask=inside)
            tl.store(target + D // 2 + half, (imag * c + real * s).to(dtype), mask=inside)
    else:
        column = tl.arange(0, BLOCK_E)
        source_v = v + (batch * K + head - H - K) * E + column
        target_v = values + batch.to(tl.int64) * value_room * (K * E) + (head - H - K) * E + column
        tl.store(target_v, tl.load(source_v, mask=column < E), mask=column < E)


@triton.jit
def score_slots(
    q, pooled, closed, scores, batch, head, start, num_slots, pooled_room,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the scores of slots start, start + 1, ...: those of their best parts; -inf if closed.

    The queries of the group are summed in the order, and with the rounding, of `query_sum_kernel`.
    """
    total = tl.zeros([1, BLOCK_D], tl.float32)
    for i in range(H // K):
        vector = (batch * H + head * (H // K) + i) * D + tl.zeros([1], tl.int32)
        total += load_tile(q, vector, vector >= 0, D, BLOCK_D).to(tl.float32)
    total = total.to(q.dtype.element_ty).to(tl.float32)
    slot = start + tl.arange(0, BLOCK_N)
    exists = slot < num_slots
    row = batch.to(tl.int64) * pooled_room + slot
    score = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        vector = ((row * PARTS + part) * K + head) * D
        tile = load_tile(pooled, vector, exists, D, BLOCK_D).to(tl.float32)
        score = tl.maximum(score, tl.sum(tile * total, 1))
    place = batch * num_slots + slot
    is_closed = tl.load(closed + place, mask=exists, other=1)
    score = tl.where(is_closed == 0, score, float("-inf"))
    tl.store(scores + (batch * K + head) * num_slots + slot, score, mask=exists)


@triton.jit(do_not_specialize=["near_room", "key_room", "value_room", "pooled_room", "num_slots"])
def prepare_kernel(
    q, k, v, cos, sin, pooled, closed, turned, near_k, far_k, values, scores,
    near_room, key_room, value_room, pooled_room, num_slots,
    B: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """turned [2, B, H, D]: the queries at the token's position and at its stretched position.

    Its keys at these positions go to near_k and far_k, its values to `values`; scores [B, K, N].
    `*_room`: rows of a buffer per sequence.
    """
    HEADS: tl.constexpr = H + 2 * K
    program = tl.program_id(0)
    if program < B * HEADS:
        rotate_head(
            q, k, v, cos, sin, turned, near_k, far_k, values, program // HEADS, program % HEADS,
            near_room, key_room, value_room, B, H, K, D, E, BLOCK_D, BLOCK_E,
        )  # fmt: skip
    else:
        rest = program - B * HEADS
        start = rest // (B * K) * BLOCK_N
        rest = rest % (B * K)
        score_slots(
            q, pooled, closed, scores, rest // K, rest % K, start, num_slots, pooled_room,
            H, K, D, PARTS, BLOCK_D, BLOCK_N,
        )  # fmt: skip


def buffer_rows(rows: Tensor) -> int:
    """Rows per sequence of the buffer [B, room, ...] of which `rows` is a view."""
    return rows.stride(0) // rows.stride(1)


def prepare_token(
    q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, step: Step,
    near: Tensor, keys: Tensor, values: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate the token, write it to the last rows of the cache, and score the far blocks.

    Args:
        q: [B, 1, H, D]; k: [B, 1, K, D]; v: [B, 1, K, E]; not rotated.
        pooled: [B, N, P, K, D] of the slots that can be far.
        step: the token's step.
        near: [B, W, K, D] of the last tokens, keys [B, T, K, D], values [B, T, K, E]: views of
            the cache, with contiguous rows, whose last row is written.

    Returns:
        The queries [2, B, H, D] at the token's position and at its stretched position, and the
        scores [B, K, N] float32 of all slots, -inf for those that cannot be chosen.
    """
    batch, _, heads, size = q.shape
    key_heads, value_size = v.shape[2:]
    num_slots = pooled.shape[1]
    block_n = 16 if is_interpreted() else 32
    turned = q.new_empty(2, batch, heads, size)
    scores = torch.empty(batch, key_heads, num_slots, dtype=torch.float32, device=q.device)
    programs = batch * (heads + 2 * key_heads + key_heads * triton.cdiv(num_slots, block_n))
    with torch.cuda.device_of(q):
        prepare_kernel[(programs,)](
            q.contiguous(), k.contiguous(), v.contiguous(), step.cos, step.sin, pooled,
            step.closed, turned, near[:, -1], keys[:, -1], values[:, -1], scores,
            buffer_rows(near), buffer_rows(keys), buffer_rows(values), buffer_rows(pooled),
            num_slots,
            B=batch, H=heads, K=key_heads, D=size, E=value_size, PARTS=pooled.shape[2],
            BLOCK_D=padded(size), BLOCK_E=padded(value_size), BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    return turned, scores
