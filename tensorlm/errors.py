"""What a user did wrong, in one line each; how a launcher reports it and leaves."""

import os
import sys
import time
from collections.abc import Callable

EXIT_DONE = 0
EXIT_USER_ERROR = 2
EXIT_INTERNAL = 70
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


class UserError(Exception):
    """A mistake that its reader can correct: `where: what (fix)`, one line per problem."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class MachineError(UserError):
    """Not the user's mistake: a rank computes wrongly. Told the same way, with another code."""

    exit_code = EXIT_INTERNAL


def run_launcher(main: Callable[[], int | None], *, leave_at_once: bool = False) -> None:
    """Run `main` and exit with its code; a UserError becomes one `error:` line per problem.

    Ctrl-C is one line, too.

    `leave_at_once` is for ranks of a process group that are done with one another: gloo's threads
    may abort a process that is taken down piece by piece after its work is done.
    """
    try:
        code = main()
    except (UserError, OSError) as caught:
        error = caught if isinstance(caught, UserError) else _file_error(caught)
        if _is_first_rank():
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr, flush=True)
        else:
            # Every rank meets the same error and rank 0 tells it. Launchers end all ranks when one
            # has left, so the silent ones give it time to speak.
            time.sleep(2)
        code = error.exit_code
    except KeyboardInterrupt:
        if _is_first_rank():
            print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    if leave_at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        if "mpi4py.MPI" in sys.modules:
            sys.modules["mpi4py.MPI"].Finalize()
        os._exit(code or EXIT_DONE)
    sys.exit(code or EXIT_DONE)


def _file_error(error: OSError) -> UserError:
    """Of a file that cannot be used, as a user's mistake; any other error of the system goes on."""
    if error.filename is None:
        raise error
    return UserError(f"{error.filename}: {error.strerror}")


def _is_first_rank() -> bool:
    from .launch_env import launched_rank  # which raises UserError itself

    try:
        return launched_rank() == 0
    except UserError:  # told by every rank that cannot say which it is
        return True
