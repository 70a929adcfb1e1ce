"""Start the product's own commands under a launcher, and end them when the time is over."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tensorlm.runtime.launch_env import free_port

from .host import CONFIG, ROOT, Host

_GRACE_SECONDS = 8.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (None: out of time), its seconds and its output."""

    code: int | None
    seconds: float
    output: str

    @property
    def outcome(self) -> str:
        """The exit code, with the error if there is one, for a table."""
        if self.code is None:
            return "out of time"
        lines = [line for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")] or lines
        return f"{self.code}: {errors[-1]}" if self.code and errors else f"{self.code}"


def launcher_command(launcher: str, ranks: int, *options: str) -> list[str] | None:
    """The command that starts a program on `ranks` ranks of this host; None if not installed."""
    binaries = Path(sys.executable).parent
    found = shutil.which(launcher, path=f"{binaries}:{os.environ['PATH']}")
    match launcher:
        case "python":
            return [sys.executable]
        case "torchrun":  # also where only the package is installed
            module = [sys.executable, "-m", "torch.distributed.run"]
            return [*module, "--standalone", f"--nproc_per_node={ranks}", *options]
        case "deepspeed":
            module = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
            port = ["--master_port", str(free_port())]
            # With --num_gpus, deepspeed ignores CUDA_VISIBLE_DEVICES.
            gpus = ",".join(visible_gpus()[:ranks])
            number = ["--include", f"localhost:{gpus}"] if gpus else ["--num_gpus", str(ranks)]
            return [*module, *number, *port, *options]
        case "mpirun" if found:
            root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
            bind = ["--oversubscribe", "--bind-to", "none"]
            return [found, *root, *bind, "-np", str(ranks), *options, sys.executable]
        case "srun" if found:
            return [found, "--nodes=1", f"--ntasks={ranks}", *options, sys.executable]
    return None


def visible_gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES lists; empty if it is not set."""
    return [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]


def run_command(
    host: Host,
    command: Sequence[str],
    log: Path,
    *,
    gpus: str | None = None,
    limit: float = float("inf"),
) -> Ended:
    """Run a command of this host in the folder of the repository, until it ends or time is over.

    Args:
        host: whose time limit applies.
        command: the command and its arguments.
        log: file for its output.
        gpus: CUDA_VISIBLE_DEVICES (default: all).
        limit: limit in seconds of this command alone.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    if Path(command[0]).name == "srun":  # which, unlike the others, lets no rank choose a port
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if not host.on_gpu:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(log, "wb") as output:
        process = psutil.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        is_late = False
        while process.poll() is None and not is_late:
            time.sleep(_POLL_SECONDS)
            is_late = not host.seconds_left or time.monotonic() - started > limit
        if process.poll() is None:
            end_tree(process)
    code = None if is_late else process.returncode
    return Ended(code, time.monotonic() - started, log.read_text(errors="replace"))


def train(
    host: Host, launcher: str, ranks: int, name: str, settings: Sequence[str], *options: str,
    limit: float = float("inf"),
) -> Ended:  # fmt: skip
    """Train the run `name` from its start with `launcher/train.py`.

    Raises:
        FileNotFoundError: the launcher is not installed.
    """
    shutil.rmtree(host.folder / name, ignore_errors=True)
    command = launcher_command(launcher, ranks, *options)
    if command is None:
        raise FileNotFoundError(launcher)
    program = ["launcher/train.py", "--config", str(CONFIG), *settings]
    gpus = (visible_gpus() or ["0"])[0] if ranks == 1 else None
    return run_command(
        host, [*command, *program], host.folder / f"{name}.log", gpus=gpus, limit=limit
    )


def end_tree(process: psutil.Process) -> None:
    """End a process and all its descendants: ask first, then kill."""
    family = [*process.children(recursive=True), process]
    process.terminate()
    _, alive = psutil.wait_procs(family, _GRACE_SECONDS)
    for survivor in alive:
        survivor.kill()
    psutil.wait_procs(alive, _GRACE_SECONDS)
