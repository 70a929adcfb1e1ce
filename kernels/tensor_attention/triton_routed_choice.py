# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The choice of blocks on the GPU: mean keys, and a streaming top-k that never stores scores.

A program owns 64 tokens of one key head and walks the slots before them in chunks. It keeps the
best `top_k` blocks so far; while any token's best score of the chunk beats its worst kept one, each
such token exchanges the two. How often that happens falls as 1 / (slots seen).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fold import Rotary
from .triton_common import load_rotated, load_tile, product, store_tile
from .triton_launch import padded, precision_of

_SIZES = ["num_tokens", "num_slots", "num_blocks", "window", "num_rows"]


@triton.jit(do_not_specialize=_SIZES)
def rotate_stretched_kernel(
    x, out, cos, sin, doc_start, num_rows, stretch,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
    num_tokens=0,
):  # fmt: skip
    """out[b, t, h] = x[b, t, h] rotated to floor((t - d(t)) / stretch); a row is one head."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    exists = row < num_rows
    token = row // HEADS
    start = tl.load(doc_start + token, mask=exists, other=0)
    position = (token % num_tokens - start) // stretch
    tile = load_rotated(x, row * SIZE, exists, position, cos, sin, SIZE, BLOCK)
    store_tile(tile, out, row * SIZE, exists, SIZE, BLOCK)


def rotate_stretched(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, doc_start: Tensor, stretch: int
) -> Tensor:
    """A copy of `x` [B, T, H, D] rotated along its documents; `x` itself without a table."""
    if cos is None:
        return x
    out = torch.empty_like(x)
    batch, num_tokens, heads, size = x.shape
    num_rows, block_rows = batch * num_tokens * heads, 32
    with torch.cuda.device_of(x):
        rotate_stretched_kernel[(triton.cdiv(num_rows, block_rows),)](
            x, out, cos, sin, doc_start, num_rows, stretch, HEADS=heads, SIZE=size,
            BLOCK_ROWS=block_rows, BLOCK=padded(size), num_tokens=num_tokens,
        )  # fmt: skip
    return out


@triton.jit
def slot_start(doc_start, slot, num_tokens, exists, BLOCK: tl.constexpr):
    """First token of the block of each slot, and its document's (`routing.block_starts`)."""
    last = tl.minimum(slot * BLOCK + BLOCK - 1, num_tokens - 1)
    document = tl.load(doc_start + last, mask=exists, other=0)
    return document + (last - document) // BLOCK * BLOCK, document


@triton.jit(do_not_specialize=_SIZES)
def block_mean_kernel(
    k, doc_start, means, num_tokens, num_slots,
    K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """means [B, K, N, D]: mean of the rotated keys k [B, T, K, D] of each slot's block."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    start, _ = slot_start(doc_start + batch * num_tokens, slot, num_tokens, True, BLOCK)
    token = tl.minimum(start + tl.arange(0, BLOCK), num_tokens - 1)
    row = (batch * num_tokens + token) * K + head
    tile = load_tile(k, row * D, token >= 0, D, BLOCK_D).to(tl.float32)
    mean = tl.sum(tile, 0) / BLOCK
    target = ((batch * K + head) * num_slots + slot) * D + tl.zeros([1], tl.int64)
    store_tile(mean[None, :], means, target, target >= 0, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES)
def choose_kernel(
    q, means, doc_start, cos, sin, choice, num_tokens, num_slots, num_blocks, window, stretch,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """choice [B, T, K, TOP + 1] int32, unordered. Program: (batch, block of tokens, key head)."""
    program = tl.program_id(0)
    key_head = program % K
    block = num_blocks - 1 - program // K % num_blocks
    batch = (program // K // num_blocks).to(tl.int64)
    doc_start += batch * num_tokens
    token = block * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = token < num_tokens
    document = tl.load(doc_start + token, mask=exists, other=0)
    position = (token - document) // stretch

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for group in tl.static_range(H // K):
        vector = ((batch * num_tokens + token) * H + key_head * (H // K) + group) * D
        tile = load_rotated(q, vector, exists, position, cos, sin, D, BLOCK_D)
        total += tile.to(tl.float32)
    b_q = total.to(q.dtype.element_ty)

    # The blocks kept so far: ids of empty places are negative and distinct; places beyond TOP hold
    # infinity and are never given up.
    place = tl.arange(0, KEEP)
    kept = tl.zeros([BLOCK_M, KEEP], tl.float32) + tl.where(
        place < TOP, float("-inf"), float("inf")
    )[None, :]
    ids = tl.zeros([BLOCK_M, KEEP], tl.int32) - 1 - place[None, :]
    far = tl.where(exists, token - window, -1)
    end = tl.max(far) // BLOCK + 1
    begin = tl.min(tl.where(far >= document, document, num_tokens)) // BLOCK // BLOCK_N * BLOCK_N
    means += (batch * K + key_head) * num_slots * D
    for first in range(begin, end, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        inside = slot < num_slots
        start, owner = slot_start(doc_start, slot, num_tokens, inside, BLOCK)
        b_mean = load_tile(means, slot.to(tl.int64) * D, inside, D, BLOCK_D)
        score = product(b_q, tl.trans(b_mean), PRECISION)
        allowed = inside & (start > owner)
        allowed = allowed[None, :] & (owner[None, :] == document[:, None])
        allowed = allowed & (start[None, :] <= far[:, None])
        score = tl.where(allowed, score, float("-inf"))
        best = tl.max(score, 1)
        worst = tl.min(kept, 1)
        while tl.max((best > worst).to(tl.int32)) > 0:
            enters = best > worst
            entering = tl.min(tl.where(score == best[:, None], slot[None, :], num_slots), 1)
            leaving = tl.max(tl.where(kept == worst[:, None], ids, -2147483648), 1)
            here = enters[:, None] & (ids == leaving[:, None])
            kept = tl.where(here, best[:, None], kept)
            ids = tl.where(here, entering[:, None], ids)
            taken = enters[:, None] & (slot[None, :] == entering[:, None])
            score = tl.where(taken, float("-inf"), score)
            best = tl.max(score, 1)
            worst = tl.min(kept, 1)

    target = ((batch * num_tokens + token) * K + key_head) * (TOP + 1)
    index = tl.where(ids >= 0, ids - (document // BLOCK)[:, None], -1)
    tl.store(
        choice + target[:, None] + 1 + place[None, :],
        index,
        mask=exists[:, None] & (place < TOP)[None, :],
    )
    tl.store(choice + target, tl.where(far >= document, 0, -1), mask=exists)


def choose(
    q: Tensor, k: Tensor, doc_start: Tensor, cos: Tensor | None, sin: Tensor | None,
    window: int, block: int, top_k: int, stretch: int,
) -> Tensor:  # fmt: skip
    """The choice [B, T, K, top_k + 1] int32, unordered; all tensors contiguous."""
    batch, num_tokens, heads, size = q.shape
    key_heads = k.shape[2]
    num_slots = triton.cdiv(num_tokens, block)
    k = rotate_stretched(k, cos, sin, doc_start, stretch)
    means = k.new_empty(batch, key_heads, num_slots, size)
    choice = torch.empty(
        batch, num_tokens, key_heads, top_k + 1, dtype=torch.int32, device=q.device
    )
    block_m, block_n = (64, 64) if q.dtype != torch.float32 else (32, 32)
    if padded(size) > 128:
        block_m, block_n = block_m // 2, block_n // 2
    num_blocks = triton.cdiv(num_tokens, block_m)
    with torch.cuda.device_of(q):
        block_mean_kernel[(num_slots, key_heads, batch)](
            k, doc_start, means, num_tokens, num_slots,
            K=key_heads, D=size, BLOCK=block, BLOCK_D=padded(size), num_warps=4,
        )  # fmt: skip
        choose_kernel[(batch * num_blocks * key_heads,)](
            q, means, doc_start, cos, sin, choice, num_tokens, num_slots, num_blocks, window,
            stretch, H=heads, K=key_heads, D=size, BLOCK=block, TOP=top_k,
            KEEP=max(2, triton.next_power_of_2(top_k)), BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_D=padded(size), PRECISION=precision_of(q.dtype), num_warps=4, num_stages=2,
        )  # fmt: skip
    return choice


def choose_blocks(
    q: Tensor, k: Tensor, *, window: int, block: int, top_k: int, stretch: int,
    doc_start: Tensor, rotary: Rotary | None,
) -> Tensor:  # fmt: skip
    """Same contract as `routed.choose_blocks`."""
    from .triton_routed_op import choice_of

    choice = choice_of(q, k, doc_start, rotary, window, block, top_k, stretch)
    nothing = torch.iinfo(torch.int32).max
    ordered = torch.where(choice < 0, nothing, choice).sort(dim=-1).values
    return torch.where(ordered == nothing, -1, ordered)
