"""One hop with the Triton kernels, as a differentiable operator for `torch.compile`.

It is a custom operator with a shape-only implementation, so that it does not break a compiled
graph. Internally, log-sum-exps are [B, H, T], so that neighbors on a line are adjacent in memory.
"""

from typing import Any

import torch
from torch import Tensor

from ..fold import HopInputs, Rotary, State
from .backward import hop_backward
from .forward import hop_forward
from .launch import Hop

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_SIZE = 256


def why_not(q: Tensor, k: Tensor, values: Tensor, ahead: bool) -> str | None:
    """Why the Triton kernels do not support these inputs, or None if they do."""
    sizes = (q.shape[3], values.shape[3])
    if ahead:
        return 'causal must be True, got False (use "blocked")'
    if not (q.dtype == k.dtype == values.dtype) or q.dtype not in _DTYPES:
        dtypes = f"{q.dtype}, {k.dtype}, {values.dtype}"
        return f"q, k, values must all be bf16, fp16 or fp32, got {dtypes}"
    if max(sizes) > _MAX_SIZE or any(size % 2 for size in sizes):
        return f"head sizes must be even and at most {_MAX_SIZE}, got {sizes}"
    if values.shape[2] not in (k.shape[2], q.shape[2]):
        heads = f"{k.shape[2]} (key) or {q.shape[2]} (query) heads"
        return f"values must have {heads}, got {values.shape[2]}"
    return None


def hop(inputs: HopInputs) -> State:
    """Same as `dense.hop`, on the GPU; causal only, head sizes even and at most 256.

    If the values and the state's z are the same tensor object, their gradients are computed
    together, which is faster.

    Raises:
        ValueError: the kernels do not support the inputs (`why_not`).
    """
    q, k, values, stride, length, reach, bias, state, rotary, _, ahead = inputs
    require(q, k, values, ahead is not None)
    z_before, lse_before = state or (None, None)
    if lse_before is not None:
        lse_before = lse_before.float().transpose(1, 2).contiguous()
    z, lse = _hop(
        q.contiguous(), k.contiguous(), values.contiguous(), reach.contiguous(),
        None if bias is None else bias.float().contiguous(),
        None if z_before is values or z_before is None else z_before.contiguous(), lse_before,
        *rotary_tables(rotary), stride, length, inputs.score_scale,
    )  # fmt: skip
    return z, lse.transpose(1, 2)


def require(q: Tensor, k: Tensor, values: Tensor, ahead: bool) -> None:
    """Raise ValueError unless the kernels support these inputs."""
    reason = why_not(q, k, values, ahead)
    if reason is not None:
        raise ValueError(f'backend = "triton": {reason}')


def score_scale(q: Tensor, scale: float | None) -> float:
    """The factor on the scores, by default 1 / sqrt(D)."""
    return q.shape[3] ** -0.5 if scale is None else scale


def rotary_tables(rotary: Rotary | None) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin as the kernels read them."""
    if rotary is None:
        return None, None
    return rotary.cos.float().contiguous(), rotary.sin.float().contiguous()


def new_state(q: Tensor, values: Tensor) -> State:
    """Uninitialized z [B, T, H, E] and lse [B, H, T]."""
    batch, num_tokens, heads, _ = q.shape
    z = values.new_empty(batch, num_tokens, heads, values.shape[3])
    return z, q.new_empty(batch, heads, num_tokens, dtype=torch.float32)


@torch.library.custom_op("tensor_attention::hop", mutates_args=())
def _hop(
    q: Tensor, k: Tensor, values: Tensor, reach: Tensor, bias: Tensor | None,
    z_before: Tensor | None, lse_before: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    stride: int, length: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z, lse. If `lse_before` is given without `z_before`, the values are the state's z."""
    z, lse = new_state(q, values)
    before = values if z_before is None else z_before
    inputs = Hop(q, k, values, reach, bias, before, lse_before, cos, sin, stride, length, scale)
    hop_forward(inputs, z, lse)
    return z, lse


@_hop.register_fake
def _(
    q: Tensor, k: Tensor, values: Tensor, reach: Tensor, bias: Tensor | None,
    z_before: Tensor | None, lse_before: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    stride: int, length: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return new_state(q, values)


@torch.library.custom_op("tensor_attention::hop_backward", mutates_args=())
def _hop_backward(
    q: Tensor, k: Tensor, values: Tensor, reach: Tensor, bias: Tensor | None,
    z_before: Tensor | None, lse_before: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    z: Tensor, lse: Tensor, dz: Tensor, dlse: Tensor | None,
    stride: int, length: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dvalues, dbias, dz_before, dlse_before; empty tensors for absent inputs."""
    dq, dk, dvalues = torch.empty_like(q), torch.empty_like(k), torch.empty_like(values)
    dz_before = None if z_before is None else torch.empty_like(z_before)
    before = values if z_before is None else z_before
    inputs = Hop(q, k, values, reach, bias, before, lse_before, cos, sin, stride, length, scale)
    rest = hop_backward(
        inputs, z, lse, dz, dlse, delta=None, dq=dq, dk=dk, accumulate=False,
        dvalues=dvalues, dz_before=dz_before,
    )  # fmt: skip
    return (
        dq, dk, dvalues,
        q.new_empty(0) if bias is None or rest.dbias is None else rest.dbias.to(bias.dtype),
        q.new_empty(0) if dz_before is None else dz_before,
        q.new_empty(0) if rest.dlse_before is None else rest.dlse_before,
    )  # fmt: skip


@_hop_backward.register_fake
def _(
    q: Tensor, k: Tensor, values: Tensor, reach: Tensor, bias: Tensor | None,
    z_before: Tensor | None, lse_before: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    z: Tensor, lse: Tensor, dz: Tensor, dlse: Tensor | None,
    stride: int, length: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dbias, dz_before, dlse_before = (
        q.new_empty(0) if x is None else torch.empty_like(x) for x in (bias, z_before, lse_before)
    )
    return (
        torch.empty_like(q), torch.empty_like(k), torch.empty_like(values),
        dbias, dz_before, dlse_before,
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
    *tensors, ctx.stride, ctx.length, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dz: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    _, _, _, _, bias, z_before, lse_before, _, _, z, _ = saved
    dz = torch.zeros_like(z) if dz is None else dz.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dvalues, dbias, dz_before, dlse_before = _hop_backward(
        *saved, dz, dlse, ctx.stride, ctx.length, ctx.scale
    )
    return (
        dq, dk, dvalues, None,
        None if bias is None else dbias,
        None if z_before is None else dz_before,
        None if lse_before is None else dlse_before,
        None, None, None, None, None,
    )  # fmt: skip


_hop.register_autograd(_gradient, setup_context=_save)
