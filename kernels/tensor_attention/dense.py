"""The definition of one hop, T x T, in any dtype: the reference for all other implementations.

Shape letters: B batch, T tokens, H query heads, K key/value heads, D head size, E value size.
"""

import torch

from .fold import FLOOR, MASKED, HopInputs, State, full_precision, rotate_along


def hop(inputs: HopInputs) -> State:
    """Strided causal attention that starts from a state and returns a state (kernels/README.md).

    Token t attends to u = t - j * stride for 0 <= j < length, as far back as `reach` allows. With a
    `state`, which covers the token itself and all nearer tokens, j starts at 1.

    Returns:
        (z [B, T, H, E] in the dtype of `values`, lse [B, T, H] in float32 or wider). A token that
        attends to nothing has z = 0, lse = -inf and zero gradients.
    """
    q, k, values, stride, length, reach, bias, state, rotary, _, ahead = inputs
    num_tokens, num_heads = q.shape[1:3]
    if rotary is not None:
        q, k = rotate_along(q, rotary, stride), rotate_along(k, rotary, stride)
    work = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(num_heads // k.shape[2], dim=2)
    v = values.repeat_interleave(num_heads // values.shape[2], dim=2).to(work)

    with full_precision(q.device):
        scores = torch.einsum("bthd,buhd->bhtu", q.to(work), k.to(work)) * inputs.score_scale
    if bias is not None:
        scores = scores + bias.to(work)[:, None, None]
    position = torch.arange(num_tokens, device=q.device)
    distance = position[:, None] - position[None, :]
    steps = torch.div(distance, stride, rounding_mode="floor")
    nearest = 0 if state is None else 1
    allowed = (distance % stride == 0) & (steps < length) & (steps <= reach[:, :, None])
    if ahead is None:
        allowed = allowed & (steps >= nearest)
    else:
        allowed = allowed & (steps > -length) & (steps >= -ahead[:, :, None])
    scores = scores.masked_fill(~allowed[:, None], MASKED)

    # The state acts as one more key, with its log-sum-exp as score and its z as value.
    if state is not None:
        z_before, lse_before = state
        lse_before = lse_before.to(work).transpose(1, 2)[..., None]
        scores = torch.cat((scores, lse_before.clamp(min=MASKED)), dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    sees_nothing = lse < FLOOR
    weights = torch.softmax(scores, dim=-1).masked_fill(sees_nothing[..., None], 0)
    with full_precision(q.device):
        z = torch.einsum("bhtu,buhe->bthe", weights[..., :num_tokens], v)
    if state is not None:
        z = z + weights[..., num_tokens].transpose(1, 2)[..., None] * z_before.to(work)
    return z.to(values.dtype), lse.masked_fill(sees_nothing, float("-inf")).transpose(1, 2)
