"""Finding the field with a document's text in a record or table, at the top level or nested.

`meta.text` means the field named `meta.text` if it exists, else the field `text` inside `meta`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from .input_errors import InputError

_MOST_NAMED = 20


def schema_tree(schema: pa.Schema | pa.StructType) -> dict[str, Any]:
    """The fields of a table as nested dicts, with types as leaves."""
    tree: dict[str, Any] = {}
    for field in schema:
        inner = schema_tree(field.type) if pa.types.is_struct(field.type) else field.type
        tree.setdefault(field.name, inner)  # if a name occurs twice, the first field counts
    return tree


def locate(tree: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """The keys that lead to field `name` of nested dicts; None if it does not exist."""
    if name in tree:
        return (name,)
    for dot in (index for index, character in enumerate(name) if character == "."):
        inner = tree.get(name[:dot])
        rest = locate(inner, name[dot + 1 :]) if isinstance(inner, Mapping) else None
        if rest is not None:
            return (name[:dot], *rest)
    return None


def locate_column(schema: pa.Schema, name: str) -> tuple[str, ...]:
    """The names that lead to column `name` of a table.

    Raises:
        InputError: it does not exist; the message lists the columns with text.
    """
    tree = schema_tree(schema)
    path = locate(tree, name)
    if path is None:
        raise _missing(name, _text_fields(tree, _is_text_type))
    return path


def value_of(record: Any, name: str) -> Any:
    """The value of field `name` of a record (a dict, else it has no fields).

    Raises:
        InputError: it does not exist; the message lists the fields with text.
    """
    fields = record if isinstance(record, dict) else {}
    path = locate(fields, name)
    if path is None:
        raise _missing(name, _text_fields(fields, _is_text))
    return inner_value(record, path)


def inner_value(value: Any, path: tuple[str, ...]) -> Any:
    """The value at `path`; None if a value on the path is None."""
    for key in path:
        value = None if value is None else value[key]
    return value


def not_text(value: Any, name: str) -> InputError:
    """The error for a field whose value is not text; lists the texts inside the value."""
    inside = (f"{name}.{inner}" for inner in _text_fields(value, _is_text)) if value else iter(())
    has = f"has {names}; " if (names := _listed(inside)) else ""
    return InputError(
        f"field {name!r} must be text, got {_kind_of(value)}",
        f"{has}{{field}}, or remove the record",
    )


def _missing(name: str, there: Iterator[str]) -> InputError:
    return InputError(
        f"must have a field {name!r}", f"text fields: {_listed(there) or 'none'}; {{field}}"
    )


def _listed(names: Iterator[str]) -> str:
    shown = list(itertools.islice(names, _MOST_NAMED + 1))
    return ", ".join([*shown[:_MOST_NAMED], *(["..."] if len(shown) > _MOST_NAMED else [])])


def _text_fields(tree: Any, is_text: Callable[[Any], bool]) -> Iterator[str]:
    """Names of the fields with text, in order; nested names have dots."""
    pending = [("", tree)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Mapping):
            prefix = f"{name}." if name else ""
            pending += [(f"{prefix}{key}", value[key]) for key in reversed(value)]
        elif is_text(value):
            yield name


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_type(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", bytes: "bytes", type(None): "null"}
    return names.get(type(value), repr(value)[:40])
