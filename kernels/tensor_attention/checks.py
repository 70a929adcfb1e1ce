"""Argument checks shared by all implementations of the operator.

Checks read shapes, dtypes and devices only, never values, so that they do not wait for the GPU or
break a compiled graph. The operator defines the meaning of values out of range
(`fold.document_reach`, `dense.hop`). Shape letters: B batch, T tokens, H query heads, K key heads,
D head size, E value size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .fold import Rotary, State, check_width

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_heads(
    q: Tensor, k: Tensor, values: Tensor, name: str, of_queries: bool, first: int | None = None
) -> None:
    """Raise ValueError unless q, k and values match.

    Args:
        q: [B, T, H, D].
        k: [B, T, K, D].
        values: [B, T, K, E], or [B, T, H, E] if `of_queries`.
        name: name of the values in messages.
        of_queries: whether each of the H query heads may have its own values.
        first: index in the row of k of the first query; None: the queries are the whole row.
    """
    if q.ndim != 4 or not q.shape[2] or not q.shape[3]:
        raise ValueError(f"q must be [B, T, H, D] with at least one head, got {list(q.shape)}")
    rows = q.shape[:2] if first is None else (q.shape[0], *k.shape[1:2])
    matches = k.ndim == 4 and k.shape[:2] == rows and k.shape[3] == q.shape[3]
    if not matches or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"k must match q {list(q.shape)} (H % K must be 0), got {list(k.shape)}")
    heads = (k.shape[2], q.shape[2]) if of_queries else (k.shape[2],)
    matches = values.ndim == 4 and values.shape[:2] == k.shape[:2] and values.shape[2] in heads
    if not matches or not values.shape[3]:
        raise ValueError(f"{name} must match k {list(k.shape)}, got {list(values.shape)}")
    if first is not None and not 0 <= first <= k.shape[1] - q.shape[1]:
        raise ValueError(
            f"first must be between 0 and T - Q = {k.shape[1] - q.shape[1]}, got {first}"
        )
    dtypes = (q.dtype, k.dtype, values.dtype)
    if not q.is_floating_point() or len(set(dtypes)) > 1:
        raise ValueError(
            f"q, k, {name} must have one floating-point dtype, got {', '.join(map(str, dtypes))}"
        )
    check_device("k", k, q)
    check_device(name, values, q)


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    """Raise ValueError unless `x` is on the device of q."""
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q.device}, like q, got {x.device}")


def per_token(name: str, x: Tensor, q: Tensor) -> Tensor:
    """`x` as [B, T]; [1, T] is expanded to all rows of the batch.

    Raises:
        ValueError: the shape, dtype or device is wrong.
    """
    rows = q.shape[:2]
    if x.ndim != 2 or x.shape[1] != rows[1] or x.shape[0] not in (rows[0], 1):
        raise ValueError(f"{name} must be [B, T] = {list(rows)} (or [1, T]), got {list(x.shape)}")
    if x.dtype not in _INTEGERS:
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    check_device(name, x, q)
    return x.expand(rows)


def steps_per_token(name: str, x: Tensor, q: Tensor) -> Tensor:
    """`per_token` in int32, with values clamped to the row."""
    x = per_token(name, x, q)
    return x if x.dtype == torch.int32 else x.long().clamp(-1, q.shape[1]).to(torch.int32)


def check_bias(name: str, bias: Tensor | None, shape: Sequence[int], q: Tensor) -> None:
    """Raise ValueError unless `bias` is None or a floating-point tensor of this shape."""
    if bias is None:
        return
    if list(bias.shape) != list(shape):
        raise ValueError(f"{name} must be {list(shape)}, got {list(bias.shape)}")
    if not bias.is_floating_point():
        raise ValueError(f"{name} must be floats, got {bias.dtype}")
    check_device(name, bias, q)


def check_rotary(rotary: Rotary | None, positions: int, q: Tensor) -> None:
    """Raise ValueError unless the table has at least `positions` positions and fits q's heads."""
    if rotary is None:
        return
    check_width(rotary, q.shape[3])
    for name, table in zip(rotary._fields, rotary, strict=True):
        if table.shape[0] < positions:
            raise ValueError(
                f"rotary.{name} must have at least {positions} positions, got {table.shape[0]}"
            )
        if not table.is_floating_point():
            raise ValueError(f"rotary.{name} must be floats, got {table.dtype}")
        check_device(f"rotary.{name}", table, q)


def check_scale(scale: float | None) -> None:
    """Raise ValueError unless `scale` is None or a positive number."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be a positive number, got {scale}")


def check_state(state: State | None, q: Tensor, values: Tensor) -> None:
    """Raise ValueError unless the state is z [B, T, H, E], like the values, and lse [B, T, H]."""
    if state is None:
        return
    rows, lse_dtypes = list(q.shape[:3]), (torch.float32, torch.float64)
    z, lse = state
    if list(z.shape) != [*rows, values.shape[3]] or z.dtype != values.dtype:
        expected = f"{[*rows, values.shape[3]]} {values.dtype}"
        raise ValueError(f"state: z must be {expected}, got {list(z.shape)} {z.dtype}")
    if list(lse.shape) != rows or lse.dtype not in lse_dtypes:
        raise ValueError(
            f"state: lse must be {rows} torch.float32, got {list(lse.shape)} {lse.dtype}"
        )
    check_device("state: z", z, q)
    check_device("state: lse", lse, q)


def check_axis(stride: int, length: int) -> None:
    """Raise ValueError unless stride and length are at least 1."""
    for name, value in (("stride", stride), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        allowed = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f'{name} must be {allowed}, got "{value}"')
