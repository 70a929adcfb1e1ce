"""One hop for the newest tokens of a sequence with cached keys and values: decoding.

Each query reads only the entries that it visits: `length` along the first axis, T / stride along
the outermost. Shape letters: B batch, Q new tokens, T all tokens, N steps of the axis, H query
heads, K key heads, G = H / K, D head size, E value size. This file imports only `fold` from the
project, because exported Hugging Face folders contain it.
"""

import torch
from torch import Tensor

from .fold import FLOOR, MASKED, HopInputs, Rotary, State, apply_rotary, full_precision

# Queries whose entries are gathered at a time: bounds the memory for a chunk of a long prompt.
_QUERY_CHUNK = 64


def hop_cached(
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
) -> State:
    """The results of `dense.hop` for the last Q of T tokens.

    Args:
        q: [B, Q, H, D], not rotated if `rotary` is given.
        k: [B, T, K, D] of all tokens, rotated if and only if q is.
        values: [B, V, K or H, E] of the last V <= T tokens: as many as the hop reaches back.
        stride, length, bias, rotary, scale: as in `dense.hop`.
        reach: [B, Q] int32, number of strides that each query may look back.
        state: (z [B, Q, H, E], lse [B, Q, H]) of the previous hop, or None for the first hop.

    Returns:
        (z [B, Q, H, E] in the dtype of `values`, lse [B, Q, H] in float32 or wider). A query that
        attends to nothing has z = 0 and lse = -inf.
    """
    parts = []
    for at in range(0, max(1, q.shape[1]), _QUERY_CHUNK):
        rows = slice(at, at + _QUERY_CHUNK)
        state_rows = None if state is None else (state[0][:, rows], state[1][:, rows])
        first = k.shape[1] - q.shape[1] + at
        positions = torch.arange(first, first + q[:, rows].shape[1], device=q.device)
        parts.append(
            _hop_rows(
                HopInputs(
                    q[:, rows], k, values, stride, length, reach[:, rows], bias, state_rows, rotary,
                    scale,
                ),
                positions,
            )
        )  # fmt: skip
    return torch.cat([z for z, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)


def _hop_rows(inputs: HopInputs, positions: Tensor) -> State:
    """The hop of queries at `positions` [Q]; `inputs.q` and `inputs.reach` are theirs alone."""
    q, k, values, stride, length, reach, bias, state, rotary, _, _ = inputs
    num_tokens, num_heads = k.shape[1], q.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    scale = inputs.score_scale
    nearest = 0 if state is None else 1
    steps = torch.arange(nearest, min(length, (num_tokens - 1) // stride + 1), device=q.device)
    visited = positions[:, None] - steps * stride  # [Q, N]
    allowed = (steps <= reach[:, :, None]) & (visited >= 0)  # [B, Q, N]
    visited = visited.clamp(min=0)

    keys = _gather(k, visited)  # [B, Q, N, K, D]
    if rotary is not None:
        q = apply_rotary(q, rotary, positions // stride)
        keys = apply_rotary(keys, rotary, visited // stride)
    first_value = num_tokens - values.shape[1]
    visited_values = _gather(values, (visited - first_value).clamp(min=0))

    q_groups = q.to(work).unflatten(2, (k.shape[2], -1))
    with full_precision(q.device):
        scores = torch.einsum("bqkgd,bqnkd->bqkgn", q_groups, keys.to(work)).flatten(2, 3) * scale
    if bias is not None:
        scores = scores + bias.to(work)[:, None]
    scores = scores.masked_fill(~allowed[:, :, None], MASKED)
    if state is not None:
        scores = torch.cat((scores, state[1].to(work)[..., None].clamp(min=MASKED)), dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    sees_nothing = lse < FLOOR
    weights = torch.softmax(scores, dim=-1).masked_fill(sees_nothing[..., None], 0)
    value_heads = values.shape[2]
    grouped = weights[..., : len(steps)].unflatten(2, (value_heads, num_heads // value_heads))
    with full_precision(q.device):
        z = torch.einsum("bqkgn,bqnke->bqkge", grouped, visited_values.to(work)).flatten(2, 3)
    if state is not None:
        z = z + weights[..., -1:] * state[0].to(work)
    return z.to(values.dtype), lse.masked_fill(sees_nothing, float("-inf"))


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """x[:, tokens]; gradients of an entry that several queries visit are added in float32."""
    if not x.requires_grad:
        return x[:, tokens]
    return x.to(torch.promote_types(x.dtype, torch.float32))[:, tokens].to(x.dtype)
