"""The launcher's environment: this process's rank, and how to reach the others.

`deepspeed` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Under
`mpirun` and `srun` they are derived here; plain `python` is one rank. No other module reads these
variables.
"""

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from .errors import UserError


@dataclass(frozen=True)
class LaunchEnv:
    """Place of this process in the job; fields are named like the variables."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def export(self) -> None:
        """Set the variables that torch.distributed and DeepSpeed read."""
        os.environ.update({name.upper(): str(value) for name, value in asdict(self).items()})
        if self.local_world_size == self.world_size and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: stay unreachable


def read_launch_env(env: Mapping[str, str] = os.environ) -> LaunchEnv:
    """Read rank, world size and rendezvous address from whichever launcher started this process.

    Raises:
        UserError: values that contradict each other, or several ranks without a rendezvous address.
    """
    place = _place(env)
    if place is None:
        return LaunchEnv(0, 1, 0, 1, "127.0.0.1", free_port())
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        port = env["MASTER_PORT"]
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise UserError(f"MASTER_PORT: must be a port from 1 to 65535, got {port}")
        return LaunchEnv(*place, env["MASTER_ADDR"], int(port))
    if place[1] == 1:
        return LaunchEnv(*place, "127.0.0.1", free_port())
    if "OMPI_COMM_WORLD_RANK" in env or "MPI_LOCALRANKID" in env:
        return LaunchEnv(*place, *_agree_over_mpi())
    raise UserError(f"MASTER_ADDR, MASTER_PORT: must be set for {place[1]} ranks (export both)")


def grow_memory_segments() -> None:
    """Enable expandable segments in torch's GPU allocator, unless the user has configured it.

    By default the allocator requests each large block separately and cannot use the gaps between
    smaller ones. It reads the variable when a GPU is first used.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def launched_rank(env: Mapping[str, str] = os.environ) -> int:
    """This process's rank; 0 if no launcher started it."""
    place = _place(env)
    return place[0] if place else 0


def launched_world_size(env: Mapping[str, str] = os.environ) -> int:
    """Number of ranks that the launcher started; 1 without a launcher."""
    place = _place(env)
    return place[1] if place else 1


def launch_attempt(env: Mapping[str, str] = os.environ) -> str:
    """Name of this start of the ranks; torchrun, alone among launchers, starts them again.

    It keeps the rendezvous store, with everything that ranks of earlier starts have written there.
    """
    return f"attempt {env.get('TORCHELASTIC_RESTART_COUNT', '0')} of {env.get('WORLD_SIZE', '1')}"


def restarts_failed_ranks(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher restarts all ranks when one exits with a code other than 0."""
    return env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def slurm_job(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """This process's Slurm job and how often it was requeued; ("", 0) outside Slurm."""
    restarts = env.get("SLURM_RESTART_COUNT", "")
    return env.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdigit() else 0


def _place(env: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """(rank, world size, local rank, local world size), or None for plain `python`."""
    if "RANK" in env and "WORLD_SIZE" in env:
        # deepspeed sets LOCAL_SIZE. A launcher that sets neither starts one rank on each node.
        local_size = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))
        values = [env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", "0"), local_size]
    # MPI comes before Slurm: inside a job, mpirun's own agents are the tasks of a Slurm step.
    elif "OMPI_COMM_WORLD_RANK" in env:  # Open MPI
        names = ["RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"]
        values = [env[f"OMPI_COMM_WORLD_{name}"] for name in names]
    elif "MPI_LOCALRANKID" in env:  # MPICH, Intel MPI
        names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
        values = [env[name] for name in names]
    # Slurm sets SLURM_PROCID in the batch script as well, which belongs to no step.
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and "SLURM_STEP_NUM_TASKS" in env:
        size = env["SLURM_STEP_NUM_TASKS"]
        # a list such as 8(x3),4: use that of the first node
        local_size = env.get("SLURM_STEP_TASKS_PER_NODE", size).split(",")[0].split("(")[0]
        values = [env["SLURM_PROCID"], size, env["SLURM_LOCALID"], local_size]
    else:
        return None
    try:
        rank, world_size, local_rank, local_world_size = map(int, values)
    except ValueError:
        raise UserError(
            f"the launcher's environment: rank, world size, local rank and local world size must "
            f"be integers, got {', '.join(values)}"
        ) from None
    if not 0 <= rank < world_size or local_rank < 0 or not 1 <= local_world_size <= world_size:
        raise UserError(
            f"the launcher's environment: ranks must be from 0 to the number of ranks - 1, got "
            f"rank {rank} of {world_size}, local rank {local_rank} of {local_world_size}"
        )
    return rank, world_size, local_rank, local_world_size


def free_port() -> int:
    """A TCP port that was free a moment ago on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _agree_over_mpi() -> tuple[str, int]:
    """Send rank 0's address and a free port to all ranks of `mpirun`."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            "MASTER_ADDR, MASTER_PORT: must be set under mpirun (export both, or install mpi4py)"
        ) from None
    world = MPI.COMM_WORLD
    address = "127.0.0.1"
    last_host = world.bcast(socket.gethostname(), root=world.size - 1)
    if world.Split_type(MPI.COMM_TYPE_SHARED).size < world.size:
        # A host's own name often resolves to loopback; a route to another host does not.
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect((last_host, 9))  # sends nothing
            address = probe.getsockname()[0]
    address, port = world.bcast((address, free_port()))
    return address, port
