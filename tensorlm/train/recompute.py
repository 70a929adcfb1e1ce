"""The choice of `train.recompute = "auto"` on the GPUs of a run."""

import torch
import torch.distributed as dist

from tensorlm.config import Config
from tensorlm.plan.recompute import resolve_recompute
from tensorlm.runtime.launch_env import LaunchEnv


def choose_recompute(config: Config, launch: LaunchEnv, device: torch.device) -> Config:
    """Resolve `train.recompute` = "auto" for the smallest GPU of all ranks; on CPUs to "none"."""
    if config.train.recompute != "auto":
        return config
    memory = torch.full((), torch.inf, dtype=torch.float64, device=device)
    if device.type == "cuda":
        memory.fill_(torch.cuda.get_device_properties(device).total_memory)
    # Shared rows exchange their halos in recomputation too: all ranks must recompute the same.
    dist.all_reduce(memory, dist.ReduceOp.MIN)
    config = resolve_recompute(config, launch.world_size, memory.item())
    if launch.rank == 0:
        print(f"train.recompute: auto has chosen {config.train.recompute}", flush=True)
    return config
