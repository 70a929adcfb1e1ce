"""AdamW whose moments are stored in bfloat16: 8 bytes a parameter instead of 12 with fp32 weights.

A moment moves by the share 1 - beta of its distance at every step. bfloat16 has 8 bits: it follows
while that share is well above 2^-9, as for the betas of language models (0.9, 0.95), and would
stand still for 0.999. Everything is computed in float32; only what is kept is rounded.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Elements updated at one time: ZeRO hands over one tensor per group, and temporaries are float32.
_CHUNK = 1 << 25


class LowMemoryAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` (Loshchilov, Hutter, 2019) with `exp_avg`, `exp_avg_sq` in bfloat16."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(new_state(parameter, torch.bfloat16, torch.device("cpu")))
                state["step"] += 1
                parts = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                flat = (part.view(-1).split(_CHUNK) for part in parts)
                step = float(state["step"])
                for weight, grad, mean, square in zip(*flat, strict=True):
                    _update(weight, grad, mean, square, group, step)


def _update(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any], step: float
) -> None:
    beta1, beta2 = group["betas"]
    grad = grad.float()
    new_mean = mean.float().lerp_(grad, 1 - beta1)
    new_square = square.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    mean.copy_(new_mean)
    square.copy_(new_square)
    divisor = new_square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.addcdiv_(new_mean, divisor, value=-group["lr"] / (1 - beta1**step))


def new_state(
    parameter: Tensor, dtype: torch.dtype, step_device: torch.device
) -> dict[str, Tensor]:
    """Adam's state before its first step."""
    return {
        "step": torch.zeros((), device=step_device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype, requires_grad=False),
    }
