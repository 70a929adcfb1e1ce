"""All hops of the operator with the Triton kernels, as one differentiable operator.

Compared with a loop of single hops, the chain saves memory traffic in the backward pass: dq and dk
are accumulated in place from hop to hop, and each hop also computes the row sums <dz, z> for the
previous one, which would otherwise read two tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..fold import Axis, Rotary
from .backward import hop_backward
from .forward import hop_forward
from .launch import Hop
from .op import require, rotary_tables, score_scale


def chain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Sequence[Axis],
    reaches: Sequence[Tensor],
    *,
    hop_bias: Tensor | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    joint: bool = True,
) -> Tensor:
    """All hops of `tensor_attention` in one operator.

    Args:
        q, k, v, hop_bias, rotary, scale: as in `api.tensor_attention`.
        axes: one per hop, innermost first.
        reaches: the reach of each hop, [B, T] int32.
        joint: True: one softmax over all hops (distance mode); False: one per hop.

    Returns:
        [B, T, H, E] in the dtype of v.

    Raises:
        ValueError: the kernels do not support the inputs.
    """
    require(q, k, v, False)
    out, _, _ = _chain(
        q.contiguous(), k.contiguous(), v.contiguous(), [r.contiguous() for r in reaches],
        hop_bias, *rotary_tables(rotary), [a.stride for a in axes], [a.length for a in axes],
        joint, score_scale(q, scale),
    )  # fmt: skip
    return out


def _new_states(q: Tensor, v: Tensor, hops: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized out [B, T, H, E], inner z [hops - 1, B, T, H, E], lse [hops, B, H, T]."""
    batch, num_tokens, heads, _ = q.shape
    shape = (batch, num_tokens, heads, v.shape[3])
    lse = q.new_empty(hops, batch, heads, num_tokens, dtype=torch.float32)
    return v.new_empty(shape), v.new_empty(hops - 1, *shape), lse


def _bias_of(hop_bias: Tensor | None, hop: int) -> Tensor | None:
    return None if hop_bias is None or hop == 0 else hop_bias[hop - 1].float().contiguous()


@torch.library.custom_op("tensor_attention::chain", mutates_args=())
def _chain(
    q: Tensor, k: Tensor, v: Tensor, reaches: list[Tensor], hop_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, strides: list[int], lengths: list[int],
    joint: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, and z and lse of the hops, as in `_new_states`."""
    out, inner, lse = _new_states(q, v, len(strides))
    values = v
    for i, (stride, length, reach) in enumerate(zip(strides, lengths, reaches, strict=True)):
        z = out if i == len(strides) - 1 else inner[i]
        hop = Hop(
            q, k, values, reach, _bias_of(hop_bias, i), values, lse[i - 1] if joint and i else None,
            cos, sin, stride, length, scale,
        )  # fmt: skip
        hop_forward(hop, z, lse[i])
        values = z
    return out, inner, lse


@_chain.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, reaches: list[Tensor], hop_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, strides: list[int], lengths: list[int],
    joint: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _new_states(q, v, len(strides))


@torch.library.custom_op("tensor_attention::chain_backward", mutates_args=())
def _chain_backward(
    q: Tensor, k: Tensor, v: Tensor, reaches: list[Tensor], hop_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, strides: list[int], lengths: list[int],
    joint: bool, scale: float, out: Tensor, inner: Tensor, lse: Tensor, dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dhop_bias (empty without a bias)."""
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dbias = None if hop_bias is None else torch.empty_like(hop_bias)
    last, delta, dlse = len(strides) - 1, None, None
    for i in range(last, -1, -1):
        values = inner[i - 1] if i else v
        hop = Hop(
            q, k, values, reaches[i], _bias_of(hop_bias, i), values,
            lse[i - 1] if joint and i else None, cos, sin, strides[i], lengths[i], scale,
        )  # fmt: skip
        dvalues = torch.empty_like(values)
        rest = hop_backward(
            hop, out if i == last else inner[i], lse[i], dz, dlse, delta=delta,
            dq=dq, dk=dk, accumulate=i < last, dvalues=dvalues, dz_before=None,
        )  # fmt: skip
        if dbias is not None and rest.dbias is not None:
            dbias[i - 1] = rest.dbias
        dz, dlse, delta = dvalues, rest.dlse_before, rest.delta_before
    return dq, dk, dz, q.new_empty(0) if dbias is None else dbias


@_chain_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, reaches: list[Tensor], hop_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, strides: list[int], lengths: list[int],
    joint: bool, scale: float, out: Tensor, inner: Tensor, lse: Tensor, dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias = q.new_empty(0) if hop_bias is None else torch.empty_like(hop_bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, reaches, hop_bias, cos, sin, ctx.strides, ctx.lengths, ctx.joint, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, hop_bias, cos, sin, *output, *reaches)
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, dz: Tensor | None, *_of_saved_states: Tensor | None
) -> tuple[Tensor | list[None] | None, ...]:
    q, k, v, hop_bias, cos, sin, out, inner, lse, *reaches = ctx.saved_tensors
    dq, dk, dv, dbias = _chain_backward(
        q, k, v, reaches, hop_bias, cos, sin, ctx.strides, ctx.lengths, ctx.joint, ctx.scale,
        out, inner, lse, torch.zeros_like(out) if dz is None else dz.contiguous(),
    )  # fmt: skip
    none = [None] * len(reaches)
    return (
        dq, dk, dv, none, dbias if hop_bias is not None else None,
        None, None, None, None, None, None,
    )  # fmt: skip


_chain.register_autograd(_gradient, setup_context=_save)
