"""How a command ends: its exit code, and which rank reports the error."""

import errno
import os
import select
import sys
import time
import traceback
from collections.abc import Callable

from . import errors
from .errors import UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
_PATIENCE_SECONDS = 2.0


def run_launcher(
    main: Callable[[], int | None],
    *,
    leave_at_once: bool = False,
    is_told: Callable[[], bool] = lambda: False,
) -> None:
    """Run `main` and exit with its code; a UserError becomes one `error:` line per problem.

    Ctrl-C is reported on one line too.

    Args:
        main: the command; returns its exit code, or None for success.
        leave_at_once: end the process without Python's shutdown, for ranks of a process group:
            gloo's threads may abort a process that shuts down after its work is done, and after an
            error the shutdown may block forever.
        is_told: returns True if another rank has already reported why all ranks end.
    """
    try:
        _check_arguments(sys.argv[1:])
        code = main()
        sys.stdout.flush()
    except Exception as caught:
        error = _user_error(caught)
        if isinstance(caught, BrokenPipeError) and _has_nobody_to_tell():
            code = errors.EXIT_BROKEN_PIPE
        elif error is not None:
            _tell(error, is_told)
            code = error.exit_code
        elif leave_at_once:
            # Another rank may have left, and the launcher may be about to end this one too.
            time.sleep(_PATIENCE_SECONDS)
            traceback.print_exc()
            code = errors.EXIT_CRASH
        else:
            raise
    except KeyboardInterrupt:
        if _launched_rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        code = errors.EXIT_INTERRUPTED
    if leave_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        if "mpi4py.MPI" in sys.modules and code in (None, errors.EXIT_DONE, errors.EXIT_PREEMPTED):
            sys.modules["mpi4py.MPI"].Finalize()  # blocks until all ranks call it: not after errors
        os._exit(code or errors.EXIT_DONE)
    sys.exit(code or errors.EXIT_DONE)


def _check_arguments(words: list[str]) -> None:
    """Raise UserError unless the command line is UTF-8, like all output and all files."""
    option = "command line"
    for word in words:
        shown = word.encode(errors="surrogateescape").decode(errors="backslashreplace")
        if word.startswith("--") or "=" in word:  # an option, or a setting
            option = shown.partition("=")[0]
        if shown != word:
            fix = "correct it, or rename the file"
            raise UserError(f"{option}: must be UTF-8, got {shown} ({fix})")


def _has_nobody_to_tell() -> bool:
    """Whether the reader of stdout has left, as `head` does; if so, drop all further output."""
    output = select.poll()
    output.register(1, 0)  # an error is reported unasked
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _user_error(error: Exception) -> UserError | None:
    """`error` as a UserError if it is one, or if a file or disk cannot be used; else None."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:  # met while writing
        return UserError(f"disk: {error.strerror} (check the disk of run.dir and its quota)")
    return None


def _tell(error: UserError, is_told: Callable[[], bool]) -> None:
    """Print the error on rank 0. Other ranks usually meet the same error and stay silent."""
    rank = _launched_rank()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while rank and time.monotonic() < deadline and not is_told():
        time.sleep(0.05)  # launchers end all ranks when one has left: rank 0 must report first
    if rank and is_told():
        return
    for problem in error.problems:
        print(f"error: {f'rank {rank}: ' if rank else ''}{problem}", file=sys.stderr, flush=True)


def _launched_rank() -> int:
    from .launch_env import launched_rank  # which raises UserError itself

    try:
        return launched_rank()
    except UserError:  # a rank that cannot tell which one it is reports the error itself
        return 0
