"""Where reports go, checked before there is any work."""

from pathlib import Path
from tempfile import TemporaryFile

from tensorlm.runtime.errors import UserError


def check_output(folder: Path) -> None:
    """Raise UserError unless the folder can be made, or written to."""
    problem = _problem(folder)
    if problem:
        raise UserError(
            f"{folder}: cannot be written ({problem}; choose another folder with --output)"
        )


def is_writable(folder: Path) -> bool:
    """Whether the folder can be made, or written to."""
    return _problem(folder) is None


def _problem(folder: Path) -> str | None:
    """Why the system does not let us write there."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror
