"""All settings as Markdown: `python -m tensorlm.config.settings_table`."""

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .schema import Config


def settings_table() -> str:
    """One table per section of the configuration, one row per setting."""
    return "\n".join(line for name in Config.model_fields for line in _section(name))


def _section(name: str) -> Iterator[str]:
    section: Any = Config.model_fields[name].annotation
    yield f"## [{name}]\n\n{section.__doc__}\n"
    yield "| setting | type or values | default | meaning |\n|---|---|---|---|"
    for key, info in section.model_fields.items():
        default = "" if info.is_required() else f"`{_toml(info.default)}`"
        yield f"| `{key}` | {_kind(info)} | {default} | {_text(info)} |"
        for inner in _inner(info):
            for inner_key, part in inner.model_fields.items():
                value = "" if part.is_required() else f"`{_toml(part.default)}`"
                what = f"| `{key}`: `{inner_key}` | {_kind(part)} | {value} | "
                yield f"{what}{_text(part)} |"
    yield ""


def _inner(info: FieldInfo) -> list[Any]:
    """Section classes nested in a setting, directly or in a list."""
    kinds = [info.annotation, *get_args(info.annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _kind(info: FieldInfo) -> str:
    """The type of a setting in one word, or its choices."""
    kind: Any = info.annotation
    if get_origin(kind) is tuple:
        items = get_args(get_args(kind)[0])
        named = bool(items) and all(isinstance(item, str) for item in items)
        return "tables" if _inner(info) else f"list of {', '.join(items)}" if named else "list"
    if _inner(info):
        return "table"
    choices = [str(choice) for choice in get_args(kind) if choice is not type(None)]
    if choices and all(isinstance(choice, str | int) for choice in get_args(kind)):
        return ", ".join(choices)
    return {int: "integer", float: "number", bool: "true, false", str: "text"}.get(kind, "list")


def _text(info: FieldInfo) -> str:
    return " ".join((info.description or "").split()).replace("()", "`[]`")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return "none" if value is None else f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    print(settings_table())
