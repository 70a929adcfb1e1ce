"""The choice and the routed hop with the Triton kernels, as operators for `torch.compile`."""

from typing import Any

import torch
from torch import Tensor

from ..fold import Rotary, State
from ..routing import POOL, why_no_kernels
from .op import require, rotary_tables
from .routed_backward import routed_backward
from .routed_choice import choose
from .routed_forward import routed_forward
from .routed_launch import SHARED_MEMORY, Routed, operand_bytes
from .routed_lists import readers_of_blocks, tile_lists


def choose_blocks(
    q: Tensor, k: Tensor, *, window: int, block: int, top_k: int, pool: int, doc_start: Tensor,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """The choice [B, Q, K, top_k + 1] int32 of `routed.choose_blocks`, in any order.

    Raises:
        ValueError: the kernels do not support the inputs.
    """
    require(q, k, k, False)
    _require(why_no_kernels(block, 1, pool))
    return _choose(
        q.contiguous(), k.contiguous(), doc_start.to(torch.int32).contiguous(),
        window, block, top_k, pool, first,
    )  # fmt: skip


def hop(
    q: Tensor, k: Tensor, values: Tensor, choice: Tensor, *, window: int, block: int,
    stretch: int, open_tile: int, doc_start: Tensor, state: State, rotary: Rotary | None,
    scale: float, first: int = 0,
) -> State:  # fmt: skip
    """Same as `routed.routed_hop`, on the GPU.

    Raises:
        ValueError: the kernels do not support the inputs.
    """
    require(q, k, values, False)
    _require(why_not(q, k, values, block, open_tile))
    if values.shape[2] != k.shape[2]:
        raise ValueError(
            f'backend = "triton": values must have {k.shape[2]} heads, like k, got '
            f"{values.shape[2]}"
        )
    z_before, lse_before = state
    z, lse = _hop(
        q.contiguous(), k.contiguous(), values.contiguous(), choice.contiguous(),
        doc_start.to(torch.int32).contiguous(), z_before.contiguous(),
        lse_before.float().transpose(1, 2).contiguous(), *rotary_tables(rotary),
        window, block, stretch, open_tile, scale, first,
    )  # fmt: skip
    return z, lse.transpose(1, 2)


def why_not(
    q: Tensor, k: Tensor, values: Tensor, block: int, open_tile: int, pool: int = POOL
) -> str | None:
    """Why the routed kernels do not support these numbers and inputs, or None if they do."""
    return why_no_kernels(block, open_tile, pool) or _too_large(q, k, values, block)


def _too_large(q: Tensor, k: Tensor, values: Tensor, block: int) -> str | None:
    needed = operand_bytes(q, k, values, block)
    if needed <= SHARED_MEMORY:
        return None
    group = q.shape[2] // k.shape[2]
    return (
        f"q with {group} heads of size {q.shape[3]} in {q.dtype} per key head must fit in "
        f"{SHARED_MEMORY} bytes of shared memory, got {needed} (use a smaller dtype or blocked)"
    )


def _require(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f'backend = "triton": {reason}')


@torch.library.custom_op("tensor_attention::choose_blocks", mutates_args=())
def _choose(
    q: Tensor, k: Tensor, doc_start: Tensor, window: int, block: int, top_k: int, pool: int,
    first: int = 0,
) -> Tensor:  # fmt: skip
    return choose(q, k, doc_start, window, block, top_k, pool, first)


@_choose.register_fake
def _(
    q: Tensor, k: Tensor, doc_start: Tensor, window: int, block: int, top_k: int, pool: int,
    first: int = 0,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:2], k.shape[2], top_k + 1, dtype=torch.int32)


def _new_state(q: Tensor, values: Tensor) -> State:
    """Uninitialized z [B, Q, H, E] and lse [B, H, Q]."""
    batch, num_tokens, heads, _ = q.shape
    z = values.new_empty(batch, num_tokens, heads, values.shape[3])
    return z, q.new_empty(batch, heads, num_tokens, dtype=torch.float32)


@torch.library.custom_op("tensor_attention::routed_hop", mutates_args=())
def _hop(
    q: Tensor, k: Tensor, values: Tensor, choice: Tensor, doc_start: Tensor,
    z_before: Tensor, lse_before: Tensor, cos: Tensor | None, sin: Tensor | None,
    window: int, block: int, stretch: int, open_tile: int, scale: float, first: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    routed = Routed(
        q, k, values, choice, doc_start, cos, sin, window, block, stretch, open_tile, scale, first
    )
    z, lse = _new_state(q, values)
    routed_forward(routed, tile_lists(routed), z_before, lse_before, z, lse)
    return z, lse


@_hop.register_fake
def _(
    q: Tensor, k: Tensor, values: Tensor, choice: Tensor, doc_start: Tensor,
    z_before: Tensor, lse_before: Tensor, cos: Tensor | None, sin: Tensor | None,
    window: int, block: int, stretch: int, open_tile: int, scale: float, first: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _new_state(q, values)


@torch.library.custom_op("tensor_attention::routed_hop_backward", mutates_args=())
def _hop_backward(
    q: Tensor, k: Tensor, values: Tensor, choice: Tensor, doc_start: Tensor,
    z_before: Tensor, lse_before: Tensor, cos: Tensor | None, sin: Tensor | None,
    z: Tensor, lse: Tensor, dz: Tensor, dlse: Tensor | None,
    window: int, block: int, stretch: int, open_tile: int, scale: float, first: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dvalues, dz_before, dlse_before.

    The lists are rebuilt instead of stored: they are larger than the choice, and building them
    takes less than 1 % of the time.
    """
    routed = Routed(
        q, k, values, choice, doc_start, cos, sin, window, block, stretch, open_tile, scale, first
    )
    lists = tile_lists(routed)
    readers = readers_of_blocks(routed, lists)
    return routed_backward(routed, lists, readers, (z_before, lse_before), (z, lse), dz, dlse)


@_hop_backward.register_fake
def _(
    q: Tensor, k: Tensor, values: Tensor, choice: Tensor, doc_start: Tensor,
    z_before: Tensor, lse_before: Tensor, cos: Tensor | None, sin: Tensor | None,
    z: Tensor, lse: Tensor, dz: Tensor, dlse: Tensor | None,
    window: int, block: int, stretch: int, open_tile: int, scale: float, first: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(torch.empty_like(x) for x in (q, k, values, z_before, lse_before))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
    *tensors, ctx.window, ctx.block, ctx.stretch, ctx.open_tile, ctx.scale, ctx.first = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, dz: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    z = saved[9]
    dz = torch.zeros_like(z) if dz is None else dz.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dvalues, dz_before, dlse_before = _hop_backward(
        *saved, dz, dlse, ctx.window, ctx.block, ctx.stretch, ctx.open_tile, ctx.scale, ctx.first
    )
    nothing = [None] * 8
    return dq, dk, dvalues, None, None, dz_before, dlse_before, *nothing


_hop.register_autograd(_gradient, setup_context=_save)
