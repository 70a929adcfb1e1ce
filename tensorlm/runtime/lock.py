"""Locks against two processes writing to the same place, on one machine or several."""

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from . import disk
from .errors import UserError
from .launch_env import slurm_job

PATIENCE_SECONDS = 3.0


def take_lock(path: Path, where: str, patience: float = PATIENCE_SECONDS) -> int:
    """Lock the file `path` for this process; the lock ends with the process in any case.

    A later start of the same Slurm job takes the lock over, since the earlier node may be gone.

    Args:
        path: lock file; created if it does not exist. It records which process holds the lock.
        where: setting or option with its value, for the error message.
        patience: seconds to wait for a holder that is about to end.

    Returns:
        The descriptor that holds the lock.

    Raises:
        UserError: another process holds it; the message names it.
        OSError: the file cannot be written.
    """
    job, restarts = slurm_job()
    try:
        descriptor = _lock(path, patience)
    except BlockingIOError:
        holder = path.read_bytes()[:200].decode(errors="replace").strip()
        earlier = re.match(r"job (\S+) restart (\d+) ", holder)
        if not earlier or earlier[1] != job or int(earlier[2]) >= restarts:
            raise UserError(
                f"{where} is in use by {holder} (wait for it, or choose another)"
            ) from None
        # A lost node holds the lock until the file system notices. Replace the file to own it.
        new = path.with_name(f".{path.name}")
        descriptor = _lock(new, patience)
        os.rename(new, path)
    owner = f"pid {os.getpid()} on {socket.gethostname()}\n"
    os.ftruncate(descriptor, 0)
    os.write(descriptor, (f"job {job} restart {restarts} {owner}" if job else owner).encode())
    return descriptor


@contextmanager
def locked(path: Path, where: str) -> Iterator[None]:
    """Hold the lock file `path` in the body, and remove it afterwards.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be written.
    """
    descriptor = take_lock(path, where)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def _lock(path: Path, patience: float) -> int:
    """Open and lock `path`; returns the descriptor.

    Waits for `patience` seconds: a child that a killed holder was starting may briefly hold it.
    """
    deadline = time.monotonic() + patience
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):  # else a holder removed it after it was opened here
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                os.close(descriptor)
                raise
            print(f"warning: {path.parent}: this file system does not support locks", flush=True)
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


_LOCK = "lock"


def lock_run(run_dir: Path) -> int:
    """Make this process the only writer of a run, until it ends.

    Returns:
        The descriptor that holds the lock.

    Raises:
        UserError: another job or process holds it, or the folder cannot be written.
    """
    try:
        disk.make_folder(run_dir)
        return take_lock(run_dir / _LOCK, f"run.dir: {run_dir}", PATIENCE_SECONDS)
    except OSError as error:
        raise UserError(f"run.dir: {error.filename or run_dir}: {error.strerror}") from None
