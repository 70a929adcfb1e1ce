"""Durable and atomic changes to files and folders.

Files and folders get their names when they are complete: `AtomicFile`, `replace_file`,
`atomic_folder`. `Disk` has one method per system call. Tests replace it (`use`) by one that kills
the process at the n-th call, makes that call fail, or records what a power cut would lose.
"""

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


class Disk:
    """The system calls behind this module."""

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Create a file and return its descriptor; fail if the path exists, also as a link."""
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
    """Create a folder and its missing parents, durably; do nothing if it exists.

    Raises:
        OSError: the folder cannot be created, or its name belongs to something else.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        _disk.make_folder(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    _disk.sync_folder(path.parent)


class _NewFile:
    """A new file that is counted and hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self._size, self._digest = 0, hashlib.sha256()
        self._descriptor = _disk.create(path)

    def write(
        self, part: bytes | memoryview, progress: Callable[[int], object] = lambda num_bytes: None
    ) -> None:
        """Append all of `part`; `progress` is called with the number of bytes just written."""
        data = memoryview(part).cast("B")
        self._digest.update(data)
        self._size += len(data)
        while data:
            num_written = _disk.write(self._descriptor, data)
            data = data[num_written:]
            progress(num_written)

    def finish(self) -> tuple[int, str]:
        """Sync the content to disk (fsync) and close the file; returns size and sha256."""
        _disk.sync(self._descriptor)
        self.close()
        return self._size, self._digest.hexdigest()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            _disk.close(descriptor)


class AtomicFile(_NewFile):
    """A file that is written under a temporary name and renamed when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        super().__init__(self._temporary)

    def publish(self) -> tuple[int, str]:
        """Rename to `path`, replacing an older file; returns size and sha256."""
        size_and_digest = self.finish()
        _disk.rename(self._temporary, self.path)
        return size_and_digest

    def discard(self) -> None:
        """Remove the temporary file (after `publish`, this does nothing)."""
        for step in (self.close, lambda: _disk.unlink(self._temporary)):
            with contextlib.suppress(OSError):
                step()


def write_file(
    path: Path,
    parts: Iterable[bytes | memoryview],
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> tuple[int, str]:
    """Write a new file and sync it to disk (fsync); returns its size and sha256.

    The folder's entry for the file is durable only after `sync_folder`. `progress` is called with
    the number of bytes just written.
    """
    file = _NewFile(path)
    try:
        for part in parts:
            file.write(part, progress)
        return file.finish()
    finally:
        file.close()


def replace_file(path: Path, content: bytes) -> tuple[int, str]:
    """Write a small file atomically (`AtomicFile`); returns its size and sha256."""
    file = AtomicFile(path)
    try:
        file.write(content)
        return file.publish()
    finally:
        file.discard()


def temporary_folder(target: Path) -> Path:
    """Temporary name of the folder `target` while it is filled."""
    return target.with_name(f".tmp-{target.name}")


def start_folder(target: Path) -> Path:
    """Create an empty `temporary_folder`; removes one that a killed writer left."""
    temporary = temporary_folder(target)
    make_folder(target.parent)
    if os.path.lexists(temporary):
        remove_tree(temporary)
    make_folder(temporary)
    return temporary


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill. After the body it is renamed to `target`; on an error it is removed.

    Raises:
        OSError: an operation failed. If it was the final rename (`filename2` is set), the complete
            folder remains under its temporary name.
    """
    temporary = start_folder(target)
    try:
        yield temporary
        _sync_tree(temporary)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(temporary)
        raise
    rename(temporary, target)


def _sync_tree(folder: Path) -> None:
    """Make everything in a folder durable, whichever library wrote it."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _disk.sync_folder(path)
        else:
            with open(path, "rb") as file:
                _disk.sync(file.fileno())
    _disk.sync_folder(folder)


def rename(old: Path, new: Path) -> None:
    """Rename within one folder, durably."""
    _disk.rename(old, new)
    _disk.sync_folder(new.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    _disk.sync_folder(path)


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it; links are removed, never followed."""
    if path.is_symlink():
        _disk.unlink(path)
        return
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
        OSError: the file cannot be read, or is a link, a pipe or a device.
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
