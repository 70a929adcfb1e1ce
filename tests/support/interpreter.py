"""Triton's interpreter without what it does again and again: a third of its time."""

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def speed_up_interpreter() -> None:
    """Prepare `triton.language` once per launch, not in every call that a kernel makes."""
    prepare: Callable[[Any], Any] = interpreter._patch_lang
    prepared: set[frozenset[int]] = set()  # in the launch that is running

    def prepare_once(function: Any) -> Any:
        values = function.__globals__.values()
        modules = frozenset(id(value) for value in values if value is tl or value is tl.core)
        if modules in prepared:
            return interpreter._LangPatchScope()
        scope = prepare(function)
        prepared.add(modules)
        restore = scope.restore

        def end_of_launch() -> None:
            prepared.clear()
            restore()

        scope.restore = end_of_launch
        return scope

    interpreter._patch_lang = prepare_once
