"""Where the distributed tests run: gloo on CPU always, the same bodies on NCCL where GPUs are."""

import itertools
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# NCCL lets ranks share a GPU if it is told to, from 2.30 on.
SHARED = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and torch.cuda.is_available()
MAX_RANKS = 8 if SHARED else torch.cuda.device_count()


def ranks_and_backends(*world_sizes: int) -> pytest.MarkDecorator:
    """Parametrize over (world_size, backend)."""
    params = [pytest.param(n, "gloo", id=f"{n} gloo") for n in world_sizes]
    for n in world_sizes:
        missing = pytest.mark.skipif(n > MAX_RANKS, reason=f"needs {n} GPUs")
        marks = [pytest.mark.multi_gpu, missing]
        params.append(pytest.param(n, "nccl", id=f"{n} nccl", marks=marks))
    return pytest.mark.parametrize(("world_size", "backend"), params)


def require_equal_bits(parts: int, dtype: torch.dtype) -> None:
    """Skip where linear layers, or batches of products, give a token other bits among fewer tokens.

    That is up to the CPU and its libraries, which may choose a kernel by the number of tokens.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    pairs: list[tuple[Tensor, Tensor]] = []
    for tokens, width, out in itertools.product((128, 512), (32, 48, 64), (4, 8, 32, 64, 512)):
        x, weight = random(tokens, width), random(out, width)
        for shards in (x.chunk(parts), x.split(24)):
            split = torch.cat([F.linear(shard, weight) for shard in shards])
            pairs.append((F.linear(x, weight), split))
    q, k = random(64, 8, 4), random(64, 4, 16)
    shards = zip(q.chunk(parts), k.chunk(parts), strict=True)
    pairs.append((q @ k, torch.cat([a @ b for a, b in shards])))
    if not all(torch.equal(whole, split) for whole, split in pairs):
        pytest.skip(f"this CPU computes 1/{parts} of the tokens with other bits, in {dtype}")


def result(x: Tensor) -> Tensor:
    """`x` for the parent process: on CPU, with storage of its own."""
    return x.detach().cpu().clone()


def device() -> torch.device:
    """This rank's device under the default process group."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
