"""Part `starters`: each launcher starts three steps of a small model; torchrun also restarts it."""

import threading
import time
from collections.abc import Iterator

import psutil

from tensorlm.train.metrics import read_metrics

from .host import Host
from .launch import Ended, train
from .training import Row

STARTERS = {
    "torchrun": (), "deepspeed": (), "mpirun": (), "srun": (),
    "torchrun, one rank killed": ("--max-restarts", "2"),
}  # fmt: skip
_SMALL = (
    "model.num_layers=2", "model.hidden_size=512", "model.intermediate_size=1024",
    "model.num_heads=4", "model.num_kv_heads=2", "model.vocab_size=4096", "train.mlp_chunk=0",
)  # fmt: skip
_LIMIT = 120.0


def measure(host: Host) -> Iterator[Row]:
    """Start a run with every launcher that is installed."""
    for name, options in STARTERS.items():
        if not host.seconds_left:
            return
        is_killed = "killed" in name
        folder = f"starter-{name.replace(', ', '-').replace(' ', '-')}"
        steps = 40 if is_killed else 3
        settings = host.settings(
            folder, *(() if host.tiny else _SMALL), f"data.seq_len={host.length(32_768)}",
            f"train.rows_per_step={host.ranks}", f"train.steps={steps}", "checkpoint.every=1",
        )  # fmt: skip
        if is_killed:
            threading.Thread(target=kill_rank, args=(host, folder), daemon=True).start()
        try:
            launcher = name.split(",")[0]
            ended = train(host, launcher, host.ranks, folder, settings, *options, limit=_LIMIT)
        except FileNotFoundError:
            yield {"launcher": name, "exit": "not installed"}
            continue
        yield describe(host, name, folder, ended)


def describe(host: Host, name: str, folder: str, ended: Ended) -> Row:
    """One row of the table; `starts` counts how often the ranks were started."""
    losses = [record["train/loss"] for record in read_metrics(host.folder / folder)]
    return {
        "launcher": name,
        "ranks": host.ranks,
        "steps": len(losses),
        "starts": ended.output.count(f"run {host.folder / folder}:"),
        "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else None,
        "seconds": ended.seconds,
        "exit": ended.outcome,
    }


def kill_rank(host: Host, folder: str) -> None:
    """Kill one rank with SIGKILL as soon as the run has logged two steps."""
    deadline = time.monotonic() + _LIMIT
    while len(read_metrics(host.folder / folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    setting = f"run.dir={host.folder / folder}"
    for process in psutil.Process().children(recursive=True):
        command = process.cmdline()
        if setting in command and "--standalone" not in command:
            process.kill()
            return
