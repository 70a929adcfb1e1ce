"""RMSNorm, SwiGLU and the rotary table of the Llama decoder.

Shape letters: B batch, T tokens, C hidden size.
"""

import torch
from torch import Tensor, nn

from tensor_attention import Rotary, rotary_frequencies
from tensor_attention import rotary_table as table_of
from tensorlm.config import LinearFormat, ModelConfig

from . import fused
from .float8 import apply_linears, format_now
from .tiled_mlp import tiled_swiglu


class RMSNorm(nn.Module):
    """Scale each token to unit root mean square in float32, then multiply by a learned weight."""

    def __init__(self, size: int, eps: float, fused_layers: fused.FusedLayers = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.fused_layers = fused_layers

    def forward(self, x: Tensor) -> Tensor:
        if fused.runs_liger(self.fused_layers, x.is_cuda):
            return fused.rms_norm(x, self.weight, self.eps)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), `chunk` tokens at a time (0: all at once)."""

    def __init__(
        self,
        config: ModelConfig,
        chunk: int = 0,
        fused_layers: fused.FusedLayers = "auto",
        linear: LinearFormat = "bf16",
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.linear = linear
        self.fused_layers = fused_layers
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_tiled(x):
            gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
            linear = format_now(self.linear)
            return tiled_swiglu(x, gate, up, down, self.chunk, self._multiply, linear)
        gated, upped = apply_linears(x, (self.gate_proj, self.up_proj), self.linear)
        hidden = self._multiply(gated, upped)
        del gated, upped
        return apply_linears(hidden, (self.down_proj,), self.linear)[0]

    def is_tiled(self, x: Tensor) -> bool:
        """Whether x [..., C] is processed in tiles of tokens."""
        return 0 < self.chunk < x.shape[:-1].numel()

    def _multiply(self, gate: Tensor, up: Tensor) -> Tensor:
        return fused.silu_multiply(gate, up, self.fused_layers)


def rotary_table(config: ModelConfig, num_positions: int, device: torch.device) -> Rotary:
    """cos and sin of position x frequency, each [num_positions, head size / 2], float32.

    Computed in each forward pass, which is cheap compared with a layer, so that no cast of the
    model to bf16 can round it: at position 131,072 the error would be tens of radians.
    """
    scaling = None if config.rope_scaling is None else config.rope_scaling.model_dump()
    frequencies = rotary_frequencies(config.head_size, config.rope_theta, scaling, device)
    return table_of(frequencies, num_positions, device)
