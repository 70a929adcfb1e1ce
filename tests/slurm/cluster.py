"""A real Slurm cluster on this machine: munged, slurmctld and a slurmd for each node.

Loopback only, as the invoking user, without systemd, cgroups or a database. Nodes claim CPUs,
memory and GPUs that the machine does not have, so that job scripts are accepted as they are; ranks
are real processes. Debian's packages slurm-wlm and munge are enough.
"""

import os
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=1,sched_min_interval=0
# a slow, loaded machine
MessageTimeout=60
SlurmdTimeout=300
BatchStartTimeout=60
InactiveLimit=0
MinJobAge=86400
KillWait=30
JobRequeue=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# jobs of two clusters on one machine do not share a number, nor what is derived from it
FirstJobId={first_job}
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {claims}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {claims}
PartitionName=debug Nodes=node1,node2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node1,node2 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing_commands() -> list[str]:
    """What a cluster and its jobs need and this machine lacks."""
    needed = ("munged", "slurmctld", "slurmd", "sbatch", "mpirun")
    return [name for name in needed if shutil.which(name, path=PATH) is None]


class Cluster:
    """Two nodes, node1 and node2, of 2 counted GPUs each; use it as a context manager.

    Jobs of partition `debug` give way to those of `urgent`: they get TERM, and are put back into
    the queue a minute later if they have not gone by themselves.
    """

    def __init__(self) -> None:
        # Not pytest's folder: sockets' paths are at most 107 characters long.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": f"{self.folder}/slurm.conf"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._write_configuration()
            self._start("munged", "munged", "--foreground", "--force", "--origin=127.0.0.1",
                        f"--socket={self.folder}/munge.socket", f"--key-file={self.folder}/key",
                        f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/seed",
                        f"--log-file={self.folder}/munged.log")  # fmt: skip
            self.wait_until((self.folder / "munge.socket").exists, "munged listens")
            self._start("slurmctld", "slurmctld", "-D", "-i")
            for node in ("node1", "node2"):
                self.start_node(node)
            self.wait_until(lambda: self.run("sinfo", "-hp", "debug", "-o%T") == "idle", "nodes up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--full", "--user", self.run("id", "-un"))
            self.wait_until(lambda: not self.run("squeue", "-h"), "jobs have ended")
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            daemon.wait(timeout=30)
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.folder)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command with this cluster's configuration; returns what it prints.

        Raises:
            AssertionError: with its output, if it fails.
        """
        result = subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState."""
        fields = self.run("scontrol", "show", "job", "-o", job).splitlines()[0].split()
        return dict(item.split("=", 1) for item in fields if "=" in item)[name]

    def wait_for(self, job: str) -> str:
        """The state that a job, or an array of jobs, has ended in."""
        states: set[str] = set()

        def has_ended() -> bool:
            shown = self.run("squeue", "-h", "--states=all", f"--jobs={job}", "-o%T").split()
            states.clear()
            states.update(shown)
            return bool(shown) and states <= ENDED

        self.wait_until(has_ended, f"job {job} has ended", limit=300, pause=0.5)
        return "+".join(sorted(states))

    def wait_for_restart(self, job: str, number: int) -> None:
        """Wait until a job that goes back into the queue has left it for the `number`-th time."""

        hastened: list[int] = []

        def has_restarted() -> bool:
            state = self.field(job, "JobState")
            if state == "PENDING" and not hastened and self.field(job, "Reason") == "BeginTime":
                hastened.append(number)
                # Slurm lets it wait for its old credential to expire: 6 s, where 2 are enough to
                # tell a new one from it.
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")
            has_started = state == "RUNNING" or state in ENDED
            return has_started and self.field(job, "Restarts") == str(number)

        self.wait_until(has_restarted, f"restart {number} of job {job}", pause=0.3)

    def wait_until(
        self, condition: Callable[[], object], what: str, limit: float = 120, pause: float = 0.1
    ) -> None:
        """Wait for something that must happen, and happens soon on a machine that is not loaded."""
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, f"not within {limit:.0f} s: {what}{self._logs()}"
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name} has ended{self._logs()}"
            time.sleep(pause)

    def start_node(self, node: str) -> None:
        """Start a node; after `kill_node`, it comes back."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """A node loses power: its daemon and all that it runs are gone, and Slurm notices."""
        self._daemons.pop(node).kill()
        # What was just being started shows up a moment later: a second without anything is the end.
        quiet_since = time.monotonic()
        while time.monotonic() < quiet_since + 1:
            for process in (*self._managers_on(node), *self._processes_on(node)):
                quiet_since = time.monotonic()
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        # Slurm would find out by itself after SlurmdTimeout.
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, whatever started them."""
        return [p for p in self.processes() if _is_python_with("launcher/train.py", p)]

    def kill_launchers(self) -> None:
        """What deepspeed starts ranks with dies, on all nodes, and then the ranks."""
        launchers = [p for p in self.processes() if _is_python_with("deepspeed.launcher.launch", p)]
        for process in (*launchers, *self.ranks()):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _managers_on(self, node: str) -> list[psutil.Process]:
        """The slurmstepds of a node, which clear their environment: their sockets tell whose."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() == "slurmstepd" and any(
                    str(end.laddr).startswith(f"{self.folder}/spool-{node}/")
                    for end in process.net_connections(kind="unix")
                ):
                    found.append(process)
        return found

    def _processes_on(self, node: str) -> list[psutil.Process]:
        return [p for p in self.processes() if _variable(p, "SLURMD_NODENAME") == node]

    def processes(self) -> list[psutil.Process]:
        """Everything alive that belongs to this cluster: daemons, job scripts, ranks."""
        conf = self.environment["SLURM_CONF"]
        return [p for p in psutil.process_iter() if _variable(p, "SLURM_CONF") == conf]

    def leftovers(self) -> list[str]:
        """What is alive besides the daemons themselves: nothing, when no job is there."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if process.name() not in ("munged", "slurmctld", "slurmscriptd", "slurmd"):
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
        return found

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(command[0], path=PATH) or command[0], *command[1:]],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _logs(self) -> str:
        """What is alive and the ends of the daemons' logs, for a failed test."""
        ends = ["--- alive", *self.leftovers()]
        for path in sorted(self.folder.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            ends += [f"--- {path.name}", *lines]
        return "\n".join(["", *ends])

    def _write_configuration(self) -> None:
        self.folder.chmod(0o755)  # munged's clients must reach its socket
        for name in ("state", "spool-node1", "spool-node2"):
            (self.folder / name).mkdir()
        key = self.folder / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        for gpu in range(2):
            (self.folder / f"gpu{gpu}").touch()  # slurmd only counts them
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File={self.folder}/gpu[0-1] Flags=no_gpu_env\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # asked for, unused
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for probe in sockets:
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in sockets]
        text = CONF.format(
            host=socket.gethostname().split(".")[0],
            user=self.run("id", "-un"),
            folder=self.folder,
            ports=ports,
            first_job=random.randrange(1, 15000),
            claims="CPUs=64 RealMemory=1024000 Gres=gpu:2 State=UNKNOWN",
        )
        (self.folder / "slurm.conf").write_text(text)


def _is_python_with(script: str, process: psutil.Process) -> bool:
    """It runs this script, or module; a dry run is none."""
    try:
        program, *arguments = process.cmdline()
    except (psutil.Error, ValueError):
        return False
    options = {"-u", "-m"}
    first = next((argument for argument in arguments if argument not in options), None)
    return "python" in program and first == script and "--dry-run" not in arguments


def _variable(process: psutil.Process, name: str) -> str | None:
    """A variable of a process's environment; None also where it may not be read."""
    try:
        return process.environ().get(name)
    except (psutil.Error, OSError):
        return None
