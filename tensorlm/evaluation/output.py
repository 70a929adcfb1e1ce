"""Checks of output folders before the work begins."""

from pathlib import Path
from tempfile import TemporaryFile

from tensorlm.runtime.errors import UserError


def check_output(folder: Path) -> None:
    """Raise UserError unless the folder can be created or written to."""
    problem = _problem(folder)
    if problem:
        raise UserError(
            f"{folder}: cannot be written ({problem}; choose another folder with --output)"
        )


def is_writable(folder: Path) -> bool:
    """Whether the folder can be created or written to."""
    return _problem(folder) is None


def _problem(folder: Path) -> str | None:
    """The reason why the folder cannot be written, or None."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror
