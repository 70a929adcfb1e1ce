"""Configuration of an exported model: Llama's, plus the attention of each layer.

This file travels inside exported folders.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import LlamaConfig

_ROPE_TYPES = ("default", "linear", "llama3")
_KINDS = ("window", "strided", "routed", "full")
_ROUTE_FIELDS = ("block", "top_k", "stretch", "open_tile")
_OPEN_TILE = 16

# Where `transformers` finds the classes of a folder that carries this code.
AUTO_MAP = {
    "AutoConfig": "configuration_tensorlm.TensorLMConfig",
    "AutoModel": "modeling_tensorlm.TensorLMModel",
    "AutoModelForCausalLM": "modeling_tensorlm.TensorLMForCausalLM",
}


class Route(NamedTuple):
    """The numbers of a routed layer, as `tensor_attention.routed_attention` takes them."""

    window: int
    block: int
    top_k: int
    stretch: int
    open_tile: int


class TensorLMConfig(LlamaConfig):
    """Llama's configuration with the fields of `[model]` that say what each layer attends to.

    `route` has the keys block, top_k, stretch and open_tile (16 where absent). A folder written
    before there were window and routed layers has only the first three fields.
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
        """Tokens that window and routed layers always read; 0 where no field says it."""
        return self.window or (self.fold[0] if self.fold else 0)

    @property
    def route_numbers(self) -> Route:
        """The numbers of the routed layers."""
        return Route(self.window_size, **({"open_tile": _OPEN_TILE} | (self.route or {})))


def check_operator(config: LlamaConfig) -> None:
    """Raise ValueError if a field asks for what the operator does not have."""
    rope_type = rope_fields(config)["rope_type"]
    if rope_type not in _ROPE_TYPES:
        raise ValueError(f"rope type {rope_type}, not one of {', '.join(_ROPE_TYPES)}")
    if config.attention_dropout:
        raise ValueError("attention_dropout is set: tensorized attention has no dropout")
    if not getattr(config, "is_causal", True):
        raise ValueError("is_causal is false: tensorized attention never looks ahead")
    if isinstance(config, TensorLMConfig):
        check_layers(config)


def check_layers(config: TensorLMConfig) -> None:
    """Raise ValueError, naming the first of them, if fields of the layers contradict each other."""
    for problem in (*_list_problems(config), *_route_problems(config)):
        raise ValueError(problem)
    kinds = {config.layer_kind(layer) for layer in range(config.num_hidden_layers)}
    if "strided" in kinds and not config.fold:
        raise ValueError("fold must name an inner axis for strided layers, got [] (like [1024])")
    for kind in sorted(kinds & {"window", "routed"}):
        if not config.window_size:
            raise ValueError(f"window must be at least 1 for {kind} layers, got 0 (like 1024)")
    if "routed" in kinds and not config.route:
        raise ValueError(
            "route must be given for routed layers, got none (like {'block': 64, 'top_k': 16, "
            "'stretch': 16})"
        )
    if config.route and "routed" not in kinds:
        raise ValueError(
            "route must have a routed layer, got none (lower route_every, raise full_every, name "
            "one in layers, or remove route)"
        )


def _list_problems(config: TensorLMConfig) -> list[str]:
    """What is wrong with the fields that say which layers are of which kind."""
    problems = [
        f"{name} must be a whole number of at least 0, got {getattr(config, name)!r}"
        for name in ("full_every", "route_every", "window")
        if not _is_whole(getattr(config, name), 0)
    ]
    names, count = config.layers or [], config.num_hidden_layers
    unknown = [name for name in names if name not in _KINDS]
    if unknown:
        problems.append(f"layers must name {', '.join(_KINDS)}, got {unknown[0]!r}")
    if names and len(names) != count:
        problems.append(f"layers must name one kind for each of {count} layers, got {len(names)}")
    for name in ("full_every", "route_every"):
        if names and getattr(config, name):
            problems.append(
                f"{name} must be 0 where layers are listed, got {getattr(config, name)} (remove "
                f"{name} or layers)"
            )
    return problems


def _route_problems(config: TensorLMConfig) -> list[str]:
    """What is wrong with the window and the route."""
    problems = []
    if config.fold and config.window not in (0, config.fold[0]):
        problems.append(
            f"window must be fold[0] = {config.fold[0]}, got {config.window} (remove window)"
        )
    if config.route_every and not config.route:
        problems.append(
            f"route_every must be 0 without a route, got {config.route_every} (give route)"
        )
    if not config.route:
        return problems
    needed = set(_ROUTE_FIELDS) - {"open_tile"}
    if not isinstance(config.route, Mapping) or not needed <= set(config.route) <= {*_ROUTE_FIELDS}:
        keys = ", ".join(_ROUTE_FIELDS)
        return [*problems, f"route must have the keys {keys}, got {config.route!r}"]
    problems += [
        f"route.{name} must be a whole number of at least 1, got {number!r}"
        for name, number in config.route.items()
        if not _is_whole(number, 1)
    ]
    if not problems and config.window_size and config.route["block"] > config.window_size:
        problems.append(
            f"route.block must be at most the window of {config.window_size} tokens, got "
            f"{config.route['block']} (lower block, or raise window)"
        )
    return problems


def _is_whole(number: Any, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def rope_fields(config: LlamaConfig) -> dict[str, Any]:
    """The rotary embedding's fields, by their names in transformers 5."""
    fields = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = getattr(config, "rope_theta", None)  # of its own in transformers 4
    return {"rope_type": "default", "rope_theta": theta, **fields}
