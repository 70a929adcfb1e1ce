"""How a launcher ends: its exit code, and who among the ranks says why."""

import errno
import os
import select
import sys
import time
import traceback
from collections.abc import Callable

from .errors import (
    EXIT_BROKEN_PIPE,
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    UserError,
)

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
_PATIENCE_SECONDS = 2.0


def run_launcher(
    main: Callable[[], int | None],
    *,
    leave_at_once: bool = False,
    is_told: Callable[[], bool] = lambda: False,
) -> None:
    """Run `main` and exit with its code; a UserError becomes one `error:` line per problem.

    Ctrl-C is one line, too.

    `leave_at_once` is for ranks of a process group that are done with one another: gloo's threads
    may abort a process that is taken down piece by piece after its work is done, and after an error
    that may take for ever. `is_told` is whether another rank has already said why all end.
    """
    try:
        _check_arguments(sys.argv[1:])
        code = main()
        sys.stdout.flush()
    except Exception as caught:
        error = _user_error(caught)
        if isinstance(caught, BrokenPipeError) and _has_nobody_to_tell():
            code = EXIT_BROKEN_PIPE
        elif error is not None:
            _tell(error, is_told)
            code = error.exit_code
        elif leave_at_once:
            # Perhaps it is only that another rank has left, and this one is about to be ended, too.
            time.sleep(_PATIENCE_SECONDS)
            traceback.print_exc()
            code = EXIT_CRASH
        else:
            raise
    except KeyboardInterrupt:
        if _launched_rank() == 0:
            print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    if leave_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        if "mpi4py.MPI" in sys.modules and code in (None, EXIT_DONE, EXIT_PREEMPTED):
            sys.modules["mpi4py.MPI"].Finalize()  # waits for the others, who may not come otherwise
        os._exit(code or EXIT_DONE)
    sys.exit(code or EXIT_DONE)


def _check_arguments(words: list[str]) -> None:
    """Raise UserError unless the command line is UTF-8, as all output and all files are."""
    option = "command line"
    for word in words:
        shown = word.encode(errors="surrogateescape").decode(errors="backslashreplace")
        if word.startswith("--") or "=" in word:  # an option, or a setting
            option = shown.partition("=")[0]
        if shown != word:
            fix = "correct it, or rename the file"
            raise UserError(f"{option}: must be UTF-8, got {shown} ({fix})")


def _has_nobody_to_tell() -> bool:
    """Whether the reader of the output has left, as `head` does; what else is said is dropped."""
    output = select.poll()
    output.register(1, 0)  # an error is reported unasked
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def _user_error(error: Exception) -> UserError | None:
    """Of a file or disk that cannot be used, as a user's mistake; None of any other error."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:  # met while writing
        return UserError(f"disk: {error.strerror} (look at the one of run.dir, and at its quota)")
    return None


def _tell(error: UserError, is_told: Callable[[], bool]) -> None:
    """Rank 0 speaks. The others meet the same error, as a rule, and are silent then."""
    rank = _launched_rank()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while rank and time.monotonic() < deadline and not is_told():
        time.sleep(0.05)  # launchers end all ranks when one has left: rank 0 must be the first
    if rank and is_told():
        return
    for problem in error.problems:
        print(f"error: {f'rank {rank}: ' if rank else ''}{problem}", file=sys.stderr, flush=True)


def _launched_rank() -> int:
    from .launch_env import launched_rank  # which raises UserError itself

    try:
        return launched_rank()
    except UserError:  # told by every rank that cannot say which it is
        return 0
