"""Damaged checkpoints: every change of any file is noticed, and the next older one is taken."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tensorlm.checkpoint import load as reading
from tensorlm.checkpoint import newest_checkpoint, select_checkpoint
from tensorlm.config import Config
from tensorlm.runtime.errors import EXIT_USER_ERROR, UserError
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.preemption import StopRequest
from tests.reliability.conftest import TinyRuns
from tests.reliability.harness import Job
from tests.reliability.saves import LAST_STEP, holds_its_step, save_all

NEWEST, OLDER = f"step-{LAST_STEP:08d}", f"step-{LAST_STEP - 1:08d}"


@pytest.fixture
def saved(tiny: TinyRuns) -> Path:
    """The folder of a run with two checkpoints of two ranks."""
    job = Job(tiny("run"), world=2, run=save_all)
    assert job.wait() == [0, 0], job.output()
    return job.dir


def flip_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def extend(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 64)))


def zero_page(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    size = rng.choice([64, 512, 4096])
    start = rng.randrange(0, len(content), 64)
    stop = min(start + size, len(content))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)


def move_bytes(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    at = rng.randrange(1, len(content))
    path.write_bytes(content[at:] + content[:at])


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def rename(path: Path, rng: random.Random) -> None:
    path.rename(path.with_name("rank-00002.safetensors"))


def swap(path: Path, rng: random.Random) -> None:
    other = rng.choice([p for p in path.parent.iterdir() if p != path])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def add(path: Path, rng: random.Random) -> None:
    shutil.copy(path, path.with_name(f"rank-{rng.randint(2, 9):05d}.safetensors"))


def take_from_older(path: Path, rng: random.Random) -> None:
    shutil.copy(path.parents[1] / OLDER / path.name, path)


def take_all_from_older(path: Path, rng: random.Random) -> None:
    shutil.rmtree(path.parent)
    shutil.copytree(path.parents[1] / OLDER, path.parent)


def link(path: Path, rng: random.Random) -> None:
    moved = path.parents[2] / "elsewhere"
    path.replace(moved)
    path.symlink_to(moved)


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    flip_bit, flip_bit, flip_bit, flip_bit, truncate, extend, zero_page, move_bytes, remove, rename,
    swap, add, take_from_older, take_all_from_older, link,
]  # fmt: skip


def check_mutations(run: Path, num_trials: int, seed: int, capsys: pytest.CaptureFixture) -> None:
    """Each trial changes the newest checkpoint; it must not load, and the older one must."""
    rng = random.Random(seed)
    good = run.with_name("good")
    (run / NEWEST).rename(good)
    contents = {path.name: path.read_bytes() for path in good.iterdir()}
    num_done = 0
    while num_done < num_trials:
        shutil.copytree(good, run / NEWEST)
        mutate = rng.choice(MUTATIONS)
        mutate(run / NEWEST / rng.choice(sorted(contents)), rng)
        files = (run / NEWEST).iterdir()
        is_changed = mutate is link or {p.name: p.read_bytes() for p in files} != contents
        found = newest_checkpoint(run)
        said = capsys.readouterr().out
        assert found is not None
        assert holds_its_step(found)
        if is_changed:  # zeros may fall on zeros
            assert found.step == LAST_STEP - 1, mutate.__name__
            assert said.startswith(f"skipping checkpoint: {NEWEST}: "), mutate.__name__
            assert said.count("\n") == 1
            num_done += 1
        shutil.rmtree(run / NEWEST)


def test_any_change_is_noticed_and_the_older_checkpoint_is_taken(
    saved: Path, capsys: pytest.CaptureFixture
) -> None:
    check_mutations(saved, 400, 0, capsys)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 21))
def test_ten_thousand_changes(saved: Path, capsys: pytest.CaptureFixture, seed: int) -> None:
    check_mutations(saved, 500, seed, capsys)


def test_every_single_bit_of_a_manifest_counts(saved: Path, capsys: pytest.CaptureFixture) -> None:
    path = saved / NEWEST / "manifest.json"
    content = path.read_bytes()
    for index in range(0, len(content), 5):
        changed = bytearray(content)
        changed[index] ^= 1 << index % 8
        path.write_bytes(changed)
        found = newest_checkpoint(saved)
        assert found is not None
        assert found.step == LAST_STEP - 1


@pytest.mark.parametrize("step", [None, LAST_STEP])
@pytest.mark.parametrize("damage", [flip_bit, truncate, remove])
def test_damaged_checkpoint_is_not_selected(
    saved: Path, step: int | None, damage: Callable[[Path, random.Random], None]
) -> None:
    """Export and evaluation read what `select_checkpoint` returns."""
    assert select_checkpoint(saved, step).step == LAST_STEP
    damage(saved / NEWEST / "rank-00001.safetensors", random.Random(0))
    if step is None:
        assert select_checkpoint(saved, step).step == LAST_STEP - 1
    else:
        with pytest.raises(UserError, match=f"{NEWEST}.*rank-00001"):
            select_checkpoint(saved, step)


def test_names_and_times_that_mean_nothing_change_nothing(saved: Path) -> None:
    (saved / NEWEST / ".nfs000000000000001c00000001").touch()  # removed, but still open somewhere
    os.utime(saved / NEWEST, (0, 0))  # clocks of two machines
    os.utime(saved / NEWEST / "manifest.json", (0, 0))
    found = newest_checkpoint(saved)
    assert found is not None
    assert found.step == LAST_STEP


@pytest.mark.parametrize(("num_stale", "codes"), [(3, [0, 0]), (10**9, [EXIT_USER_ERROR] * 2)])
def test_rank_that_sees_an_old_folder_waits_until_it_sees_what_rank_0_sees(
    tiny: TinyRuns, saved: Path, num_stale: int, codes: list[int]
) -> None:
    def prepare(rank: int) -> None:
        real, calls = os.listdir, [0]

        def listdir(path: Path) -> list[str]:
            calls[0] += 1
            return [] if calls[0] <= num_stale else real(path)

        if rank == 1:
            os.listdir = listdir  # type: ignore[assignment]
            reading._STALE_SECONDS = 3.0 if num_stale < 10 else 0.3

    def find(config: Config, launch: LaunchEnv, stop: StopRequest) -> int:
        found = newest_checkpoint(saved, launch.rank, launch.world_size)
        assert found is not None
        assert found.step == LAST_STEP
        return 0

    job = Job(tiny("other"), 2, prepare, find)
    assert job.wait(30) == codes, job.output()
    if num_stale > 10:
        assert f"{NEWEST}: rank 1: " in job.errors()[0]


def test_nothing_whole_is_an_error_not_a_start_from_scratch(saved: Path) -> None:
    for name in (NEWEST, OLDER):
        (saved / name / "rank-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is intact .*rank-00001.*missing"):
        newest_checkpoint(saved)
    for name in (NEWEST, OLDER):
        shutil.rmtree(saved / name)
    with pytest.raises(UserError, match="are missing"):
        newest_checkpoint(saved)
