"""Who am I among the ranks: the one place that reads the launcher's environment.

`deepspeed` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Under
`srun` and `mpirun` those are derived here; plain `python` is a world of one.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class LaunchEnv:
    """Place of this process in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def export(self) -> None:
        """Set the variables that torch.distributed and DeepSpeed read."""
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def read_launch_env(environ: Mapping[str, str] | None = None) -> LaunchEnv:
    """Read rank, world size and rendezvous address from whichever launcher started this process.

    Raises:
        UserError: several ranks but no rendezvous address.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        local = env.get("LOCAL_RANK", "0"), env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])
        return _with_master(env, env["RANK"], env["WORLD_SIZE"], *local)
    # In the batch script itself SLURM_PROCID is set too, but there is no step.
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and "SLURM_STEP_NUM_TASKS" in env:
        size = env["SLURM_STEP_NUM_TASKS"]
        local_size = env.get("SLURM_STEP_TASKS_PER_NODE", size).split(",")[0].split("(")[0]
        return _with_master(env, env["SLURM_PROCID"], size, env["SLURM_LOCALID"], local_size)
    if "OMPI_COMM_WORLD_RANK" in env:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            env = {**env, **_agree_over_mpi()}
        names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        return _with_master(env, *(env[f"OMPI_COMM_WORLD_{name}"] for name in names))
    return LaunchEnv(0, 1, 0, 1, "127.0.0.1", free_port())


def free_port() -> int:
    """A TCP port that was free a moment ago on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _with_master(
    env: Mapping[str, str], rank: str, world_size: str, local_rank: str, local_world_size: str
) -> LaunchEnv:
    numbers = (int(rank), int(world_size), int(local_rank), int(local_world_size))
    if int(world_size) == 1 and "MASTER_PORT" not in env:
        return LaunchEnv(*numbers, "127.0.0.1", free_port())
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise UserError(
            f"MASTER_ADDR and MASTER_PORT: not set for {world_size} ranks (export both)"
        )
    return LaunchEnv(*numbers, env["MASTER_ADDR"], int(env["MASTER_PORT"]))


def _agree_over_mpi() -> dict[str, str]:
    """Rank 0 proposes its address and a free port to all ranks of `mpirun`."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            "MASTER_ADDR and MASTER_PORT: not set under mpirun (export both, or install mpi4py)"
        ) from None
    one_node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).size == MPI.COMM_WORLD.size
    address = "127.0.0.1" if one_node else socket.gethostbyname(socket.gethostname())
    address, port = MPI.COMM_WORLD.bcast((address, free_port()))
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
