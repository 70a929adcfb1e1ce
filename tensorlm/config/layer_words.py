"""Short descriptions of a model's attention, for logs, reports and model cards."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensor_attention.routing import why_no_kernels

from .layer_kinds import LayerKind
from .model import ModelConfig


def attention_in_words(model: ModelConfig) -> str:
    """`layers_in_words` of a configuration."""
    route = None if model.route is None else model.route.model_dump()
    return layers_in_words(model.layer_kinds, model.fold, model.window_size, route)


def layers_in_words(
    kinds: Sequence[LayerKind], fold: Sequence[int], window: int, route: Mapping[str, Any] | None
) -> str:
    """`fold [256]`, `full attention`, or each kind with its number of layers."""
    names: dict[LayerKind, str] = {
        "routed": f"routed ({_route_in_words(window, route)})" if route else "routed",
        "strided": f"fold {list(fold)}",
        "window": f"window {window:,}",
        "full": "full attention",
    }
    counts = {kind: kinds.count(kind) for kind in names if kind in kinds}
    if len(counts) == 1:
        return names[kinds[0]]
    first, *rest = counts
    others = (f"{names[kind]} in {counts[kind]} of {len(kinds)} layers" for kind in rest)
    return ", ".join([names[first], *others])


def _route_in_words(window: int, route: Mapping[str, Any]) -> str:
    return (
        f"window {window:,}, {route['top_k']} + 1 blocks of {route['block']}, stretch "
        f"{route['stretch']}" + (", chosen at random" if route.get("choice") == "random" else "")
    )


def why_slow(model: ModelConfig) -> str | None:
    """Why the GPU kernels cannot compute a model's routed layers; None if they can."""
    route = model.route
    return None if route is None else why_no_kernels(route.block, route.open_tile, route.pool)
