"""Configuration of an exported model: Llama's, plus the attention of each layer.

This file is part of exported folders.
"""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

from transformers import LlamaConfig

_ROPE_TYPES = ("default", "linear", "llama3")
_KINDS = ("window", "strided", "routed", "full")
_ROUTE_FIELDS = ("block", "top_k", "stretch", "open_tile", "pool")
_ROUTE_DEFAULTS = {"open_tile": 16, "pool": 16}

# Tells `transformers` where to find the classes of a folder with this code.
AUTO_MAP = {
    "AutoConfig": "configuration_tensorlm.TensorLMConfig",
    "AutoModel": "modeling_tensorlm.TensorLMModel",
    "AutoModelForCausalLM": "modeling_tensorlm.TensorLMForCausalLM",
}


class Route(NamedTuple):
    """The settings of a routed layer: arguments of `tensor_attention.routed_attention`."""

    window: int
    block: int
    top_k: int
    stretch: int
    open_tile: int
    pool: int


class TensorLMConfig(LlamaConfig):
    """Llama's configuration, with the fields of `[model]` that define each layer's attention.

    `route` has the keys block, top_k, stretch, open_tile and pool (default: 16 each). Folders
    written by versions without window and routed layers have only the first three fields.
    """

    model_type = "tensorlm"

    fold: list[int] | None = None
    full_every: int = 0
    hop_bias_init: float = -4.0
    window: int = 0
    route: dict[str, int] | None = None
    route_every: int = 0
    layers: list[str] | None = None

    def layer_kind(self, layer: int) -> str:
        """The kind of layer `layer` (from 0): "window", "strided", "routed" or "full"."""
        if self.layers:
            return self.layers[layer]
        if self.full_every > 0 and (layer + 1) % self.full_every == 0:
            return "full"
        if self.route and (not self.route_every or (layer + 1) % self.route_every == 0):
            return "routed"
        return "strided" if self.fold else "window" if self.window else "full"

    def layer_fold(self, layer: int) -> list[int]:
        """The fold of layer `layer` (from 0); [] unless it is strided."""
        return list(self.fold or []) if self.layer_kind(layer) == "strided" else []

    @property
    def window_size(self) -> int:
        """Tokens that window and routed layers always read; 0 if no field gives it."""
        return self.window or (self.fold[0] if self.fold else 0)

    @property
    def route_numbers(self) -> Route:
        """The settings of routed layers."""
        return Route(self.window_size, **(_ROUTE_DEFAULTS | (self.route or {})))


def check_operator(config: LlamaConfig) -> None:
    """Raise ValueError if a field needs what the operator does not support."""
    rope_type = rope_fields(config)["rope_type"]
    if rope_type not in _ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(_ROPE_TYPES)}, got {rope_type}")
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout must be 0 for tensorized attention, got {config.attention_dropout}"
        )
    if not getattr(config, "is_causal", True):
        raise ValueError("is_causal must be true for tensorized attention, got false")
    if isinstance(config, TensorLMConfig):
        check_layers(config)


def check_layers(config: TensorLMConfig) -> None:
    """Raise ValueError with the first contradiction among the fields of layers, if any."""
    for problem in chain(*(check(config) for check in _CHECKS)):
        raise ValueError(problem)


def _list_problems(config: TensorLMConfig) -> Iterator[str]:
    """Problems of the fields that set the kinds of layers."""
    for name in ("full_every", "route_every", "window"):
        if not _is_whole(number := getattr(config, name), 0):
            yield f"{name} must be an integer of at least 0, got {number!r}"
    names, count = config.layers or [], config.num_hidden_layers
    for name in set(names) - set(_KINDS):
        yield f"layers must be one of {', '.join(_KINDS)}, got {name!r}"
    if names and len(names) != count:
        yield f"layers must have one entry for each of {count} layers, got {len(names)}"
    for name in ("full_every", "route_every"):
        if names and (number := getattr(config, name)):
            yield f"{name} must be 0 if layers is given, got {number} (remove {name} or layers)"


def _route_problems(config: TensorLMConfig) -> Iterator[str]:
    """Problems of the window and the route."""
    fold, window, route = config.fold, config.window, config.route
    if fold and window not in (0, fold[0]):
        yield f"window must be fold[0] = {fold[0]}, got {window} (remove window)"
    if config.route_every and not route:
        yield f"route_every must be 0 without route, got {config.route_every} (set route)"
    if not route:
        return
    needed = set(_ROUTE_FIELDS) - set(_ROUTE_DEFAULTS)
    if not isinstance(route, Mapping) or not needed <= set(route) <= {*_ROUTE_FIELDS}:
        yield f"route must have the keys {', '.join(_ROUTE_FIELDS)}, got {route!r}"
        return
    for name, number in route.items():
        if not _is_whole(number, 1):
            yield f"route.{name} must be an integer of at least 1, got {number!r}"
            return
    if config.window_size and route["block"] > config.window_size:
        yield (
            f"route.block must be at most the window of {config.window_size} tokens, got "
            f"{route['block']} (lower block, or raise window)"
        )


def _kind_problems(config: TensorLMConfig) -> Iterator[str]:
    """Fields that the layers of a kind need, and a route that no layer uses."""
    kinds = {config.layer_kind(layer) for layer in range(config.num_hidden_layers)}
    if "strided" in kinds and not config.fold:
        yield "fold must have an inner axis for strided layers, got [] (like [1024])"
    for kind in sorted(kinds & {"window", "routed"}):
        if not config.window_size:
            yield f"window must be at least 1 for {kind} layers, got 0 (like 1024)"
    if "routed" in kinds and not config.route:
        yield (
            "route must be given for routed layers, got none (like {'block': 64, 'top_k': 16, "
            "'stretch': 16})"
        )
    if config.route and "routed" not in kinds:
        yield (
            "route must be used by at least one layer, got none (lower route_every, raise "
            "full_every, add a routed layer to layers, or remove route)"
        )


_CHECKS = (_list_problems, _route_problems, _kind_problems)  # each relies on those before it


def _is_whole(number: Any, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def rope_fields(config: LlamaConfig) -> dict[str, Any]:
    """The rotary embedding's fields, with their names in transformers 5."""
    fields = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = getattr(config, "rope_theta", None)  # a separate field in transformers 4
    return {"rope_type": "default", "rope_theta": theta, **fields}
