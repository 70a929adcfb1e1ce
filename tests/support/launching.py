"""A tiny configuration, the real launchers on this machine, and what they leave."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

TINY = """
[run]
dir = "{run}"
[model]
vocab_size = 512
hidden_size = 32
intermediate_size = 64
num_layers = 2
num_heads = 4
num_kv_heads = 2
rope_theta = 10000.0
fold = [16]
hop_bias_init = -1.0
[data]
path = "{data}"
seq_len = 128
[optim]
lr = 3e-3
warmup_steps = 2
[train]
steps = 8
rows_per_step = 4
dtype = "fp32"
[checkpoint]
every = 3
keep_last = 3
"""

RunTraining = Callable[..., "subprocess.CompletedProcess[str]"]
TrainRanks = Callable[..., str]  # what the ranks printed


def rendezvous_port() -> int:
    """A port that nobody has, and that the system gives to nobody who asks for just any port."""
    while True:
        port = random.SystemRandom().randrange(26000, 32768)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def launch_command(launcher: str, ranks: int) -> list[str]:
    """The command that starts `launcher/train.py` on `ranks` ranks of this machine."""
    binaries = Path(sys.executable).parent
    if launcher == "deepspeed":
        command = [str(binaries / "deepspeed"), "--quiet", "--num_accelerators", str(ranks)]
        return [*command, "--master_port", str(rendezvous_port()), "launcher/train.py"]
    if launcher == "torchrun":
        command = [str(binaries / "torchrun"), "--standalone", f"--nproc_per_node={ranks}"]
        return [*command, "launcher/train.py"]
    if launcher == "mpirun":
        allow = ["--allow-run-as-root"] * (os.geteuid() == 0)
        command = ["mpirun", *allow, "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
        return [*command, sys.executable, "launcher/train.py"]
    return [sys.executable, "launcher/train.py"]


def torchrun_command(ranks: int, *options: str) -> list[str]:
    """torchrun with options of its own, such as how often it restarts the ranks."""
    torchrun = str(Path(sys.executable).parent / "torchrun")
    return [torchrun, *options, f"--nproc_per_node={ranks}", "launcher/train.py"]


def launch_environment() -> dict[str, str]:
    """CPU only, one thread a rank, this interpreter first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cpu_only = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **cpu_only, "PATH": path}


def losses(run_dir: Path) -> list[Any]:
    """The losses of metrics.jsonl, exactly as they were written."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]
