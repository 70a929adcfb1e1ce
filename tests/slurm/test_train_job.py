"""The training job on two nodes: it ends, and whatever disturbs it changes nothing in the result.

Each job has one rank on each node; they share the rows, so halos and swaps cross the nodes.
"""

import hashlib
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from tensorlm.checkpoint import newest_checkpoint
from tensorlm.config import config_toml, load_config
from tensorlm.metrics import git_commit
from tests.slurm.conftest import Site
from tests.tensorlm.launching import losses


def hashes(run: Path) -> list[str]:
    """sha256 of each rank's weights and Adam state at the newest checkpoint."""
    found = newest_checkpoint(run)
    assert found is not None
    return [entry["sha256"] for entry in found.manifest["files"]]


def check_head_of_log(log: Path, run: Path) -> None:
    """Its first lines say what runs where; the run holds a link to it."""
    head = log.read_text().partition("\nrun ")[0]
    digest = hashlib.sha256(config_toml(load_config(run / "config.toml")).encode()).hexdigest()
    for line in (
        "nodes = 2 (node[1-2])",
        "gpus = 1 on each node (nvidia-smi finds none)",
        f"log = {log}",
        f"run.dir = {run}",
        "start = from scratch, of 80 steps",
        f"commit = {git_commit()}",
        f"config = {digest[:12]}",
        "ranks = 2 (dp 1 x sp 2)",
    ):
        assert line in head.splitlines(), line
    (port,) = re.findall(r"^launcher = srun, 2 ranks meet at 127.0.0.1:(\d+)$", head, re.MULTILINE)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0  # nobody listens any more
    assert (run / f"logs/{log.name}").read_text() == log.read_text()


def test_job_disturbed_under_every_launcher_ends_like_an_undisturbed_one(
    site: Site, tmp_path: Path
) -> None:
    cluster, whole, broken = site.cluster, tmp_path / "whole", tmp_path / "broken"
    site.set_site("export LAUNCHER=srun")
    steps = ("train.steps=80", "checkpoint.every=5")
    job = site.train(whole, *steps)
    assert cluster.wait_for(job) == "COMPLETED", site.log(job)
    check_head_of_log(site.folder / f"slurm/logs/llama8b-{job}.out", whole)

    site.set_site("export LAUNCHER=deepspeed")
    job = site.train(broken, *steps)

    def preempt() -> None:
        size = ("--nodes=2", "--gpus-per-node=2", "--output=/dev/null")
        urgent = cluster.run("sbatch", "--parsable", "-p", "urgent", *size, "--wrap", "true")
        assert cluster.wait_for(urgent) == "COMPLETED"

    def kill_node() -> None:
        cluster.kill_node("node2")
        cluster.start_node("node2")

    disturbances: list[tuple[Callable[[], object], str]] = [
        (lambda: cluster.run("scancel", "--batch", "--signal=USR1", job), "torchrun"),
        (preempt, "mpirun"),
        (lambda: cluster.run("scontrol", "requeue", job), "srun"),
        (kill_node, "deepspeed"),
        (lambda: cluster.kill_rank("node1"), "srun"),
    ]
    for number, (disturb, next_launcher) in enumerate(disturbances, start=1):
        # A rank that dies is made good for where there was progress, and only there.
        sign = "\ncheckpoint " if number == 5 else "\nstep "

        def is_training(starts: int = number, sign: str = sign) -> bool:
            parts = site.log(job).split("\n=== ")
            return len(parts) == starts and sign in parts[-1]

        cluster.wait_until(is_training, f"steps of start {number}")
        site.set_site(f"export LAUNCHER={next_launcher}")
        disturb()
        cluster.wait_for_restart(job, number)
    assert cluster.wait_for(job) == "COMPLETED", site.log(job)

    log = site.log(job)
    launchers = re.findall(r"^launcher = (\w+), 2 ranks", log, re.MULTILINE)
    assert launchers == ["deepspeed", "torchrun", "mpirun", "srun", "deepspeed", "srun"]
    starts = re.findall(r"^start = (.*), of 80 steps$", log, re.MULTILINE)
    saved = re.findall(r"^requeue: saved .* continues (after step \d+)$", log, re.MULTILINE)
    # Asked to go, it saved where it was: no step is done twice.
    assert starts[:3] == ["from scratch", *saved]
    assert re.search(r"^requeue: exit code \d+, after new checkpoints;", log, re.MULTILINE)
    assert hashes(broken) == hashes(whole)
    assert losses(broken) == losses(whole)
    # What was made for the job alone is gone.
    left = [path.name for path in broken.iterdir()]
    assert not [name for name in left if name.startswith((".", "STOP", "REQUEUE"))]


def test_job_that_restarts_without_progress_stays_down(site: Site, tmp_path: Path) -> None:
    site.set_site("export LAUNCHER=srun", "MAX_RESTARTS=1")
    job = site.train(tmp_path / "run", "train.steps=100000", "checkpoint.every=100000")
    site.cluster.wait_until((tmp_path / "run/restarts").exists, "the first start")
    # The node of the job's script and of rank 0: nobody is left who could save.
    site.cluster.kill_node("node1")
    site.cluster.start_node("node1")
    site.cluster.wait_for_restart(job, 1)
    assert site.cluster.wait_for(job) == "FAILED", site.log(job)
    assert "1 restarts without a checkpoint after step 0" in site.log(job)


def test_job_that_is_stopped_by_hand_stays_down(site: Site, tmp_path: Path) -> None:
    site.set_site("export LAUNCHER=torchrun")
    job = site.train(tmp_path / "run", "train.steps=2000")
    site.cluster.wait_until(lambda: "\nstep " in site.log(job), "steps")
    (tmp_path / "run/STOP").touch()
    assert site.cluster.wait_for(job) == "FAILED"
    assert "requeue: " not in site.log(job)
    assert site.cluster.field(job, "Restarts") == "0"
    found = newest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.step == len(losses(tmp_path / "run"))


def test_bad_settings_are_one_line_each_before_the_queue_and_in_the_job(
    site: Site, tmp_path: Path
) -> None:
    def dry_run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["slurm/train_llama8b.sh", "--dry-run", "--nodes=2", "--gpus-per-node=1"]
        command += ["--ntasks-per-node=1", "--config", str(site.config), *arguments]
        return subprocess.run(
            command, cwd=site.folder, env=site.cluster.environment, capture_output=True, text=True
        )

    good = dry_run("parallel.sp=2")
    assert good.returncode == 0, good.stderr
    assert "ranks = 2 (dp 1 x sp 2)" in good.stdout.splitlines()
    bad = dry_run("train.stepz=3", "parallel.sp=two")
    assert bad.returncode == 2
    errors = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "train.stepz: unknown key (did you mean steps?)" in bad.stderr
    assert site.cluster.run("squeue", "-h") == ""

    job = site.train(tmp_path / "run", "parallel.sp=3")
    assert site.cluster.wait_for(job) == "FAILED"
    assert site.cluster.field(job, "ExitCode") == "2:0"
    assert re.search(r"^error: .*parallel.sp: sp = 3 cannot", site.log(job), re.MULTILINE)
    assert not (tmp_path / "run").exists()
