"""Errors that are reported to the user on one line each, and the exit codes."""

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_INTERNAL = 70
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the convention of shells
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class UserError(Exception):
    """A mistake that the user can correct: `where: what (fix)`, one line per problem."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class MachineError(UserError):
    """A rank computes wrong results. Reported like a UserError, with another exit code."""

    exit_code = EXIT_INTERNAL


def first_line(error: Exception) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
