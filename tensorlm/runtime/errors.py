"""What a user did wrong, in one line each; how a launcher reports it and leaves."""

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER_ERROR = 2
EXIT_INTERNAL = 70
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class UserError(Exception):
    """A mistake that its reader can correct: `where: what (fix)`, one line per problem."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class MachineError(UserError):
    """Not the user's mistake: a rank computes wrongly. Told the same way, with another code."""

    exit_code = EXIT_INTERNAL
