"""Errors of inputs: the problem and its fix, on one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa

from tensorlm.runtime.errors import UserError


class Advice(NamedTuple):
    """Fixes for the user of an input, in terms of the command that reads it.

    field: choose another text field; skip: skip this file; larger: allow longer documents.
    """

    field: str = "choose --text-field"
    skip: str = "skip it with --exclude"
    larger: str = "raise --max-document-bytes"


PREPARE = Advice()  # of launcher/prepare_data.py


class InputError(Exception):
    """A problem of one input, and its fix, in which `{skip}` stands for `Advice.skip`."""

    def __init__(self, problem: str, fix: str = "fix it, or {skip}") -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix


@contextmanager
def problems_named(source: str, kind: str = "", advice: Advice = PREPARE) -> Iterator[None]:
    """Turn errors while `source` is read (as `kind`) into one line that names it.

    Raises:
        UserError: on an InputError, or an error of reading a file.
    """
    try:
        yield
    except InputError as error:
        problem, fix = error.problem, error.fix
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f"cannot be read{f' as {kind}' if kind else ''}: {reason}"
        fix = "fix it, or {skip}"
    else:
        return
    for name, words in advice._asdict().items():
        fix = fix.replace(f"{{{name}}}", words)
    raise UserError(f"{source}: {problem} ({fix})")
