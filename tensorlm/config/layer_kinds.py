"""The kind of each layer, and the settings that each kind needs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .model import ModelConfig

# window: only the last tokens. strided: the axes of `fold`, one hop each. routed: a window, and
# the blocks of the past that a token chooses. full: the whole past.
LayerKind = Literal["window", "strided", "routed", "full"]


def kind_of_layer(model: "ModelConfig", layer: int) -> LayerKind:
    """The kind of layer `layer` (from 0)."""
    if model.layers:
        return model.layers[layer]
    if model.full_every and (layer + 1) % model.full_every == 0:
        return "full"
    if model.route and (not model.route_every or (layer + 1) % model.route_every == 0):
        return "routed"
    return "strided" if model.fold else "window" if model.window else "full"


def kind_problems(model: "ModelConfig") -> list[str]:
    """Contradictions in the settings of layers, one line each, with a fix."""
    problems = list(_pattern_problems(model))
    if model.fold and model.window not in (0, model.fold[0]):
        problems.append(
            f"window must be fold[0] = {model.fold[0]}, got {model.window} (remove window, or set "
            f"fold[0] = {model.window})"
        )
    if model.route and model.window_size and model.route.block > model.window_size:
        problems.append(
            f"route.block must be at most the window of {model.window_size} tokens, got "
            f"{model.route.block} (lower block, or raise window)"
        )
    return problems or list(_missing_numbers(model))


def _pattern_problems(model: "ModelConfig") -> Iterator[str]:
    """Contradictions among full_every, route_every and layers."""
    if model.layers and len(model.layers) != model.num_layers:
        yield (
            f"layers must have one entry for each of num_layers = {model.num_layers}, got "
            f"{len(model.layers)}"
        )
    for name in ("full_every", "route_every"):
        if model.layers and getattr(model, name):
            yield (
                f"{name} must be 0 if layers is given, got {getattr(model, name)} (remove "
                f"{name} or layers)"
            )
    if model.route_every and not model.route:
        yield (
            f"route_every must be 0 without routed layers, got {model.route_every} (add "
            "[model.route] with block, top_k and stretch)"
        )


def _missing_numbers(model: "ModelConfig") -> Iterator[str]:
    """Settings that the layers of a kind need, and a route that no layer uses."""
    kinds = set(model.layer_kinds)
    if "strided" in kinds and not model.fold:
        yield "fold must have an inner axis for strided layers, got [] (like [1024])"
    if "routed" in kinds and not model.route:
        yield (
            "route must be given for routed layers, got none (add [model.route] with block, top_k "
            "and stretch)"
        )
    for kind in ("window", "routed"):
        if kind in kinds and not model.window_size:
            yield f"window must be at least 1 for {kind} layers, got 0 (like 1024)"
    if model.route and "routed" not in kinds:
        yield (
            "route must be used by at least one layer, got none (lower route_every, raise "
            "full_every, add a routed layer to layers, or remove [model.route])"
        )
