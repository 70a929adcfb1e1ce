"""Files and folders are there whole or not at all, wherever a writer ends or the power goes."""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tensorlm.runtime import disk
from tests.support.power_cut import Recorder, rebuild, write_out

OLD, NEW = b"old", b"new content"
MODES = ("lost", "kept", "empty", "zeros", *["mixed"] * 5)


class KilledError(BaseException):
    """What nobody catches."""


class Interrupted(disk.Disk):
    """Raises `fault` at the `at`-th operation (every later one too, where it is a kill)."""

    def __init__(self, at: int, fault: BaseException) -> None:
        self.at, self.fault, self.count = at, fault, 0


def _interrupt(name: str) -> None:
    real = getattr(disk.Disk, name)

    def operation(self: Interrupted, *args: Any) -> Any:
        self.count += 1
        is_killed = isinstance(self.fault, KilledError) and self.count > self.at
        if self.count == self.at or is_killed:
            raise self.fault
        return real(self, *args)

    setattr(Interrupted, name, operation)


for _name in [name for name in vars(disk.Disk) if not name.startswith("_")]:
    _interrupt(_name)


def write_one(folder: Path) -> None:
    disk.replace_file(folder / "file", NEW)
    disk.sync_folder(folder)


def write_two(folder: Path) -> None:
    """One file durably by itself, the other as a library would write it: not synced."""
    with disk.atomic_folder(folder / "set") as new:
        disk.write_file(new / "a", [NEW, NEW])
        disk.make_folder(new / "below")
        file = disk._NewFile(new / "below/b")
        file.write(NEW)
        file.close()


def found(folder: Path) -> dict[str, bytes]:
    """Files by the names that readers look for, with their content."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    is_temporary = {name: name.startswith(".tmp-") or name.endswith(".tmp") for name in names}
    return {n: p.read_bytes() for n, p in names.items() if p.is_file() and not is_temporary[n]}


WRITERS: dict[str, tuple[Callable[[Path], None], dict[str, bytes], dict[str, bytes]]] = {
    "file": (write_one, {"file": OLD}, {"file": NEW}),
    "folder": (write_two, {}, {"set/a": NEW + NEW, "set/below/b": NEW}),
}


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Any:
    return WRITERS[request.param]


def begin(folder: Path, before: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in before.items():
        (folder / name).write_bytes(content)


def count_operations(tmp_path: Path, writer: Any) -> int:
    write, before, _ = writer
    begin(tmp_path / "count", before)
    counting = Interrupted(0, OSError())
    with used(counting):
        write(tmp_path / "count")
    return counting.count


@contextmanager
def used(instead: disk.Disk) -> Iterator[None]:
    usual = disk.use(instead)
    try:
        yield
    finally:
        disk.use(usual)


@pytest.mark.parametrize("fault", [KilledError(), OSError(5, "Input/output error")], ids=str)
def test_killed_or_refused_at_any_operation_it_is_there_whole_or_not_at_all(
    tmp_path: Path, writer: Any, fault: BaseException
) -> None:
    write, before, after = writer
    for at in range(1, count_operations(tmp_path, writer) + 1):
        folder = tmp_path / str(at)
        begin(folder, before)
        with used(Interrupted(at, fault)), suppress(type(fault)):
            write(folder)
        assert found(folder) in (before, after), at
        if found(folder) == before:
            write(folder)  # what a killed call left is not in the way
        assert found(folder) == after


def test_an_error_leaves_nothing_behind(tmp_path: Path, writer: Any) -> None:
    write, before, _ = writer

    class Full(disk.Disk):
        def write(self, descriptor: int, data: memoryview) -> int:
            raise OSError(28, "No space left on device")

    begin(tmp_path / "run", before)
    with used(Full()), pytest.raises(OSError, match="No space"):
        write(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(before)


def test_a_power_cut_at_any_time_leaves_all_or_nothing(tmp_path: Path, writer: Any) -> None:
    write, before, after = writer
    recorder, rng = Recorder(), random.Random(0)
    recorder.make_folder(tmp_path / "run")
    recorder.sync_folder(tmp_path)
    for name, content in before.items():
        descriptor = recorder.create(tmp_path / "run" / name)
        recorder.write(descriptor, memoryview(content))
        recorder.sync(descriptor)
        recorder.close(descriptor)
    recorder.sync_folder(tmp_path / "run")
    begun = len(recorder.notes)
    with used(recorder):
        write(tmp_path / "run")
    for length in range(begun, len(recorder.notes) + 1):
        for mode in MODES:
            target = tmp_path / f"after-{length}"
            write_out(rebuild(recorder.notes[:length], tmp_path), target, rng, mode)
            states = [after] if length == len(recorder.notes) else [before, after]
            assert found(target / "run") in states, (length, mode)
            shutil.rmtree(target)


def test_a_folder_is_not_made_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(OSError, match=r"exists|Not a directory"):
            disk.make_folder(path)
    disk.make_folder(tmp_path / "a/b")
    disk.make_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()


def test_a_leftover_that_is_a_link_is_removed_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (tmp_path / ".tmp-set").symlink_to(outside)
    with disk.atomic_folder(tmp_path / "set") as new:
        (new / "a").touch()
    assert (outside / "precious").exists()
    assert not (tmp_path / ".tmp-set").is_symlink()
    assert (tmp_path / "set/a").exists()
