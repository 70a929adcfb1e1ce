"""AdamW, its parameter groups, and the learning rate as a function of the step."""

import math
from typing import Any

import torch
from torch import nn

from tensorlm.config import Config, OptimConfig

from .adamw import LowMemoryAdamW


def create_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Create AdamW for `model`, before DeepSpeed partitions it."""
    groups, optim = parameter_groups(model, config.optim), config.optim
    if optim.state_dtype == "bf16":
        return LowMemoryAdamW(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, seed=config.run.seed
        )
    on_gpu = torch.cuda.is_available() and not config.zero.offload_optimizer
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=on_gpu)


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups: matrices have weight decay; norms and hop biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if not _is_undecayed(model, p)]
    undecayed = [p for p in parameters if _is_undecayed(model, p)]
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]


def _is_undecayed(model: nn.Module, parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 keeps the full shape here
    return len(shape) < 2 or any(
        p is parameter for name, p in model.named_parameters() if name.endswith("hop_bias")
    )


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (from 0) in a run of `num_steps`.

    All schedules reach `lr` at the last step of the linear warm-up, or at the first step without a
    warm-up. `cosine` then falls to `min_lr` at the last step. `wsd` (warm-up-stable-decay, Hu et
    al. 2024, MiniCPM) stays constant, then falls linearly over the last `decay_steps`, to `min_lr`
    at the last step. `constant` stays constant.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    last = num_steps - 1
    share = 1.0  # position between min_lr (0) and lr (1)
    if config.schedule == "cosine":
        peak = max(0, config.warmup_steps - 1)
        share = (1 + math.cos(math.pi * (step - peak) / max(1, last - peak))) / 2
    elif config.schedule == "wsd":
        share = min(1.0, (last - step) / max(1, config.decay_steps))
    return config.min_lr * (1 - share) + config.lr * share
