"""Every launcher's ranks know their place. More of the real launchers run in tests/slurm."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tensorlm.runtime.errors import UserError
from tensorlm.runtime.launch_env import (
    LaunchEnv,
    launch_attempt,
    launched_rank,
    read_launch_env,
    restarts_failed_ranks,
)
from tensorlm.runtime.ranks import own_gpu
from tests.support.launching import RunTraining, TrainRanks, losses

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "10042"}
# What each launcher sets for rank 5 of 8, the second of four on its node.
STEP = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
ENVIRONMENTS = {
    "deepspeed": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"},
    "torchrun": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    "srun": {**STEP, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
    "srun, uneven": {**STEP, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4,3,1"},
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    },
    "MPICH": {
        "PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4",
    },
}  # fmt: skip
# Where mpirun is called in a job, its agents are one task a node of a step of two tasks.
AGENT = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}
AGENT |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


@pytest.mark.parametrize("launcher", ENVIRONMENTS)
@pytest.mark.parametrize("outside", [{}, AGENT], ids=["alone", "inside a job"])
def test_rank_and_world_are_what_the_launcher_says(launcher: str, outside: dict[str, str]) -> None:
    environ = {**outside, **ENVIRONMENTS[launcher], **MASTER}
    assert read_launch_env(environ) == LaunchEnv(5, 8, 1, 4, "node1", 10042)
    assert launched_rank(environ) == 5


def test_ranks_that_torchrun_starts_again_meet_anew() -> None:
    first = {**ENVIRONMENTS["torchrun"], "TORCHELASTIC_RESTART_COUNT": "0"}
    second = {**first, "TORCHELASTIC_RESTART_COUNT": "1"}
    fewer = {**second, "WORLD_SIZE": "6"}  # a node has left: that is not counted
    assert len({launch_attempt(env) for env in (first, second, fewer)}) == 3
    assert launch_attempt({}) == launch_attempt({"TORCHELASTIC_RESTART_COUNT": "0"})
    for restarts, is_restarted in ((None, False), ("0", False), ("1", True), ("12", True)):
        environ = {} if restarts is None else {"TORCHELASTIC_MAX_RESTARTS": restarts}
        assert restarts_failed_ranks(environ) == is_restarted


def test_no_launcher_is_a_world_of_one_even_in_a_batch_script() -> None:
    for environ in ({}, {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}):
        launch = read_launch_env(environ)
        assert (launch.rank, launch.world_size, launch.master_addr) == (0, 1, "127.0.0.1")
        assert launched_rank(environ) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="lo is Linux's name for loopback")
@pytest.mark.parametrize(
    ("ranks_here", "chosen", "interface"), [(4, None, "lo"), (4, "ib0", "ib0"), (2, None, None)]
)
def test_ranks_of_one_machine_listen_to_no_other(
    monkeypatch: pytest.MonkeyPatch, ranks_here: int, chosen: str | None, interface: str | None
) -> None:
    environment = {} if chosen is None else {"GLOO_SOCKET_IFNAME": chosen}
    monkeypatch.setattr(os, "environ", environment)
    LaunchEnv(1, 4, 1, ranks_here, "node1", 10042).export()
    assert environment.get("GLOO_SOCKET_IFNAME") == interface


def test_ranks_that_cannot_meet_are_told_what_is_missing() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT: must be set for 8 ranks"):
        read_launch_env(ENVIRONMENTS["srun"])


@pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="no mpirun here (apt-get install openmpi-bin)"
)
def test_ranks_of_mpirun_that_meet_through_mpi_train_like_one_rank(
    tmp_path: Path, run_training: RunTraining, train_ranks: TrainRanks
) -> None:
    train_ranks("train.stop_at=3", f"run.dir={tmp_path / 'one'}", ranks=1)
    run_training("train.stop_at=3", f"run.dir={tmp_path / 'two'}", ranks=2, launcher="mpirun")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def test_each_rank_has_the_gpu_of_its_number_or_the_only_one_it_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    assert [own_gpu(rank, 4, 4).index for rank in range(4)] == [0, 1, 2, 3]
    for num_gpus in (1, 3):
        with pytest.raises(UserError) as error:
            own_gpu(0, 4, num_gpus)
        assert str(error.value) == (
            f"ranks: must be at most one per GPU, got 4 ranks on a machine with {num_gpus} GPUs "
            "(start fewer ranks)"
        )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert own_gpu(3, 4, 1).index == 0
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert [own_gpu(rank, 4, 3).index for rank in range(4)] == [0, 1, 2, 0]
