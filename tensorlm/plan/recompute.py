"""The choice of `train.recompute = "auto"`: the least recomputation that fits."""

from tensorlm.config import Config, Recompute

from .job import plan_jobs
from .memory import gpu_memory

ORDER: tuple[Recompute, ...] = ("none", "selective", "attention", "block")  # fastest first


def resolve_recompute(config: Config, gpus: int, memory: float) -> Config:
    """Replace "auto" by the first of `ORDER` that fits in all phases, or the last one if none does.

    Args:
        config: the configuration; returned as it is unless `train.recompute` is "auto".
        gpus: number of ranks.
        memory: bytes of one GPU.

    Raises:
        UserError: `gpus` ranks cannot share the work of `config`.
    """
    if config.train.recompute != "auto":
        return config
    for recompute in ORDER:
        if recompute == "none" and config.train.activation_offload:
            continue  # offloads the inputs of recomputed layers
        train = config.train.model_copy(update={"recompute": recompute})
        resolved = config.model_copy(update={"train": train})
        if all(gpu_memory(job).needed <= memory for job in plan_jobs(resolved, gpus)):
            break
    return resolved
