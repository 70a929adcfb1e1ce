"""Command-line parsing and checks that several commands share."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .errors import EXIT_USER_ERROR, UserError
from .strict_json import json_text

# Argparse's messages, and ours.
_WORDS = {
    r"^argument ([^:]+): invalid int value: '(.*)'$": r"\1: must be an integer, got \2",
    r"^argument ([^:]+): invalid float value: '(.*)'$": r"\1: must be a number, got \2",
    r"^argument ([^:]+): invalid choice: '(.*)' \((?:choose from )?(.*)\)$": (
        r"\1: must be one of \3, got \2"
    ),
    r"^argument ([^:]+): expected .*$": r"\1: must have a value, got none",
    r"^argument ([^:]+): not allowed with argument (.*)$": r"\1: must not be given with \2",
    r"^the following arguments are required: (.*)$": r"\1: missing (see --help)",
    r"^(unrecognized arguments: .*)$": r"\1 (see --help)",
}


class Parser(argparse.ArgumentParser):
    """Reports a mistake on one line, like every other error of a command."""

    def error(self, message: str) -> NoReturn:
        for theirs, ours in _WORDS.items():
            message = re.sub(theirs, ours, message)
        self.exit(EXIT_USER_ERROR, f"error: {message}\n")


class Option(NamedTuple):
    """An argument of a command: its help, and what argparse needs to know.

    The type is that of the default, or else that of the metavar (`_TYPES`); False makes a switch. A
    default that the help does not mention is added to it.
    """

    help: str
    default: Any = None
    required: bool = False
    nargs: str | None = None
    choices: Sequence[str] | None = None


class Settings(NamedTuple):
    """`--config` with its help, and settings that replace those of its file."""

    help: str = "TOML file of the run"
    required: bool = True


Options = Mapping[str, Option]
_FORMS = {int: ",", float: "g"}
_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("DATA", "DIR", "FILE", "FILE.png", "PATH", "RUN"), Path),
    **dict.fromkeys(("MEAN", "N", "RANKS", "STEP", "TOKENS"), int),
}

JSON: Options = {"--json FILE": Option("also write every number to this file")}
# The deepspeed launcher adds this option to the command line of each rank.
LOCAL_RANK: Options = {"--local_rank": Option(argparse.SUPPRESS)}


class Command(NamedTuple):
    """A sub-command: its help, its options, and its settings, if any."""

    help: str
    options: Options
    settings: Settings | None = None


def parse(
    description: str | None,
    options: Options,
    settings: Settings | None = None,
    alternatives: Options | None = None,
) -> argparse.Namespace:
    """Parse the arguments of this process; at most one of `alternatives` may be given."""
    parser = _parser(description)
    _add_settings(parser, settings)
    if alternatives:
        add_options(parser.add_mutually_exclusive_group(), alternatives)
    add_options(parser, options)
    return parse_args(parser)


def parse_command(
    description: str | None, commands: Mapping[str, Command], *, repeats_help: bool = False
) -> argparse.Namespace:
    """Parse the arguments of this process, first its sub-command; `command` is the name.

    Args:
        description: help above the list of sub-commands.
        commands: the sub-commands by name.
        repeats_help: whether the help of a sub-command begins with its line in the list.
    """
    parser = _parser(description)
    parsers = parser.add_subparsers(dest="command", required=True)
    for name, command in commands.items():
        text = command.help
        sentence = f"{text[0].upper()}{text[1:]}." if repeats_help else None
        of_command = parsers.add_parser(name, help=text, description=sentence)
        _add_settings(of_command, command.settings)
        add_options(of_command, command.options)
    return parse_args(parser)


def _parser(description: str | None) -> Parser:
    """A parser that keeps the line ends of a description with examples, which are indented."""
    has_examples = "\n  " in (description or "")
    form = argparse.RawDescriptionHelpFormatter if has_examples else argparse.HelpFormatter
    return Parser(description=description, formatter_class=form)


def add_options(parser: argparse._ActionsContainer, options: Options) -> None:
    """Add options by "--name METAVAR", or positional arguments by "name METAVAR"."""
    for names, option in options.items():
        name, _, metavar = names.partition(" ")
        text, default = option.help, option.default
        if default is False:
            parser.add_argument(name, action="store_true", help=text)
            continue
        if default not in (None, []) and "default: " not in text:
            shown = f"{default:{_FORMS.get(type(default), '')}}"
            text += f" (default: {shown})"
        kind = _TYPES.get(metavar) if isinstance(default, list | None) else type(default)
        given: dict[str, Any] = {"metavar": metavar or None, "required": option.required or None}
        given |= {"type": kind, "nargs": option.nargs, "choices": option.choices}
        given = {key: value for key, value in given.items() if value is not None}
        parser.add_argument(name, help=text, default=default, **given)


def _add_settings(parser: argparse.ArgumentParser, settings: Settings | None) -> None:
    if settings is None:
        return
    replacing = "settings that replace those of the file, such as train.steps=100"
    required = settings.required
    parser.add_argument("--config", metavar="FILE", help=settings.help, required=required)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help=replacing)


def write_json(path: Path | None, content: Any) -> None:
    """Write `content` to the file of `--json`, if one is given."""
    if path is not None:
        path.write_text(json_text(content, indent=1) + "\n")


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; settings (`overrides`) may appear anywhere after their command.

    argparse's own `parse_intermixed_args` does not support parsers with sub-commands.
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
