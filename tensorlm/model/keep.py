"""Inputs of a differentiable function, saved before it computes."""

from typing import Any

import torch
from torch import Tensor


class KeepInputs(torch.autograd.Function):
    """Saves the inputs of another function before that computes.

    The recomputation of a block stops once its last saved tensor is known. If the function that
    uses the inputs saved them, it would compute its results first, for nothing.

    Pass the result to the other function inside a tuple: autograd does not see it there, and
    computes no gradient for it. The other function must keep it, not only its grad_fn: before torch
    2.13 that drops its saved tensors.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise AssertionError("nothing depends on the output")


def kept_inputs(kept: Tensor) -> tuple[Tensor, ...]:
    """The inputs that `KeepInputs` has saved, from its result."""
    inputs: tuple[Tensor, ...] = kept.grad_fn.saved_tensors  # type: ignore[union-attr]
    return inputs
