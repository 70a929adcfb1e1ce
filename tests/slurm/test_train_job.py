"""The training job on two nodes: it ends, and whatever disturbs it changes nothing in the result.

Each job has one rank on each node; they share the rows, so halos and swaps cross the nodes.
"""

import hashlib
import re
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tensorlm.checkpoint import newest_checkpoint
from tensorlm.config import config_toml, load_config
from tensorlm.runtime.commit import git_commit
from tests.slurm.conftest import Site
from tests.support.launching import TrainRanks, losses


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
        f"log = {log}",
        f"run.dir = {run}",
        "start = from scratch, of 80 steps",
        f"commit = {git_commit()}",
        f"config = {digest[:12]}",
        "ranks = 2 (dp 1 x sp 2)",
    ):
        assert line in head.splitlines(), line
    assert re.search(r"^gpus = 1 on each node \(.+\)$", head, re.MULTILINE)
    (port,) = re.findall(
        r"^launcher = srun, 2 ranks, rendezvous at 127.0.0.1:(\d+)$", head, re.MULTILINE
    )
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0  # nobody listens any more
    assert (run / f"logs/{log.name}").read_text() == log.read_text()


def disturb(site: Site, job: str, run: Path, course: list[tuple[str, str]]) -> None:
    """Disturb a training job of two ranks once a start, until it has gone through `course`.

    Args:
        course: what happens to each start, and the launcher of the next one.
    """
    cluster, log_file = site.cluster, Path(site.cluster.field(job, "StdOut"))
    urgent: list[str] = []

    def stop_is_asked() -> None:
        cluster.wait_until((run / "STOP").exists, "the job has the signal")

    def signal() -> None:
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        stop_is_asked()

    def preempt() -> None:
        size = ("--nodes=2", "--gpus-per-node=2", "--output=/dev/null")
        urgent.append(cluster.run("sbatch", "--parsable", "-p", "urgent", *size, "--wrap", "true"))
        stop_is_asked()

    def requeue() -> None:
        cluster.run("scontrol", "requeue", job)
        cluster.wait_until(lambda: cluster.field(job, "JobState") != "RUNNING", "it is on its way")

    def kill_node() -> None:
        cluster.kill_node("node2")
        cluster.start_node("node2")

    disturbances: dict[str, Callable[[], object]] = {
        "signal": signal, "preempt": preempt, "requeue": requeue, "kill node": kill_node,
        "kill launchers": cluster.kill_launchers,
    }  # fmt: skip
    for number, (kind, next_launcher) in enumerate(course, start=1):
        # A launcher that dies is made good for where there was progress, and only there.
        sign = "\ncheckpoint " if kind == "kill launchers" else "\nstep "

        def is_training(starts: int = number, sign: str = sign) -> bool:
            parts = log_file.read_text().split("\n=== ")
            return len(parts) == starts and sign in parts[-1]

        cluster.wait_until(lambda: len(cluster.ranks()) == 2, f"both ranks of start {number}")
        ranks = cluster.ranks()
        cluster.wait_until(is_training, f"steps of start {number}", pause=0.01)
        for rank in ranks:  # else it may have ended by itself when the disturbance arrives
            rank.suspend()
        site.set_site(f"export LAUNCHER={next_launcher}")
        disturbances[kind]()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.resume()
        cluster.wait_for_restart(job, number)
    assert cluster.wait_for(job) == "COMPLETED", site.log(job)
    assert not urgent or cluster.wait_for(*urgent) == "COMPLETED"


def check_course(log: str, launchers: list[str], num_saved: int) -> None:
    """The log names each start's launcher; the first `num_saved` ends saved where they were."""
    assert re.findall(r"^launcher = (\w+), 2 ranks", log, re.MULTILINE) == launchers
    starts = re.findall(r"^start = (.*), of 80 steps$", log, re.MULTILINE)
    saved = re.findall(r"^requeue: saved .* continues (after step \d+)$", log, re.MULTILINE)
    # Asked to go, it saved where it was: no step is done twice.
    assert len(saved) == num_saved
    assert starts[: num_saved + 1] == ["from scratch", *saved]
    # deepspeed left with 0 when it was killed: that is not taken for the end.
    assert "\nerror: deepspeed: ended before checkpoint 80\n" in log
    assert "\nrequeue: exit code 70, after new checkpoints;" in log


def check_same_end(run: Path, whole: Path) -> None:
    """The runs have the same bits, and what was made for the job alone is gone."""
    assert hashes(run) == hashes(whole)
    assert losses(run) == losses(whole)
    left = [path.name for path in run.iterdir()]
    assert not [name for name in left if name.startswith((".", "STOP", "REQUEUE"))]


STEPS = ("train.steps=80", "checkpoint.every=5")


def test_job_asked_to_stop_and_then_killed_ends_like_an_undisturbed_run(
    site: Site, tmp_path: Path, train_ranks: TrainRanks
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_ranks(f"run.dir={whole}", "parallel.sp=2", *STEPS)
    site.set_site("export LAUNCHER=srun")
    job = site.train(broken, *STEPS)
    disturb(site, job, broken, [("signal", "deepspeed"), ("kill launchers", "mpirun")])
    check_head_of_log(site.folder / f"slurm/logs/llama8b-{job}.out", broken)
    check_course(site.log(job), ["srun", "deepspeed", "mpirun"], num_saved=1)
    check_same_end(broken, whole)


@pytest.mark.faults
def test_job_disturbed_under_every_launcher_ends_like_an_undisturbed_one(
    site: Site, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    site.set_site("export LAUNCHER=srun")
    job = site.train(whole, *STEPS)
    assert site.cluster.wait_for(job) == "COMPLETED", site.log(job)
    check_head_of_log(site.folder / f"slurm/logs/llama8b-{job}.out", whole)

    site.set_site("export LAUNCHER=deepspeed")
    job = site.train(broken, *STEPS)
    course = [
        ("signal", "torchrun"), ("preempt", "mpirun"), ("requeue", "srun"),
        ("kill node", "deepspeed"), ("kill launchers", "srun"),
    ]  # fmt: skip
    disturb(site, job, broken, course)
    launchers = ["deepspeed", *(launcher for _, launcher in course)]
    check_course(site.log(job), launchers, num_saved=2)
    check_same_end(broken, whole)


def test_job_that_restarts_without_progress_stays_down(site: Site, tmp_path: Path) -> None:
    site.set_site("export LAUNCHER=srun", "MAX_RESTARTS=1")
    job = site.train(tmp_path / "run", "train.steps=100000", "checkpoint.every=100000")
    # Slurm may miss a rank of node2 that it is just starting.
    site.cluster.wait_until(lambda: len(site.cluster.ranks()) == 2, "both ranks")
    # The node of the job's script and of rank 0: nobody is left who could save.
    site.cluster.kill_node("node1")
    site.cluster.start_node("node1")
    site.cluster.wait_for_restart(job, 1)
    assert site.cluster.wait_for(job) == "FAILED", site.log(job)
    assert "1 restarts without a checkpoint after step 0" in site.log(job)


def test_job_that_is_ended_for_good_stays_down(site: Site, tmp_path: Path) -> None:
    cluster, run = site.cluster, tmp_path / "run"
    site.set_site("export LAUNCHER=torchrun")
    one_node = ("--nodes=1",)

    def start(*settings: str) -> str:
        job = site.train(run, "train.steps=100000", "parallel.sp=1", *settings, options=one_node)
        cluster.wait_until(lambda: "\nstep " in site.log(job), "steps")
        return job

    def check_ended(job: str, state: str) -> None:
        assert cluster.wait_for(job) == state, site.log(job)
        assert "requeue: " not in site.log(job)
        assert cluster.field(job, "Restarts") == "0"

    job = start()
    (run / "STOP").touch()
    check_ended(job, "FAILED")
    cancelled = start()
    cluster.run("scancel", cancelled)
    check_ended(cancelled, "CANCELLED")
    found = newest_checkpoint(run)
    assert found is not None
    assert found.step == len(losses(run))  # both have saved what they had
    # A mistake of the user is no bad luck, although there was progress before it showed.
    mistaken = start(
        "optim.lr=1e30", "optim.warmup_steps=0", "train.max_skips=1", "checkpoint.every=1"
    )
    check_ended(mistaken, "FAILED")
    assert cluster.field(mistaken, "ExitCode") == "2:0", site.log(mistaken)
    newer = newest_checkpoint(run)
    assert newer is not None
    assert newer.step > found.step


PER_NODE = ("--gpus-per-node=1", "--ntasks-per-node=1")


def dry_run(
    site: Site, *arguments: str, size: tuple[str, ...] = ("--nodes=2", *PER_NODE)
) -> "subprocess.CompletedProcess[str]":
    command = ["slurm/train_llama8b.sh", "--dry-run", *size, f"--config={site.config}", *arguments]
    return subprocess.run(
        command, cwd=site.folder, env=site.cluster.environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("size", "cause"),
    [
        (
            ("-N2", "--gpus-per-node=2"),
            "--ntasks-per-node x --cpus-per-task: must be at most 64, the CPUs in a node, "
            "got 8 x 12 = 96 (pass --ntasks-per-node=2, one task per GPU)",
        ),
        (
            ("-N1", "--gpus-per-node=2", "--ntasks-per-node=2", "-c40", "-purgent"),
            "--ntasks-per-node x --cpus-per-task: must be at most 64, the CPUs in a node, "
            "got 2 x 40 = 80 (pass --cpus-per-task=32)",
        ),
        (
            ("-N1", "--gpus-per-node=4", "--ntasks-per-node=4"),
            "--gpus-per-node: must be at most 2, the GPUs in a node, got 4",
        ),
        (("-N4", *PER_NODE), "--nodes: must be at most 2, the partition's number of nodes, got 4"),
    ],
)
def test_a_dry_run_names_what_no_node_has(site: Site, size: tuple[str, ...], cause: str) -> None:
    refused = dry_run(site, size=size)
    assert refused.returncode == 1
    slurm, named = refused.stderr.splitlines()[-2:]  # Slurm's own line does not name the reason
    assert slurm.startswith(("allocation failure: ", "sbatch: error: "))
    assert named == f"error: {cause}"


def test_bad_settings_are_one_line_each_before_the_queue_and_in_the_job(
    site: Site, tmp_path: Path
) -> None:
    good = dry_run(site, "parallel.sp=2")
    assert good.returncode == 0, good.stderr
    assert "ranks = 2 (dp 1 x sp 2)" in good.stdout.splitlines()
    # In whatever way sbatch would take it. Four nodes are asked for where nothing is said.
    for nodes in (("-N2",), ("-N", "2", "-p", "debug"), ("--nodes", "1-2")):
        assert dry_run(site, "parallel.sp=2", size=(*nodes, *PER_NODE)).stdout == good.stdout, nodes
    unequal = dry_run(site, size=("-N2", "--gpus-per-node", "2", "--ntasks-per-node", "1"))
    wanted = "error: --ntasks-per-node: must be at least 2, one task per GPU, got 1\n"
    assert unequal.stderr == wanted
    bad = dry_run(site, "train.stepz=3", "parallel.sp=two")
    assert bad.returncode == 2
    errors = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "train.stepz: unknown key (did you mean steps?)" in bad.stderr
    assert site.cluster.run("squeue", "-h") == ""

    job = site.train(tmp_path / "run", "parallel.sp=3")
    assert site.cluster.wait_for(job) == "FAILED"
    assert site.cluster.field(job, "ExitCode") == "2:0"
    assert re.search(r"^error: .*parallel.sp: sp = 3 cannot", site.log(job), re.MULTILINE)
    for script, options in (("train_llama8b.sh", ()), ("eval_128k.sh", ("--array=0",))):
        arguments = ("--config", str(site.config), f"run.dir={tmp_path / 'run'}")
        job = site.submit(script, *arguments, options=("--nodes=1", "--gpus-per-node=2", *options))
        assert site.cluster.wait_for(job) == "FAILED"
        assert "\nerror: --ntasks-per-node: must be at least 2, one task per GPU" in site.log(job)
    assert not (tmp_path / "run").exists()
