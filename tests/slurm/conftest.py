"""One throw-away cluster, and a folder to submit the shipped scripts from."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_commands
from tests.support.launching import ROOT, TINY

SITE = """
export PATH="{binaries}:$PATH" CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
# Open MPI leaves its session folder behind when it is killed.
export TMPDIR={temporary}
# The tests may run as root, and their nodes are one machine, whose shared memory they would mix up.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl=self,tcp
"""


@dataclass(frozen=True)
class Site:
    """A checkout on a cluster: `folder` is where a user would stand and submit."""

    cluster: Cluster
    folder: Path
    config: Path

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """`sbatch options slurm/script arguments`, on two nodes of one rank; returns the job id."""
        size = ("--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1")
        command = ("sbatch", "--parsable", *size, *options, f"slurm/{script}", *arguments)
        return self.cluster.run(*command, cwd=self.folder)

    def train(self, run: Path, *settings: str, options: tuple[str, ...] = ()) -> str:
        """Submit the training job, with one row shared by both nodes; returns the job id."""
        arguments = ("--config", str(self.config), f"run.dir={run}", "parallel.sp=2", *settings)
        return self.submit("train_llama8b.sh", *arguments, options=options)

    def set_site(self, *settings: str) -> None:
        """Write slurm/env.sh, with these lines at its end; jobs read it whenever they start."""
        temporary = self.cluster.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        common = SITE.format(binaries=Path(sys.executable).parent, temporary=temporary)
        (self.folder / "slurm/env.sh").write_text("\n".join((common, *settings, "")))

    def log(self, job: str) -> str:
        """What the job has written so far."""
        path = Path(self.cluster.field(job, "StdOut"))
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = missing_commands()
    if missing:
        pytest.skip(f"no {', '.join(missing)} here (apt-get install slurm-wlm munge openmpi-bin)")
    with Cluster() as running:
        yield running


@pytest.fixture
def site(cluster: Cluster, data: Path, tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "tensorlm"
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.out"))
    for name in ("launcher", "configs"):
        (folder / name).symlink_to(ROOT / name)
    config = tmp_path / "tiny.toml"
    config.write_text(TINY.format(run=tmp_path / "run", data=data))
    prepared = Site(cluster, folder, config)
    prepared.set_site()
    yield prepared
    cluster.wait_until(lambda: not cluster.run("squeue", "-h"), "no job is left")
    cluster.wait_until(lambda: not cluster.leftovers(), "nothing that a job has started is left")
