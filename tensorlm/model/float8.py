"""Linear layers in training whose matrix products run in float8, on the bf16 weights.

Each operand is scaled so that its largest magnitude becomes the largest float8 number, and is
rounded; the product is accumulated in float32 and rounded to bf16. Weights, their gradients, and
what is kept for backward stay as they are with bf16 products, so checkpoints do too.

* "float8_tensorwise": one scale for each tensor; gradients of outputs in e5m2, all else in e4m3.
* "float8_rowwise": one scale for each row of the left operand and each column of the right one, a
  power of two; everything in e4m3.

The formats, scales and roundings are those of torchao's recipes of the same names. Its modules are
not used, since they cast each input once per weight, cannot be cut into tiles, and repeat the last
product of a recomputed block.

Shape letters: T tokens, K input size, N output size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorlm.config import LinearFormat
from tensorlm.runtime.errors import UserError

from .float8_cast import Scaled, cast, cast_both, cast_transposed, scale_of_all
from .keep import KeepInputs, kept_inputs

_FIRST_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)


def check_linear(linear: LinearFormat, device: torch.device) -> None:
    """Raise UserError if `device` cannot multiply in the requested format."""
    if linear == "bf16":
        return
    name = "the CPU"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY:
            return
        name = torch.cuda.get_device_name(device)
    raise UserError(
        f"train.linear: {linear} needs a GPU with float8 (compute capability 8.9 or later), got "
        f"{name} (set train.linear = bf16)"
    )


def format_now(linear: LinearFormat) -> LinearFormat:
    """`linear` where gradients are needed; else bf16, so that evaluation is an exported model's."""
    return linear if torch.is_grad_enabled() else "bf16"


def apply_linears(
    x: Tensor, layers: Sequence[nn.Linear], linear: LinearFormat
) -> tuple[Tensor, ...]:
    """Apply several linear layers without bias to the same input.

    Args:
        x: [..., K].
        layers: weights [N, K].
        linear: number format of the products in training; see `format_now`.

    Returns:
        [..., N] for each layer.
    """
    if format_now(linear) == "bf16":
        return tuple(layer(x) for layer in layers)
    weights = [layer.weight for layer in layers]
    scales = []
    if linear == "float8_tensorwise":
        with torch.no_grad():
            scales = [scales_of_all(x.flatten(0, -2), weights)]
    kept = KeepInputs.apply(x, *weights, *scales)
    outs = _Float8Linears.apply(linear, (kept,), (*scales,), x, *weights)
    return tuple(outs)


class _Float8Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, linear: LinearFormat, kept: tuple[Tensor], scales: tuple[Tensor, ...],
        x: Tensor, *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.linear, ctx.kept = linear, kept[0]
        outs = products(x.flatten(0, -2), weights, linear, *scales)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = kept_inputs(ctx.kept)
        ctx.kept = None  # frees x with this call, not with the whole graph
        weights, scales = kept[: len(douts)], kept[len(douts) :]
        flat = [dout.flatten(0, -2) for dout in douts]
        dx, dweights = gradients(x.flatten(0, -2), weights, flat, ctx.linear, *scales)
        return None, None, None, dx.view_as(x), *dweights


def scales_of_all(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`scale_of_all` of x and of each weight, [1 + number of weights]: a pass over each.

    Backward needs them again, and so does recomputation.
    """
    scales: Tensor = torch.ops.tensorlm.float8_scales(x, list(weights))
    return scales


@torch.library.custom_op("tensorlm::float8_scales", mutates_args=())
def _scales(x: Tensor, weights: list[Tensor]) -> Tensor:
    """One operator, so that recomputation can keep its result."""
    return torch.stack([scale_of_all(tensor) for tensor in (x, *weights)])


@_scales.register_fake
def _(x: Tensor, weights: list[Tensor]) -> Tensor:
    return x.new_empty(1 + len(weights), dtype=torch.float32)


def products(
    x: Tensor, weights: Sequence[Tensor], linear: LinearFormat, scales: Tensor | None = None
) -> list[Tensor]:
    """x W^T for each weight, not differentiable.

    Args:
        x: [T, K] bf16.
        weights: [N, K] bf16.
        linear: number format.
        scales: `scales_of_all`, if known; not for "float8_rowwise".

    Returns:
        [T, N] bf16 for each weight.
    """
    outs: list[Tensor] = torch.ops.tensorlm.float8_products(
        x, list(weights), linear == "float8_rowwise", scales
    )
    return outs


@torch.library.custom_op("tensorlm::float8_products", mutates_args=())
def _products(
    x: Tensor, weights: list[Tensor], by_row: bool, scales: Tensor | None
) -> list[Tensor]:
    """One operator, so that selective recomputation can keep its results."""
    of_x, *of_weights = _each(scales, len(weights))
    x8 = cast(x, by_row, of_x)
    return [
        _multiply(x8, cast(weight, by_row, scale), is_fast=True)
        for weight, scale in zip(weights, of_weights, strict=True)
    ]


def products_of_cast(x: Tensor, weights: Sequence[Scaled], linear: LinearFormat) -> list[Tensor]:
    """`products`, bit by bit, with weights that `cast_weights` has cast."""
    x8 = cast(x, linear == "float8_rowwise")
    return [_multiply(x8, weight, is_fast=True) for weight in weights]


def cast_weights(weights: Sequence[Tensor], linear: LinearFormat) -> list[Scaled]:
    """Weights [N, K] for `products_of_cast`: N K bytes each."""
    return [cast(weight, linear == "float8_rowwise") for weight in weights]


def cast_weights_transposed(weights: Sequence[Tensor], linear: LinearFormat) -> list[Scaled]:
    """Weights [N, K] for `gradients`: N K bytes each."""
    return [cast_transposed(weight, linear == "float8_rowwise") for weight in weights]


@_products.register_fake
def _(x: Tensor, weights: list[Tensor], by_row: bool, scales: Tensor | None) -> list[Tensor]:
    return [x.new_empty(len(x), len(weight)) for weight in weights]


def _each(scales: Tensor | None, num_weights: int) -> Sequence[Tensor | None]:
    """The scale of x and of each weight, where known."""
    return [None] * (1 + num_weights) if scales is None else scales.unbind()


def gradients(
    x: Tensor, weights: Sequence[Tensor | Scaled], douts: Sequence[Tensor], linear: LinearFormat,
    scales: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of `products`.

    Args:
        x, linear, scales: as in `products`.
        weights: as in `products`, or cast by `cast_weights_transposed`.
        douts: [T, N] for each weight.

    Returns:
        The gradient of x [T, K], and of each weight [N, K], in bf16.
    """
    by_row = linear == "float8_rowwise"
    of_x, *of_weights = _each(scales, len(weights))
    columns = cast_transposed(x, by_row, of_x)
    dx: Tensor | None = None
    dweights = []
    for weight, scale, dout in zip(weights, of_weights, douts, strict=True):
        rows, transposed = cast_both(dout, by_row)
        part = _multiply(
            rows,
            weight if isinstance(weight, Scaled) else cast_transposed(weight, by_row, scale),
        )
        dx = part if dx is None else dx.add_(part)
        dweights.append(_multiply(transposed, columns))
        del rows, transposed, part
    assert dx is not None
    return dx, dweights


def _multiply(left: Scaled, right: Scaled, is_fast: bool = False) -> Tensor:
    """left x right^T in bf16: [m, k] and [n, k] give [m, n].

    `is_fast` accumulates in the tensor cores' own registers, as is usual in the forward pass.
    """
    scale = right.scale.t() if right.scale.dim() else right.scale
    return torch._scaled_mm(
        left.data, right.data.t(), scale_a=left.scale, scale_b=scale, out_dtype=torch.bfloat16,
        use_fast_accum=is_fast,
    )  # fmt: skip
