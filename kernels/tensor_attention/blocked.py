"""One hop in plain PyTorch with O(T * length) memory: the CPU path, differentiable by autograd.

A hop of stride s splits the row into s independent lines (t mod s) of T / s tokens each. Along a
line, the hop is a sliding window: a block of L queries reads its own block of keys and the blocks
before it (and after it, if not causal) that `length` reaches into.

Shape letters: B batch, S lines, N blocks, L block length, W window, H query heads, K key heads,
G = H / K query heads per key head, D head size, E value size. This file imports only `fold` from
the project, because exported Hugging Face folders contain it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .fold import FLOOR, MASKED, HopInputs, State, full_precision, rotate_along


def hop(inputs: HopInputs) -> State:
    """Same as `dense.hop`, but peak memory grows with T * length instead of T * T.

    Products and softmax are in float32 or wider. z is rounded once, to the dtype of `values`.
    """
    q, k, values, stride, length, _, bias, state, rotary, _, ahead = inputs
    num_tokens = q.shape[1]
    if rotary is not None:
        q, k = rotate_along(q, rotary, stride), rotate_along(k, rotary, stride)
    work = torch.promote_types(q.dtype, torch.float32)
    block, before = _block_size(length, -(-num_tokens // stride))
    after = before if ahead is not None else 0

    q_blocks = _to_blocks(q.to(work), stride, block)
    k_window = _window(_to_blocks(k.to(work), stride, block), before, after)
    v_window = _window(_to_blocks(values.to(work), stride, block), before, after)
    allowed = _allowed(inputs, block, before, after)
    scores = _grouped_matmul(q_blocks * inputs.score_scale, k_window.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias.to(work)[:, None, None]
    scores = scores.masked_fill(~allowed, MASKED)

    # One exponential per score, relative to the largest, which cancels in z and lse and therefore
    # needs no gradient.
    largest = scores.detach().amax(dim=-1)  # [B, S, N, H, L]
    weights = torch.exp(scores - largest[..., None])
    lse = largest + weights.sum(dim=-1).log()
    if state is not None:
        lse_before = _to_blocks(state[1][..., None].to(work), stride, block)[..., 0]
        lse_before = lse_before.clamp(min=MASKED)
        lse = torch.logaddexp(lse_before, lse)
    sees_nothing = lse < FLOOR
    z = _grouped_matmul(weights, v_window)
    z = z * torch.exp(largest - lse).masked_fill(sees_nothing, 0)[..., None]
    if state is not None:
        z_before = _to_blocks(state[0].to(work), stride, block)
        z = z + torch.exp(lse_before - lse).masked_fill(sees_nothing, 0)[..., None] * z_before
    lse = lse.masked_fill(sees_nothing, float("-inf"))
    z, lse = _from_blocks(z, num_tokens), _from_blocks(lse[..., None], num_tokens)[..., 0]
    return z.to(values.dtype), lse


def _block_size(length: int, line: int) -> tuple[int, int]:
    """Block length, and the number of earlier blocks that a window of `length` tokens reaches into.

    A line that fits in the window is one block. Otherwise, a block is a quarter of the window:
    short, because each query computes as many masked scores as its block has tokens. The length
    always divides the window, so that a line cut at a multiple of the window has the same blocks,
    and bits, as the whole line.
    """
    if length >= line:
        return line, 0
    return (length // 4, 4) if length % 4 == 0 else (length, 1)


def _to_blocks(x: Tensor, stride: int, block: int) -> Tensor:
    """[B, T, H, D] -> [B, S, N, H, L, D], padded with zeros at the end of the row."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % (stride * block)))
    return x.unflatten(1, (-1, block, stride)).permute(0, 3, 1, 4, 2, 5)


def _from_blocks(x: Tensor, num_tokens: int) -> Tensor:
    """[B, S, N, H, L, D] -> [B, T, H, D], without the padding."""
    return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 3)[:, :num_tokens]


def _window(x: Tensor, before: int, after: int) -> Tensor:
    """Join each block with its neighbors: [B, S, N, H, L, D] -> [B, S, N, H, W, D]."""
    num_blocks = x.shape[2]
    x = F.pad(x, (0, 0, 0, 0, 0, 0, before, after))
    return torch.cat([x[:, :, i : i + num_blocks] for i in range(before + 1 + after)], dim=4)


def _grouped_matmul(x: Tensor, y: Tensor) -> Tensor:
    """[..., H, L, A] @ [..., K or H, A, C] -> [..., H, L, C], without copying y per query head."""
    num_heads, rows = x.shape[-3], x.shape[-2]
    group = num_heads // y.shape[-3]
    folded = x.unflatten(-3, (-1, group)).flatten(-3, -2)
    with full_precision(x.device):
        product = folded @ y
    return product.unflatten(-2, (group, rows)).flatten(-4, -3)


def _allowed(inputs: HopInputs, block: int, before: int, after: int) -> Tensor:
    """[B, S, N, 1, L, W] bool: whether each query attends to each token of its window."""
    stride, length, ahead = inputs.stride, inputs.length, inputs.ahead
    num_tokens, nearest = inputs.q.shape[1], 0 if inputs.state is None else 1
    line_step = torch.arange(num_tokens, device=inputs.reach.device) // stride
    reach = torch.minimum(inputs.reach, line_step)  # not into the padding before the row
    slots = torch.arange((before + 1 + after) * block, device=reach.device)
    queries = torch.arange(block, device=reach.device) + before * block
    steps = queries[:, None] - slots[None, :]  # [L, W]
    reach_blocks = _to_blocks(reach[..., None, None], stride, block)
    allowed = (steps < length) & (steps <= reach_blocks)
    if ahead is None:
        return allowed & (steps >= nearest)
    last_step = (num_tokens - 1 - torch.arange(num_tokens, device=reach.device)) // stride
    ahead = torch.minimum(ahead, last_step)
    ahead_blocks = _to_blocks(ahead[..., None, None], stride, block)
    return allowed & (steps > -length) & (steps >= -ahead_blocks)
