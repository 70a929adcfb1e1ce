"""Random initial weights, drawn on the CPU by several threads."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tensorlm.config import ModelConfig

# Elements drawn at a time from the model's own generator. It must be a multiple of 16, or the
# weights would change.
_SMALL = 1 << 22
_PIECE = 1 << 20  # elements of a larger tensor with a generator of their own; likewise
_THREADS = 16
_SEEDS = 1 << 32  # PyTorch's generator for CPUs ignores higher bits of a seed


class WeightInit:
    """Random weights, drawn parameter by parameter in the model's order.

    One generator draws all tensors of up to 4 Mi elements. For a larger tensor it draws a seed, and
    each piece of the tensor has a generator of its own, since one generator draws only 0.1 billion
    numbers per second. The weights do not depend on the number of threads, nor on the device.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def fill(self, name: str, parameter: Tensor) -> None:
        """Set the weights of `parameter`; call it for all parameters in the model's order."""
        config = self._config
        if name.endswith("hop_bias"):
            parameter.fill_(config.hop_bias_init)
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            self._draw(
                parameter.detach().view(-1),  # threads do not inherit no_grad
                config.init_std / ((2 * config.num_layers) ** 0.5 if is_output else 1),
            )

    def _draw(self, weights: Tensor, std: float) -> None:
        """Draw `weights` [n] with this standard deviation."""
        if len(weights) <= _SMALL:
            drawn = torch.empty(len(weights)).normal_(generator=self._generator)
            weights.copy_(drawn.mul_(std))
            return
        first = int(torch.randint(_SEEDS, (), generator=self._generator))

        def draw(place: tuple[int, Tensor]) -> None:
            number, piece = place
            generator = torch.Generator().manual_seed((first + number) % _SEEDS)
            drawn = torch.empty(len(piece), pin_memory=piece.is_cuda)
            # Other operations of the CPU would start threads of their own in each thread.
            # On a GPU, pinned memory is not reused before it is copied.
            piece.copy_(drawn.normal_(std=std, generator=generator), non_blocking=True)

        threads = min(_THREADS, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, enumerate(weights.split(_PIECE))))
