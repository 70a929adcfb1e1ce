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

STEPS = ("train.steps=150", "checkpoint.every=10")


def hashes(run: Path) -> list[str]:
    """sha256 of each rank's weights and Adam state at the newest checkpoint."""
    found = newest_checkpoint(run)
    assert found is not None
    return [entry["sha256"] for entry in found.manifest["files"]]


def test_job_disturbed_under_every_launcher_ends_like_an_undisturbed_one(
    site: Site, tmp_path: Path
) -> None:
    cluster, whole, broken = site.cluster, tmp_path / "whole", tmp_path / "broken"
    site.set_site("export LAUNCHER=srun")
    job = site.train(whole, *STEPS)
    assert cluster.wait_for(job) == "COMPLETED", site.log(job)

    site.set_site("export LAUNCHER=deepspeed")
    job = site.train(broken, *STEPS)

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
    ]
    for number, (disturb, next_launcher) in enumerate(disturbances, start=1):

        def is_training(starts: int = number) -> bool:
            parts = site.log(job).split("\n=== ")
            return len(parts) == starts and "\nstep " in parts[-1]

        cluster.wait_until(is_training, f"steps of start {number}")
        site.set_site(f"export LAUNCHER={next_launcher}")
        disturb()
        cluster.wait_for_restart(job, number)
    assert cluster.wait_for(job) == "COMPLETED", site.log(job)

    log = site.log(job)
    launchers = re.findall(r"^launcher = (\w+), 2 ranks", log, re.MULTILINE)
    assert launchers == ["deepspeed", "torchrun", "mpirun", "srun", "deepspeed"]
    starts = re.findall(r"^start = (.*), of 150 steps$", log, re.MULTILINE)
    saved = re.findall(r"^requeue: saved .* continues (after step \d+)$", log, re.MULTILINE)
    # Asked to go, it saved where it was: no step is done twice.
    assert starts[:3] == ["from scratch", *saved]
    assert hashes(broken) == hashes(whole)
    assert losses(broken) == losses(whole)


def test_head_of_the_log_says_what_runs_where_and_the_run_keeps_a_link_to_it(
    site: Site, tmp_path: Path
) -> None:
    # Four ranks, two on each node, to see that they are counted and placed.
    size = ("--gpus-per-node=2", "--ntasks-per-node=2")
    job = site.train(tmp_path / "run", "train.steps=3", options=size)
    assert site.cluster.wait_for(job) == "COMPLETED", site.log(job)
    log = site.folder / f"slurm/logs/llama8b-{job}.out"
    head = log.read_text().partition("\nrun ")[0]
    config = load_config(tmp_path / "run/config.toml")
    digest = hashlib.sha256(config_toml(config).encode()).hexdigest()[:12]
    for line in (
        "nodes = 2 (node[1-2])",
        "gpus = 2 on each node (nvidia-smi finds none)",
        f"log = {log}",
        f"run.dir = {tmp_path}/run",
        "start = from scratch, of 3 steps",
        f"commit = {git_commit()}",
        f"config = {digest}",
        "ranks = 4 (dp 2 x sp 2)",
    ):
        assert line in head.splitlines(), line
    assert re.search(r"^launcher = deepspeed, 4 ranks meet at 127.0.0.1:\d+$", head, re.MULTILINE)
    assert (tmp_path / f"run/logs/{log.name}").read_text() == log.read_text()
    # The rendezvous and all else that was made for the job is gone.
    port = int(head.rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    left = [path.name for path in (tmp_path / "run").iterdir()]
    assert not [name for name in left if name.startswith((".", "STOP", "REQUEUE"))]


def test_job_that_restarts_without_progress_stays_down(site: Site, tmp_path: Path) -> None:
    site.set_site("export LAUNCHER=srun", "MAX_RESTARTS=1")
    job = site.train(tmp_path / "run")
    site.cluster.wait_until((tmp_path / "run/restarts").exists, "the first start")
    site.cluster.run("scontrol", "requeue", job)
    site.cluster.wait_for_restart(job, 1)
    assert site.cluster.wait_for(job) == "FAILED", site.log(job)
    assert "1 restarts without a checkpoint after step 0" in site.log(job)


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
