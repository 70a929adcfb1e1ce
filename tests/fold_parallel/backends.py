"""Where the distributed tests run: gloo on CPU always, the same bodies on NCCL where GPUs are."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

NUM_GPUS = torch.cuda.device_count()


def ranks_and_backends(*world_sizes: int) -> pytest.MarkDecorator:
    """Parametrize over (world_size, backend)."""
    params = [pytest.param(n, "gloo", id=f"{n} gloo") for n in world_sizes]
    for n in world_sizes:
        missing = pytest.mark.skipif(n > NUM_GPUS, reason=f"needs {n} GPUs")
        marks = [pytest.mark.multi_gpu, missing]
        params.append(pytest.param(n, "nccl", id=f"{n} nccl", marks=marks))
    return pytest.mark.parametrize(("world_size", "backend"), params)


def result(x: Tensor) -> Tensor:
    """`x` for the parent process: on CPU, with storage of its own."""
    return x.detach().cpu().clone()


def device() -> torch.device:
    """This rank's device under the default process group."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
