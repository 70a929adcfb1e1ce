"""RMSNorm, SwiGLU, rotary table: the small parts of the Llama decoder.

Shape letters: B batch, T tokens, C hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensor_attention import Rotary

from .config import ModelConfig, RopeScaling


class RMSNorm(nn.Module):
    """Scale each token to unit root mean square, in float32, then by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_table(config: ModelConfig, num_positions: int, device: torch.device) -> Rotary:
    """cos and sin of position x frequency, each [num_positions, head size / 2], float32.

    Made anew in each forward pass (it is small next to one layer), so that no cast of the model to
    bf16 can round it: at position 131,072 that would be tens of radians.
    """
    exponents = torch.arange(0, config.head_size, 2, device=device).float() / config.head_size
    frequencies = 1.0 / config.rope_theta**exponents  # in this order, bit-equal to Hugging Face's
    if config.rope_scaling is not None:
        frequencies = _scale_frequencies(frequencies, config.rope_scaling)
    angles = torch.arange(num_positions, device=device).float()[:, None] * frequencies
    return Rotary(angles.cos(), angles.sin())


def _scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow the low frequencies by `factor` (llama3: only those with long wavelengths, smoothly)."""
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged, 0: slowed fully
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor
