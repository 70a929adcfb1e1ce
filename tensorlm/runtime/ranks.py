"""Process groups: joining, exchanging small values, leaving."""

import json
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from .errors import UserError
from .launch_env import LaunchEnv, grow_memory_segments, launch_attempt

# Ranks of one job start within a minute or two, even if all import from one slow file system.
_MEETING_LIMIT = timedelta(minutes=5)
# Only the watchdog ends a hang: torch's timeouts keep counting while a job is suspended.
EXCHANGE_LIMIT = timedelta(days=30)


def join_ranks(launch: LaunchEnv) -> torch.device:
    """Join the job's process group (NCCL on GPUs, gloo on CPUs); returns this rank's device.

    Raises:
        UserError: there are too few GPUs, or the ranks cannot connect.
    """
    launch.export()
    if torch.cuda.is_available():
        grow_memory_segments()
        device = own_gpu(launch.local_rank, launch.local_world_size, torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, torch.get_num_threads() // launch.local_world_size))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(
            backend,
            store=_meet(launch),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=EXCHANGE_LIMIT,
            device_id=device if backend == "nccl" and launch.world_size > 1 else None,
        )
    return device


def own_gpu(local_rank: int, local_world_size: int, num_gpus: int) -> torch.device:
    """The GPU of a rank: its own among those of its node, or the only one visible to it.

    Ranks may share GPUs, for experiments, if NCCL allows it (NCCL_MULTI_RANK_GPU_ENABLE=1, from
    NCCL 2.30 on).

    Raises:
        UserError: there are fewer GPUs than ranks, and the launcher did not bind each rank to one.
    """
    is_shared = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    is_bound = num_gpus == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # as srun --gpus-per-task=1
    if num_gpus < local_world_size and not (is_shared or is_bound):
        raise UserError(
            f"ranks: must be at most one per GPU, got {local_world_size} ranks on a machine with "
            f"{num_gpus} GPUs (start fewer ranks)"
        )
    return torch.device("cuda", local_rank % num_gpus)


def _meet(launch: LaunchEnv) -> dist.Store:
    """The store through which all ranks connect; returns after all have arrived.

    Raises:
        UserError: they cannot connect within about _MEETING_LIMIT.
    """
    if launch.world_size == 1:
        return dist.HashStore()
    try:
        socket.getaddrinfo(launch.master_addr, launch.master_port)
        place = rendezvous("env://", launch.rank, launch.world_size, timeout=_MEETING_LIMIT)
        store, _, _ = next(place)
    except (OSError, dist.DistError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error).splitlines()[0]
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: {launch.master_addr}:{launch.master_port}: {reason[:150]} "
            f"(set an address of rank 0 and a free port there, and start {launch.world_size} ranks)"
        ) from None
    store.set_timeout(EXCHANGE_LIMIT)
    return dist.PrefixStore(launch_attempt(), store)


def leave_distributed() -> None:
    """Wait until every rank is done: leaving earlier could abort another rank's last exchange.

    The process group stays; the process ends next (`run_launcher`).
    """
    dist.barrier()


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Gather `value` from all ranks, in rank order, on all ranks.

    Sent as JSON, since unpickling can execute code.
    """
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = torch.tensor([content.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: content.numel()] = content.to(device)
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [
        json.loads(part[: int(n)].cpu().numpy().tobytes())
        for part, n in zip(parts, sizes, strict=True)
    ]


def sum_over_ranks(device: torch.device, *values: float) -> list[float]:
    """Sum each value over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
