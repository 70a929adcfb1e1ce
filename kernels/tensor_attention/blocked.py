"""One hop in plain PyTorch with O(T * length) memory: the CPU path, differentiable by autograd.

A hop of stride s splits the row into s independent lines (t mod s) of T / s tokens each. Along a
line the hop is a sliding window, so each block of `length` queries needs its own block of keys and
the one before it (and the one after it when it may look ahead).

Shape letters: B batch, S lines, N blocks, L block length, W window, H query heads, K key heads,
G = H / K query heads per key head, D head size, E value size. This file has no imports from the
project but `fold`: it also travels inside exported Hugging Face folders.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .fold import Rotary, rotate_along

State = tuple[Tensor, Tensor]

# Finite, so that a row whose keys are all masked has a gradient of zero instead of NaN.
MASKED = -1e30


def hop(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    *,
    stride: int,
    length: int,
    reach: Tensor,
    bias: Tensor | None = None,
    state: State | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    ahead: Tensor | None = None,
) -> State:
    """Same contract as `dense.hop`; peak memory grows with T * length instead of T * T."""
    num_tokens, head_dim = q.shape[1], q.shape[3]
    if rotary is not None:
        q, k = rotate_along(q, rotary, stride), rotate_along(k, rotary, stride)
    work = torch.promote_types(q.dtype, torch.float32)
    scale = head_dim**-0.5 if scale is None else scale
    block = min(length, -(-num_tokens // stride))

    allowed = _allowed(reach, ahead, stride, length, block, nearest=0 if state is None else 1)
    q_blocks = _to_blocks(q, stride, block)
    k_window = _window(_to_blocks(k, stride, block), ahead is not None)
    v_window = _window(_to_blocks(values, stride, block), ahead is not None)
    scores = (_grouped_matmul(q_blocks, k_window.transpose(-1, -2)) * scale).to(work)
    if bias is not None:
        scores = scores + bias.to(work)[:, None, None]
    scores = scores.masked_fill(~allowed, MASKED)

    lse = torch.logsumexp(scores, dim=-1)  # [B, S, N, H, L]
    if state is not None:
        lse_before = _to_blocks(state[1][..., None].to(work), stride, block)[..., 0]
        lse = torch.logaddexp(lse_before, lse)
    weights = torch.exp(scores - lse[..., None])
    z = _grouped_matmul(weights.to(values.dtype), v_window)
    if state is not None:
        z_before = _to_blocks(state[0], stride, block)
        z = z + torch.exp(lse_before - lse)[..., None].to(z.dtype) * z_before
    return _from_blocks(z, num_tokens), _from_blocks(lse[..., None], num_tokens)[..., 0]


def _to_blocks(x: Tensor, stride: int, block: int) -> Tensor:
    """[B, T, H, D] -> [B, S, N, H, L, D], padded with zeros at the end of the row."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % (stride * block)))
    return x.unflatten(1, (-1, block, stride)).permute(0, 3, 1, 4, 2, 5)


def _from_blocks(x: Tensor, num_tokens: int) -> Tensor:
    """[B, S, N, H, L, D] -> [B, T, H, D], the padding dropped."""
    return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 3)[:, :num_tokens]


def _window(x: Tensor, with_next: bool) -> Tensor:
    """Join each block with the one before it (and after it): [B,S,N,H,L,D] -> [B,S,N,H,W,D]."""
    if x.shape[2] == 1:
        return x
    zeros = torch.zeros_like(x[:, :, :1])
    parts = [torch.cat((zeros, x[:, :, :-1]), dim=2), x]
    if with_next:
        parts.append(torch.cat((x[:, :, 1:], zeros), dim=2))
    return torch.cat(parts, dim=4)


def _grouped_matmul(x: Tensor, y: Tensor) -> Tensor:
    """[..., H, L, A] @ [..., K or H, A, C] -> [..., H, L, C], y not copied per query head."""
    num_heads, rows = x.shape[-3], x.shape[-2]
    group = num_heads // y.shape[-3]
    folded = x.unflatten(-3, (-1, group)).flatten(-3, -2)
    return (folded @ y).unflatten(-2, (group, rows)).flatten(-4, -3)


def _allowed(
    reach: Tensor, ahead: Tensor | None, stride: int, length: int, block: int, nearest: int
) -> Tensor:
    """[B, S, N, 1, L, W] bool: which slots of its window each query attends to."""
    num_blocks = -(-reach.shape[1] // (stride * block))
    parts = 1 if num_blocks == 1 else 2 if ahead is None else 3
    slots = torch.arange(parts * block, device=reach.device)
    queries = torch.arange(block, device=reach.device) + (block if parts > 1 else 0)
    steps = queries[:, None] - slots[None, :]  # [L, W]
    reach_blocks = _to_blocks(reach[..., None, None], stride, block)
    allowed = (steps < length) & (steps <= reach_blocks)
    if ahead is None:
        return allowed & (steps >= nearest)
    return (
        allowed & (steps > -length) & (steps >= -_to_blocks(ahead[..., None, None], stride, block))
    )
