"""All changes to the disk that a run must be able to survive.

`Disk` is the operating system, with one method per system call. Tests replace it with `use`, by one
that kills the process at the n-th call, makes that call fail, or records what a power cut would
lose.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path


class Disk:
    """The system calls behind this module."""

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Create a file and return its descriptor; fail if the path exists, as a link too."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write `data` and return the number of bytes written, which may be fewer."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)


_disk = Disk()


def use(disk: Disk) -> Disk:
    """Use `disk` for all calls from now on; returns the one used before."""
    global _disk
    previous, _disk = _disk, disk
    return previous


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, durably; do nothing if it exists."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        _disk.make_folder(path)
    _disk.sync_folder(path.parent)


def write_file(
    path: Path,
    parts: Iterable[bytes | memoryview],
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> tuple[int, str]:
    """Write a new file through to the disk (fsync); returns its size and sha256.

    The folder's entry for the file is durable only after `sync_folder`. `progress` is called with
    the number of bytes just written.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = _disk.create(path)
    try:
        for part in parts:
            data = memoryview(part).cast("B")
            digest.update(data)
            size += len(data)
            while data:
                num_written = _disk.write(descriptor, data)
                data = data[num_written:]
                progress(num_written)
        _disk.sync(descriptor)
    finally:
        _disk.close(descriptor)
    return size, digest.hexdigest()


def rename(old: Path, new: Path) -> None:
    """Rename within one folder, durably."""
    _disk.rename(old, new)
    _disk.sync_folder(new.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    _disk.sync_folder(path)


def remove_tree(path: Path) -> None:
    """Remove a folder with everything in it; links are removed, never followed."""
    with os.scandir(path) as entries:
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                remove_tree(Path(entry.path))
            else:
                _disk.unlink(Path(entry.path))
    _disk.remove_folder(path)


def file_sha256(
    path: Path, progress: Callable[[int], object] = lambda num_bytes: None
) -> tuple[int, str]:
    """Size and sha256 of a regular file; `progress` is called with the number of bytes just read.

    Raises:
        OSError: it cannot be read, or is a link, a pipe or a device.
    """
    # Without O_NONBLOCK, opening a pipe would wait forever for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a regular file", str(path))
        digest, size = hashlib.sha256(), 0
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
            progress(len(chunk))
    return size, digest.hexdigest()
