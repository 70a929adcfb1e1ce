"""Where reports go, checked before there is any work."""

from pathlib import Path
from tempfile import TemporaryFile

from tensorlm.errors import UserError


def check_output(folder: Path) -> None:
    """Raise UserError unless the folder can be made, or written to."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}; choose another folder with --output)"
        ) from None
