"""SwiGLU in tiles of tokens: its intermediates never exist for a whole row.

Backward recomputes them. Autograd sees a single function, so each weight gets one gradient, summed
over the tiles in float32 (float64 for float64 weights). With products in float8, forward and
backward each cast the weights once, for all tiles.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorlm.config import LinearFormat

from . import float8
from .float8_cast import Scaled
from .keep import KeepInputs, kept_inputs
from .sums import add_product

Multiply = Callable[[Tensor, Tensor], Tensor]


def tiled_swiglu(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk: int, multiply: Multiply,
    linear: LinearFormat = "bf16",
) -> Tensor:  # fmt: skip
    """down(multiply(gate(x), up(x))), `chunk` tokens at a time in forward and backward.

    Args:
        x: [..., C].
        gate, up: [I, C] weights.
        down: [C, I] weight.
        chunk: tokens per tile.
        multiply: silu(first) * second, differentiable.
        linear: number format of the products.

    Returns:
        [..., C] in the dtype of x.
    """
    kept = KeepInputs.apply(x, gate, up, down)
    return _TiledSwiGLU.apply(x, gate, up, down, chunk, multiply, linear, (kept,))


class _TiledSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, chunk: int,
        multiply: Multiply, linear: LinearFormat, kept: tuple[Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.kept, ctx.chunk, ctx.multiply, ctx.linear = kept[0], chunk, multiply, linear
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        tiles = (tensor.flatten(0, -2).split(chunk) for tensor in (x, out))
        cast = None if linear == "bf16" else float8.cast_weights((gate, up, down), linear)
        for part, target in zip(*tiles, strict=True):
            if cast is not None:
                hidden = multiply(*float8.products_of_cast(part, cast[:2], linear))
                target.copy_(float8.products_of_cast(hidden, cast[2:], linear)[0])
                continue
            hidden = multiply(F.linear(part, gate), F.linear(part, up))
            torch.mm(hidden, down.t(), out=target)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = kept_inputs(ctx.kept)
        ctx.kept = None  # frees x with this call, not with the whole graph
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        wide = torch.promote_types(x.dtype, torch.float32)
        sums = [torch.zeros_like(weight, dtype=wide) for weight in weights]
        tiles = (tensor.flatten(0, -2).split(ctx.chunk) for tensor in (x, dx, dout))
        cast = None if ctx.linear == "bf16" else _CastWeights.of(weights, ctx.linear)
        for part, dpart, dtile in zip(*tiles, strict=True):
            if cast is None:
                _add_gradients(part, dpart, dtile, weights, sums, ctx.multiply)
            else:
                _add_in_float8(part, dpart, dtile, cast, sums, ctx.multiply, ctx.linear)
        del cast  # before the gradients are cast
        gradients = (total.to(x.dtype) for total in sums)
        return dx, *gradients, None, None, None, None


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
    add_product(sums[2], dout.t(), hidden)
    dgated, dupped = torch.autograd.grad(hidden, (gated, upped), dout @ down)
    add_product(sums[0], dgated.t(), x)
    add_product(sums[1], dupped.t(), x)
    torch.addmm(dgated @ gate, dupped, up, out=dx)


class _CastWeights(NamedTuple):
    """The weights that one backward pass multiplies by, in float8: 5 C I bytes."""

    rows: list[Scaled]  # gate and up, for their products
    transposed: list[Scaled]  # gate, up and down, for the gradients of their inputs

    @classmethod
    def of(cls, weights: Sequence[Tensor], linear: LinearFormat) -> Self:
        """Cast gate, up and down."""
        return cls(
            float8.cast_weights(weights[:2], linear),
            float8.cast_weights_transposed(weights, linear),
        )


def _add_in_float8(
    x: Tensor, dx: Tensor, dout: Tensor, cast: _CastWeights, sums: list[Tensor],
    multiply: Multiply, linear: LinearFormat,
) -> None:  # fmt: skip
    """`_add_gradients` with products in float8."""
    products = float8.products_of_cast(x, cast.rows, linear)
    gated, upped = (part.requires_grad_() for part in products)
    with torch.enable_grad():
        hidden = multiply(gated, upped)
    dhidden, (ddown,) = float8.gradients(hidden.detach(), cast.transposed[2:], (dout,), linear)
    sums[2] += ddown
    dhiddens = torch.autograd.grad(hidden, (gated, upped), dhidden)
    del products, gated, upped, hidden, dhidden, ddown
    dpart, (dgate, dup) = float8.gradients(x, cast.transposed[:2], dhiddens, linear)
    sums[0] += dgate
    sums[1] += dup
    dx.copy_(dpart)
