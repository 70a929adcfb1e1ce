"""Reading a configuration: a TOML file plus `key.sub=value` overrides, checked as a whole."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from tensorlm.runtime.errors import UserError

from .schema import Config
from .settings_errors import check_settings

SETTINGS = "config.toml"  # in the run's folder: the settings of the newest start


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int = 0) -> Config:
    """Read a TOML file, apply `key.sub=value` overrides, and check the result.

    Args:
        path: the file.
        overrides: settings that replace those of the file.
        world_size: number of ranks that must be able to share the work (0: not checked).

    Raises:
        UserError: one line per problem (unreadable file, unknown key, wrong value, contradiction).
    """
    tree, file = read_tree(path), read_tree(path)
    problems: list[str] = []
    for override in overrides:
        try:
            apply_override(tree, override)
        except UserError as error:
            problems += error.problems

    def check(config: Config) -> None:
        if world_size:
            config.check_world(world_size)

    return check_settings(Config, tree, str(path), base=file, check=check, problems=problems)


def read_tree(path: str | Path) -> dict[str, Any]:
    """Read the plain values of a TOML file, unchecked.

    Raises:
        UserError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Check a tree of plain values, from TOML or a checkpoint's manifest; `where` names it."""
    return check_settings(Config, tree, where, base={}, check=lambda _: None, problems=[])


def config_toml(config: Config) -> str:
    """The whole resolved configuration as TOML, defaults included; `load_config` reads it back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in `tree`; a value that is not valid TOML is a plain string."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{override}: must have the form key.sub=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"{override}: {part} is a value, not a section")
    tree[parts[-1]] = value
