"""Command-line parsing and checks that several commands share."""

import argparse
from pathlib import Path

from .errors import UserError


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; settings (`overrides`) may appear anywhere after their command.

    (`parse_intermixed_args` does not support parsers with sub-commands.)
    """
    args, rest = parser.parse_known_args()
    takes_settings = hasattr(args, "overrides")
    wrong = [word for word in rest if word.startswith("-") or not takes_settings]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if takes_settings:
        args.overrides = [*args.overrides, *rest]
    return args


def parse_lengths(text: str) -> list[int]:
    """Numbers of tokens from `--lengths`.

    Raises:
        UserError: a part is not an integer above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UserError(
            f"--lengths: must be integers above 0 with commas between them, got {text} (like "
            "32768,131072)"
        )
    return [int(part) for part in parts]


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError if one of these numbers is given and is not above 0."""
    for name in names:
        number = getattr(args, name)
        if number is not None and number <= 0:
            raise UserError(f"--{name.replace('_', '-')}: must be above 0, got {number}")


def check_plot(path: Path | None) -> None:
    """Raise UserError, before anything is measured, unless `path` ends in .png."""
    if path is not None and path.suffix != ".png":
        raise UserError(f"--plot: must end in .png, got {path}")
