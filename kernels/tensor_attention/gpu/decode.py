# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""One new token of a routed layer in two kernels: the results of `routed_decode`.

Decoding one sequence waits for the host, which launches operations: here two instead of about
sixty. The first kernel (`decode_prepare`) rotates the token, writes it to the cache and scores the
far blocks. The second chooses blocks and attends to the window and the open blocks. Nothing waits
for the GPU, and two runs agree in every bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routed_decode import Step
from ..routing import KERNEL_BLOCKS, KERNEL_PARTS
from .common import FLOOR, MASKED, add_product, dot, load_tile, tile_columns
from .decode_choice import choose_slots, list_open
from .decode_prepare import buffer_rows
from .launch import LOG2E, is_interpreted, padded, precision_of

# Maximum slots of far blocks, and maximum entries of an open tile, of one program.
_MOST_SLOTS = 1 << 15
_MOST_OPEN = 2048
_SIZES = [
    "num_tokens", "num_slots", "window", "near_rows", "last", "before", "key_room", "near_room",
    "value_room", "choice_room",
]  # fmt: skip


def supports(q: Tensor, values: Tensor, step: Step, top_k: int, block: int, pool: int) -> bool:
    """Whether the kernels support this token's shapes and settings."""
    return (
        q.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and max(q.shape[3], values.shape[3]) <= 256
        and q.shape[3] % 2 == 0
        and block in KERNEL_BLOCKS
        and triton.cdiv(block, pool) <= KERNEL_PARTS
        and step.blocks.shape[-1] <= _MOST_SLOTS
        and step.own.shape[1] * (top_k + 1) <= _MOST_OPEN
    )


@triton.jit
def add_keys(
    acc, top, total, b_q, k, v, row, value_row, seen, scale,
    K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys at rows `row` of k and `value_row` of v, if `seen`, to the running softmax."""
    b_k = load_tile(k, row.to(tl.int64) * (K * D), seen, D, BLOCK_D)
    b_v = load_tile(v, value_row.to(tl.int64) * (K * E), seen, E, BLOCK_E)
    score = tl.where(seen[None, :], dot(b_q, tl.trans(b_k), PRECISION), MASKED)
    top_next = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.exp2(score * scale - top_next[:, None])
    keep = tl.exp2(top - top_next)
    acc = add_product(acc * keep[:, None], weight.to(b_v.dtype), b_v, PRECISION)
    return acc, top_next, total * keep + tl.sum(weight, 1)


@triton.jit(do_not_specialize=_SIZES)
def decode_kernel(
    turned, near_k, far_k, values, scores, document, blocks, first_block, own, choices, scratch, z,
    num_tokens, num_slots, window, near_rows, last, before,
    key_room, near_room, value_room, choice_room, scale,
    B: tl.constexpr, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr,
    SLOTS: tl.constexpr, OPEN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z [B, 1, H, E] of the last of `num_tokens` tokens. Program: (batch, key head).

    near_k [B, near_rows, K, D], far_k and values [B, T, K, .], scores [B, K, N], choices
    [B, TOKENS, K, TOP_K + 1], whose last row is written. `last`: the last token before the window.
    `before`: places for marks of blocks in a program's scratch, before its list of open blocks.
    """
    program = tl.program_id(0)
    head = program % K
    batch = (program // K).to(tl.int64)
    G: tl.constexpr = H // K
    near_k += batch * near_room * (K * D) + head * D
    far_k += batch * key_room * (K * D) + head * D
    values += batch * value_room * (K * E) + head * E
    choices += batch * choice_room * (K * (TOP_K + 1)) + head * (TOP_K + 1)
    token_row = K * (TOP_K + 1)
    chosen = choices + (TOKENS - 1) * token_row
    tl.store(chosen, tl.load(first_block + batch).to(tl.int32))
    choose_slots(
        chosen + 1, scores + program * num_slots, blocks + batch * num_slots, num_slots,
        TOP_K, SLOTS,
    )  # fmt: skip
    tl.debug_barrier()
    scratch += program.to(tl.int64) * (before + OPEN)
    count = list_open(
        scratch + before, scratch, choices, own + batch * TOKENS, token_row, TOKENS, TOP_K + 1, OPEN
    )
    tl.debug_barrier()

    row = tl.arange(0, GROUP)
    vector = (batch * H + head * G + row) * D
    near_q = load_tile(turned, vector, row < G, D, BLOCK_D)
    far_q = load_tile(turned + B * H * D, vector, row < G, D, BLOCK_D)
    first = tl.load(document + batch).to(tl.int32)
    top = tl.full([GROUP], FLOOR, tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, BLOCK_E], tl.float32)
    for start in range(0, window, BLOCK_N):
        offset = start + tl.arange(0, BLOCK_N)
        token = num_tokens - window + offset
        seen = (offset < window) & (token >= first)
        acc, top, total = add_keys(
            acc, top, total, near_q, near_k, values, near_rows - window + offset, token, seen,
            scale, K, D, E, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    for i in range(0, count):
        token = first + tl.load(scratch + before + i) * BLOCK + tl.arange(0, BLOCK)
        acc, top, total = add_keys(
            acc, top, total, far_q, far_k, values, token, token, token <= last,
            scale, K, D, E, BLOCK_D, BLOCK_E, PRECISION,
        )  # fmt: skip
    column, inside = tile_columns(E, BLOCK_E)
    target = z + ((batch * H + head * G + row) * E)[:, None] + column[None, :]
    tl.store(
        target, (acc / total[:, None]).to(z.dtype.element_ty),
        mask=(row < G)[:, None] & inside[None, :],
    )  # fmt: skip


def decode_token(
    turned: Tensor, scores: Tensor, near: Tensor, keys: Tensor, values: Tensor, choices: Tensor,
    step: Step, *, block: int, top_k: int, scale: float,
) -> Tensor:  # fmt: skip
    """[B, 1, H, E]: choose, then attend to the window and the open blocks.

    Args:
        turned, scores: from `prepare_token`, which has written near, keys and values.
        choices: [B, at least R, K, top_k + 1] int32 of the last tokens; the last row is written.
        step: the token's step.
        block, top_k, scale: as in `routed_decode`.
    """
    batch, heads, size = turned.shape[1:]
    num_tokens, key_heads, value_size = values.shape[1:]
    num_slots, tokens = scores.shape[2], step.own.shape[1]
    opened = triton.next_power_of_2(tokens * (top_k + 1))
    marks = num_tokens // block + 2
    choices = choices[:, -tokens:]
    z = values.new_empty(batch, 1, heads, value_size)
    places = batch * key_heads * (marks + opened)
    scratch = torch.empty(places, dtype=torch.int32, device=values.device)
    with torch.cuda.device_of(values):
        decode_kernel[(batch * key_heads,)](
            turned, near, keys, values, scores, step.document, step.blocks, step.first_block,
            step.own, choices, scratch, z,
            num_tokens, num_slots, step.hidden.shape[-1], near.shape[1], step.last, marks,
            buffer_rows(keys), buffer_rows(near), buffer_rows(values), buffer_rows(choices),
            scale * LOG2E,
            B=batch, H=heads, K=key_heads, D=size, E=value_size,
            GROUP=max(16, triton.next_power_of_2(heads // key_heads)), BLOCK=block, TOP_K=top_k,
            TOKENS=tokens, SLOTS=max(16, triton.next_power_of_2(num_slots)), OPEN=opened,
            BLOCK_N=16 if is_interpreted() else 64, BLOCK_D=padded(size),
            BLOCK_E=padded(value_size), PRECISION=precision_of(turned.dtype),
            num_warps=4, num_stages=3 if size <= 128 and turned.itemsize == 2 else 1,
        )  # fmt: skip
    return z
