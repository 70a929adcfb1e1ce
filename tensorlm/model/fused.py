"""RMSNorm and SiLU(gate) * up by Triton kernels of Liger (Hsu et al. 2024), if installed."""

import importlib.util
from functools import cache

import torch.nn.functional as F
from torch import Tensor

from tensorlm.config import FusedLayers
from tensorlm.runtime.errors import UserError


@cache
def has_liger() -> bool:
    """Whether the optional package is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def check_layers(fused_layers: FusedLayers) -> None:
    """Raise UserError if the requested kernels are not installed."""
    if fused_layers == "liger" and not has_liger():
        raise UserError("train.fused_layers: liger is not installed (pip install liger-kernel)")


def runs_liger(fused_layers: FusedLayers, on_gpu: bool) -> bool:
    """Whether Liger's kernels run; "auto" runs them on GPUs if Liger is installed."""
    return fused_layers == "liger" or (fused_layers == "auto" and on_gpu and has_liger())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.RMSNorm` by Liger, with the same rounding and nothing in place."""
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False, None)


def silu_multiply(gate: Tensor, up: Tensor, fused_layers: FusedLayers) -> Tensor:
    """silu(gate) * up.

    Liger's backward overwrites gate and up: nothing else may have saved them.
    """
    if not runs_liger(fused_layers, gate.is_cuda):
        return F.silu(gate) * up
    from liger_kernel.ops import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)
