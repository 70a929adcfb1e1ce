"""SwiGLU in tiles of tokens: its intermediates never exist for a whole row.

Backward recomputes them. Autograd sees a single function, so each weight gets one gradient, summed
over the tiles in float32 (float64 for float64 weights).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Multiply = Callable[[Tensor, Tensor], Tensor]


def tiled_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk: int, multiply: Multiply
) -> Tensor:
    """down(multiply(gate(x), up(x))), `chunk` tokens at a time in forward and backward.

    Args:
        x: [..., C].
        gate, up: [I, C] weights.
        down: [C, I] weight.
        chunk: tokens per tile.
        multiply: silu(first) * second, differentiable.

    Returns:
        [..., C] in the dtype of x.
    """
    kept = _KeepInputs.apply(x, gate, up, down)
    # Inside a tuple autograd does not see it, and computes no gradient for it.
    return _TiledSwiGLU.apply(x, gate, up, down, chunk, multiply, (kept,))


class _KeepInputs(torch.autograd.Function):
    """Saves the inputs before the tiles are computed.

    The recomputation of a block stops once its last saved tensor is known. If the function that
    uses the inputs saved them, it would compute all tiles first, for nothing.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise AssertionError("nothing depends on the output")


class _TiledSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk: int,
        multiply: Multiply, kept: tuple[Tensor],
    ) -> Tensor:  # fmt: skip
        # Keep the tensor, not only its grad_fn: before torch 2.13 that drops its saved tensors.
        ctx.kept, ctx.chunk, ctx.multiply = kept[0], chunk, multiply
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        tiles = (tensor.flatten(0, -2).split(chunk) for tensor in (x, out))
        for part, target in zip(*tiles, strict=True):
            hidden = multiply(F.linear(part, gate), F.linear(part, up))
            torch.mm(hidden, down.t(), out=target)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.kept.grad_fn.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = [torch.zeros_like(weight, dtype=wide) for weight in weights]
        tiles = (tensor.flatten(0, -2).split(ctx.chunk) for tensor in (x, dx, dout))
        for part, dpart, dtile in zip(*tiles, strict=True):
            _add_gradients(part, dpart, dtile, weights, sums, ctx.multiply)
        gradients = (total.to(x.dtype) for total in sums)
        return dx, *gradients, None, None, None


def _add_gradients(
    x: Tensor, dx: Tensor, dout: Tensor, weights: list[Tensor], sums: list[Tensor],
    multiply: Multiply,
) -> None:  # fmt: skip
    """Compute one tile [tokens, C]: write dx, and add to the sums of gate, up and down."""
    gate, up, down = weights
    # These are leaves of a separate graph: no parameter's gradient is touched here.
    gated, upped = (F.linear(x, weight).requires_grad_() for weight in (gate, up))
    with torch.enable_grad():
        hidden = multiply(gated, upped)
    sums[2] += dout.t() @ hidden
    dgated, dupped = torch.autograd.grad(hidden, (gated, upped), dout @ down)
    sums[0] += dgated.t() @ x
    sums[1] += dupped.t() @ x
    torch.addmm(dgated @ gate, dupped, up, out=dx)
