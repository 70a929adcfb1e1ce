"""AdamW with moments in bfloat16: 8 bytes per parameter instead of 12, with fp32 weights.

All computations are in float32; only the stored moments are rounded. At each step a moment moves
by the fraction 1 - beta of its distance. For beta = 0.999 that is less than bfloat16 can resolve:
with rounding to nearest, the moment would never change. So rounding is stochastic
(`runtime/stochastic_rounding.py`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorlm.runtime.stochastic_rounding import random_words, round_into

# Elements updated at one time on a CPU, which takes four temporary tensors of 4 bytes per element.
CHUNK = 1 << 24


class Piece(NamedTuple):
    """A range of a tensor that AdamW updates, and the parameter elements stored there.

    Elements [begin, begin + size) of the tensor are elements [first, first + size) of parameter
    `name`.
    """

    name: str
    first: int
    begin: int
    size: int


class LowMemoryAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` (Loshchilov, Hutter, 2019) with `exp_avg`, `exp_avg_sq` in bfloat16.

    The rounding of an element depends only on the seed, the step, its parameter's name and its
    index. If `name_pieces` was called, it does not depend on ranks or on how ZeRO divides
    parameters.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._seed = seed
        self._pieces: Mapping[Tensor, Sequence[Piece]] = {}

    def name_pieces(self, pieces: Mapping[Tensor, Sequence[Piece]]) -> None:
        """Set which parameters each updated tensor holds; elements outside all pieces stay."""
        self._pieces = pieces

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(new_state(parameter, torch.bfloat16, torch.device("cpu")))
                state["step"] += 1
                whole = [Piece(f"{number}.{index}", 0, 0, parameter.numel())]
                for piece in self._pieces.get(parameter, whole):
                    self._update_piece(piece, parameter, group)

    def _update_piece(self, piece: Piece, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        tensors = (parameter, grad, state["exp_avg"], state["exp_avg_sq"])
        weight, change, mean, square = (
            tensor.view(-1).narrow(0, piece.begin, piece.size) for tensor in tensors
        )
        step = int(state["step"])
        key, first = f"{self._seed} {step} {piece.name}", piece.first
        by = _factors(group, step)
        if parameter.is_cuda:
            from .adamw_kernel import update  # needs Triton

            return update(weight, change, mean, square, key, first, by)
        chunks = (tensor.split(CHUNK) for tensor in (weight, change, mean, square))
        for w, g, m, s in zip(*chunks, strict=True):
            _update(w, g, m, s, key, first, by)
            first += len(w)


class Factors(NamedTuple):
    """Numbers of one step of one parameter group."""

    mean_step: float  # share of the gradient in the new first moment
    square_kept: float  # share of the old second moment
    square_step: float  # share of the squared gradient
    square_scale: float  # divisor of the square root of the second moment
    eps: float
    weight_kept: float  # 1 - lr * weight decay
    rate: float  # learning rate, corrected for the first steps


def _factors(group: dict[str, Any], step: int) -> Factors:
    beta1, beta2 = group["betas"]
    return Factors(
        mean_step=1 - beta1,
        square_kept=beta2,
        square_step=1 - beta2,
        square_scale=(1 - beta2**step) ** 0.5,
        eps=group["eps"],
        weight_kept=1 - group["lr"] * group["weight_decay"],
        rate=group["lr"] / (1 - beta1**step),
    )


def _update(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, key: str, first: int,
    by: Factors,
) -> None:  # fmt: skip
    """Update elements of one parameter; `adamw_kernel.update` does the same on a GPU.

    Args:
        weight: [n] float32; overwritten, as are both moments.
        grad: [n].
        mean, square: [n] bf16.
        key, first: as for `random_words`.
        by: numbers of this step.
    """
    words = random_words(key, first, len(weight), weight.device)
    grad = grad.float()
    new_mean = mean.float().lerp_(grad, by.mean_step)
    new_square = square.float().mul_(by.square_kept).addcmul_(grad, grad, value=by.square_step)
    round_into(mean, new_mean, words & 0xFFFF)
    round_into(square, new_square, (words >> 16).bitwise_and_(0xFFFF))
    divisor = new_square.sqrt_().div_(by.square_scale).add_(by.eps)
    weight.mul_(by.weight_kept)
    weight.addcdiv_(new_mean, divisor, value=-by.rate)


def new_state(
    parameter: Tensor, dtype: torch.dtype, step_device: torch.device
) -> dict[str, Tensor]:
    """Adam's state of `parameter` before the first step."""
    return {
        "step": torch.zeros((), device=step_device),
        "exp_avg": torch.zeros_like(parameter, dtype=dtype, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype, requires_grad=False),
    }
