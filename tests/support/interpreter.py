"""Triton's interpreter without what it does again and again: a fraction of its time.

Every result keeps its bits: only the work around the arithmetic is done once, or on whole arrays.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_Change = tuple[object, str, object]


def speed_up_interpreter() -> None:
    """Replace what the interpreter repeats; call it once, before any kernel runs."""
    interpreter._patch_lang = _remembered_patches(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered_dtypes(interpreter._get_np_dtype)
    interpreter.ReduceOps.apply_impl = _reduce_whole_arrays(interpreter.ReduceOps.apply_impl)
    tl.tensor.__init__ = _with_remembered_shape(tl.tensor.__init__)
    tl.block_type.__init__ = _remembered_type(tl.block_type.__init__)
    broadcast = TritonSemantic.broadcast_impl_value
    TritonSemantic.broadcast_impl_value = _only_to_another_shape(broadcast)


def _remembered_patches(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_patch_lang`, which replaces the functions of `triton.language`: once in a launch.

    It looks all of them up for each launch and each call that a kernel makes; what they are
    replaced by is always the same.
    """
    # In the launch that is running: what has been replaced already, by the modules that a kernel
    # can see.
    prepared: set[frozenset[int]] = set()
    replacements: dict[tuple[frozenset[int], frozenset[frozenset[int]]], list[_Change]] = {}

    def prepare_once(function: Any) -> Any:
        values = function.__globals__.values()
        modules = frozenset(id(value) for value in values if value is tl or value is tl.core)
        if modules in prepared:
            return interpreter._LangPatchScope()
        key = modules, frozenset(prepared)
        if key in replacements:
            scope = interpreter._LangPatchScope()
            for change in replacements[key]:
                scope.set_attr(*change)
        else:
            scope = prepare(function)
            names = [(owner, name) for owner, name, _ in scope._changes]
            replacements[key] = [(owner, name, vars(owner)[name]) for owner, name in names]
        prepared.add(modules)
        restore = scope.restore

        def end_of_launch() -> None:
            prepared.clear()
            restore()

        scope.restore = end_of_launch
        return scope

    return prepare_once


def _remembered_dtypes(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_get_np_dtype`, which builds a table of all types for each of its calls."""
    known: dict[str, Any] = {}

    def dtype_of(triton_type: Any) -> Any:
        element = triton_type.element_ty if triton_type.is_block() else triton_type
        if element.name not in known:
            known[element.name] = find(triton_type)
        return known[element.name]

    return dtype_of


def _reduce_whole_arrays(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`ReduceOps.apply_impl`, which takes all reductions but sums and extrema element by element.

    `tl.sort` is made of exclusive ors.
    """

    def reduce(self: Any, tensors: Any) -> Any:
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return apply(self, tensors)
        (tensor,) = tensors
        data = tensor.handle.data
        found = np.bitwise_xor.reduce(data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(found, tensor.dtype)

    return reduce


def _with_remembered_shape(create: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__`, which wraps each size of its shape anew for every result."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def create_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in known:
            create(self, handle, type)
            known[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[sizes]

    return create_tensor


def _remembered_type(create: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__`, which checks its shape and writes its name anew for every result."""
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def create_type(self: Any, element: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        key = element.name, sizes
        if key not in known:
            create(self, element, shape)
            known[key] = {**vars(self), "sizes": sizes}
        vars(self).update(known[key], element_ty=element)

    return create_type


def _only_to_another_shape(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """`broadcast_impl_value`, which compares two equal shapes size by size."""

    def broadcast_pair(self: Any, left: Any, right: Any) -> Any:
        first, second = (getattr(x.type, "sizes", None) for x in (left, right))
        if first is not None and first == second:
            return left, right
        return broadcast(self, left, right)

    return broadcast_pair
