"""Finding all problems in a tree of settings, although one mistake may hide others.

Settings that depend on each other are compared only if each is valid by itself. So invalid settings
are reset, and the rest is checked again.
"""

import copy
import difflib
import json
import re
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from tensorlm.runtime.errors import UserError

ModelT = TypeVar("ModelT", bound=BaseModel)
Place = tuple[int | str, ...]
# Phrases in pydantic's messages, and ours.
_WORDS = {
    r"greater than or equal to": "at least",
    r"less than or equal to": "at most",
    r"greater than": "above",
    r"less than": "below",
    r"a valid integer.*": "an integer",
    r"a valid boolean.*": "true or false",
    r"a valid (tuple|list)": "a list",
    r"a valid dictionary.*": "a table",
    r"a valid ": "a ",
    r" after validation, not .*": "",
}


def check_settings(
    schema: type[ModelT],
    tree: dict[str, Any],
    where: str,
    *,
    base: dict[str, Any],
    check: Callable[[ModelT], None],
    problems: list[str],
) -> ModelT:
    """Make settings from plain values.

    Args:
        schema: the class of the settings.
        tree: the values.
        where: name of their source, for messages.
        base: values that replace invalid ones of `tree` while the rest is checked.
        check: further checks; raises UserError.
        problems: known problems of the same settings, one line each.

    Raises:
        UserError: one line for each problem, `problems` first.
    """
    lines, doubtful, seen = list(problems), set[str](), set[Place]()

    def add(found: list[str]) -> None:
        """Add new lines, except those that mention a reset setting: it may be the only cause."""
        words = [set(re.findall(r"\w+", line.removeprefix(where))) for line in found]
        lines.extend(
            line
            for line, named in zip(found, words, strict=True)
            if line not in lines and not named & doubtful
        )

    settings: ModelT | None = None
    tree = copy.deepcopy(tree)
    is_changed = True
    while settings is None and is_changed:
        try:
            settings = schema.model_validate(tree)
        except ValidationError as error:
            add(problem_lines(error, where, schema))
            places = {_there(tree, item["loc"]): None for item in error.errors()}
            if not any(item["loc"] for item in error.errors()):  # each section is valid by itself
                settings = _unchecked(schema, tree)
            reset = [_reset(tree, {} if place in seen else base, place, schema) for place in places]
            seen.update(places)
            doubtful.update(*reset)
            is_changed = any(reset)
    if settings is not None:
        try:
            check(settings)
        except UserError as error:
            add(list(error.problems))
        except ValidationError:  # raised by `check` on contradictory settings
            assert lines
    if lines or settings is None:
        raise UserError(*lines)
    return settings


def _unchecked(schema: type[ModelT], tree: dict[str, Any]) -> ModelT:
    """Settings with valid sections, without the checks across sections."""
    sections: dict[str, Any] = {
        name: schema.model_fields[name].annotation for name in tree if name in schema.model_fields
    }
    values = {name: section.model_validate(tree[name]) for name, section in sections.items()}
    return schema.model_construct(**values)


def problem_lines(
    error: ValidationError, where: str, schema: type[BaseModel] | None = None
) -> list[str]:
    """The problems that pydantic found, one line each.

    Args:
        error: the validation error.
        where: name of the file, for messages.
        schema: class of the settings; if given, each unknown key is shown with the closest valid
            key.
    """
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        prefix = f"{where}: {path}: " if path else f"{where}: "
        if item["type"] == "extra_forbidden":
            hint = _suggestion(schema, item["loc"]) if schema else ""
            lines.append(f"{prefix}unknown key{hint}")
        elif item["type"] == "missing":
            lines.append(f"{prefix}missing")
        elif item["type"] == "value_error":
            lines += [prefix + line for line in str(item["ctx"]["error"]).splitlines()]
        else:
            lines.append(prefix + _rule(item["msg"], item["input"]))
    return lines


def _rule(message: str, value: Any) -> str:
    """`must be ..., got ...`, from pydantic's `Input should be ...`; others stay as they are."""
    rule, is_rule = re.subn(r"^\w+ should ", "must ", message)
    for theirs, ours in _WORDS.items():
        rule = re.sub(theirs, ours, rule)
    got = json.dumps(value, default=str) if is_rule else ""
    return f"{rule}, got {got if len(got) <= 80 else f'{got[:77]}...'}" if is_rule else rule


def _suggestion(schema: type[BaseModel], place: Place) -> str:
    """` (did you mean ...?)` with the closest key of the same section, or all its keys."""
    keys = _keys_beside(schema, place)
    near = _nearest(str(place[-1]), keys)
    return f" (did you mean {near}?)" if near else f" (valid: {', '.join(keys)})"


def _nearest(key: str, keys: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, keys, n=1, cutoff=0.5)), None)


def _keys_beside(schema: type[BaseModel], place: Place) -> list[str]:
    """The valid keys of the section that holds a place."""
    section = schema
    for part in place[:-1]:
        if isinstance(part, int):  # an index in a list of sections
            continue
        annotation = section.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(section.model_fields)


def _reset(
    tree: dict[str, Any], base: dict[str, Any], place: Place, schema: type[BaseModel]
) -> set[str]:
    """Reset a place to its value in `base`, or remove it; returns the affected keys."""
    if not place or not _is_key(tree, place):
        return set()
    holder, other = _value(tree, place[:-1]), _value(base, place[:-1])
    key = place[-1]
    value, ours = holder.pop(key), other.get(key) if isinstance(other, dict) else None
    if ours is not None and ours != value:
        holder[key] = copy.deepcopy(ours)
    if isinstance(value, dict):
        before = ours if isinstance(ours, dict) and ours != value else {}
        return {name for name in value if value[name] != before.get(name)} or {str(key)}
    try:
        near = _nearest(str(key), _keys_beside(schema, place))
    except (KeyError, StopIteration):
        near = None
    return {str(key)} if near is None else {str(key), near}


def _there(tree: dict[str, Any], place: Place) -> Place:
    """The innermost existing key on the path to a place; a list counts as one value."""
    while place and not _is_key(tree, place):
        place = place[:-1]
    return place


def _is_key(tree: dict[str, Any], place: Place) -> bool:
    holder = _value(tree, place[:-1])
    return isinstance(holder, dict) and place[-1] in holder


def _value(tree: Any, place: Place) -> Any:
    """The value at a place; None if there is none."""
    for key in place:
        if isinstance(tree, list) and isinstance(key, int):
            tree = dict(enumerate(tree))
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree
