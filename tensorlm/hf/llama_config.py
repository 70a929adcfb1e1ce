"""The config.json of a Llama folder: checks its types and compares it with `[model]`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from tensorlm.config import LayerKind, ModelConfig, raise_all
from tensorlm.config.settings_errors import problem_lines
from tensorlm.runtime.errors import UserError

_ARCHITECTURES = ("LlamaForCausalLM", "TensorLMForCausalLM")
_MODEL_TYPES = ("llama", "tensorlm")
# Hugging Face's names of fields, and ours of `[model]`.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_LAYER_FIELDS = ("fold", "full_every", "window", "route_every", "layers")
# The fields of each kind of rotary scaling.
_SCALING: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class _Known(BaseModel):
    """Base of all parts: strict types; null and {} count as absent, unknown fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_absent(cls, tree: Any) -> Any:
        is_tree = isinstance(tree, dict)
        return {k: v for k, v in tree.items() if v not in (None, {})} if is_tree else tree


class _Rope(_Known):
    """`rope_parameters` of transformers 5, `rope_scaling` of 4."""

    rope_type: str = Field("default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: float | None = None
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: PositiveInt | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "_Rope":
        names = _SCALING.get(self.rope_type, ())
        problems = [f"{name} is missing" for name in names if getattr(self, name) is None]
        if self.factor is not None and self.factor < 1:
            problems.append(f"factor: must be at least 1, got {self.factor}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            problems.append(f"high_freq_factor: must be above low_freq_factor {low}, got {high}")
        return raise_all(self, problems)


class _Route(_Known):
    """`route` of a folder with routed layers."""

    block: PositiveInt
    top_k: PositiveInt
    stretch: PositiveInt
    open_tile: PositiveInt = 16
    pool: PositiveInt = 16


class _LlamaConfig(_Known):
    """Fields of config.json; those with a default may be absent."""

    model_type: str = "llama"
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: PositiveInt = 2048
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    quantization_config: Any = None
    fold: list[int] = []
    full_every: int = 0
    window: int = 0
    route: _Route | None = None
    route_every: int = 0
    layers: list[LayerKind] = []

    @property
    def rope(self) -> _Rope:
        """The rotary settings that transformers uses: `rope_scaling` if both are given."""
        rope = self.rope_scaling or self.rope_parameters or _Rope()
        return rope.model_copy(update={"rope_theta": rope.rope_theta or self.rope_theta})


def model_settings(folder: Path) -> dict[str, Any]:
    """The settings of `[model]` that a folder determines.

    `rope_scaling` and `route` are included only if the folder has them.

    Raises:
        UserError: config.json cannot be read, a field is missing or has a wrong type, or the
            architecture is not supported.
    """
    found = _read(folder)
    problems = _strange_parts(found)
    if problems:
        raise UserError(*(f"{folder}: {problem}" for problem in problems))
    heads, rope = found.num_attention_heads, found.rope
    settings = {ours: getattr(found, name) for name, ours in FIELDS.items()}
    if found.model_type == "tensorlm":
        settings |= {name: getattr(found, name) for name in _LAYER_FIELDS}
        if found.route:
            settings["route"] = found.route.model_dump()
    settings["num_kv_heads"] = found.num_key_value_heads or heads
    settings["head_dim"] = found.head_dim or found.hidden_size // heads
    settings["rope_theta"] = rope.rope_theta
    if rope.rope_type != "default":
        names = ("rope_type", *_SCALING[rope.rope_type])
        settings["rope_scaling"] = {name: getattr(rope, name) for name in names}
    return settings


def differing_settings(folder: Path, model: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between `model` and a folder: (the model's value, the folder's value).

    Keys are those of `[model]`, such as `rope_scaling.factor`; an absent scaling or route is None.

    Raises:
        UserError: see `model_settings`.
    """
    theirs = model_settings(folder)
    ours = model.model_dump(mode="json") | {"head_dim": model.head_size}
    ours["full_every"] = model.full_every if needs_code(model) else 0
    if model.fold and model.window:  # equal to fold[0], which is compared already
        ours["window"] = theirs.get("window", 0)
    no_scaling = {"rope_type": "default"}
    scaling, route = theirs.pop("rope_scaling", no_scaling), theirs.pop("route", None)
    pairs = {key: (ours[key], value) for key, value in theirs.items()}
    if scaling is no_scaling:
        pairs["rope_scaling"] = (ours["rope_scaling"], None)
    else:
        mine = ours["rope_scaling"] or no_scaling
        pairs |= {f"rope_scaling.{key}": (mine.get(key), scaling[key]) for key in scaling}
    if route:
        pairs |= {f"route.{key}": ((ours["route"] or {}).get(key), route[key]) for key in route}
    elif "fold" in theirs:
        pairs["route"] = (ours["route"], None)
    return {key: pair for key, pair in pairs.items() if not _are_equal(*pair)}


def _are_equal(ours: Any, theirs: Any) -> bool:
    """Whether two values are equal; floats in float32, the precision of formats such as GGUF."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return bool(np.float32(ours) == np.float32(theirs))
    return bool(ours == theirs)


def check_config(folder: Path, model: ModelConfig) -> None:
    """Compare a folder's config.json with the configured model.

    Raises:
        UserError: see `model_settings`; or one line per difference, with the setting that corrects
            it.
    """
    differences = differing_settings(folder, model)
    for key in ("rope_scaling", "route"):
        if key in differences:
            raise UserError(f"model.{key}: must be absent, as in {folder} (remove model.{key})")
    problems = [
        f"model.{key}: must be {json.dumps(value)}, as in {folder}, got {json.dumps(ours)} "
        f"(set model.{key}={json.dumps(value)})"
        for key, (ours, value) in differences.items()
    ]
    if problems:
        raise UserError(*problems)


def describe_unused(folder: Path, model: ModelConfig) -> str:
    """Describe how a folder's model differs from the configured one; "" if it does not."""
    try:
        differences = differing_settings(folder, model)
        if "fold" not in model_settings(folder):
            ours, plain = model.model_dump(mode="json"), _LlamaConfig.model_fields
            keys = (*_LAYER_FIELDS, "route") if needs_code(model) else ()
            pairs = {key: (ours[key], plain[key].default) for key in keys}
            differences |= {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    except UserError:  # [model] cannot describe this model
        return f"the model of {folder} is used, and [model] has no effect"
    parts = [
        f"{key} = {json.dumps(ours)} ({folder} has {json.dumps(theirs)})"
        for key, (ours, theirs) in differences.items()
    ]
    if not parts:
        return ""
    return f"the model of {folder} is used; these settings have no effect: {', '.join(parts)}"


def needs_code(model: ModelConfig) -> bool:
    """Whether a folder of this model must include code, since it is not a plain Llama."""
    return bool(model.fold) or any(kind != "full" for kind in model.layer_kinds)


def max_positions(folder: Path) -> int:
    """The context length in a folder's config.json.

    Raises:
        UserError: it cannot be read.
    """
    return _read(folder).max_position_embeddings


def _read(folder: Path) -> _LlamaConfig:
    path = folder / "config.json"
    try:
        content = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(
            f"{folder}: must contain a readable config.json (choose a Hugging Face folder)"
        ) from None
    names = content.get("architectures")
    if not isinstance(names, list) or not any(name in _ARCHITECTURES for name in names):
        raise UserError(
            f"{folder}: architectures must include LlamaForCausalLM, got {json.dumps(names)}"
        )
    try:
        return _LlamaConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(*problem_lines(error, str(path))) from None


def _strange_parts(found: _LlamaConfig) -> list[str]:
    """Problems that make this an unsupported architecture."""
    problems = [
        f"{key} must be false, since biases in projections are not supported"
        for key in ("attention_bias", "mlp_bias")
        if getattr(found, key)
    ]
    if found.model_type not in _MODEL_TYPES:  # this, not `architectures`, chooses the class
        problems.append(
            f"model_type must be {' or '.join(_MODEL_TYPES)}, got {found.model_type} (correct "
            "config.json, or import a Llama)"
        )
    if found.hidden_act != "silu":
        problems.append(f"hidden_act must be silu, got {found.hidden_act}")
    if found.quantization_config:
        problems.append("weights must not be quantized (import the unquantized folder)")
    for factor in {found.partial_rotary_factor, found.rope.partial_rotary_factor} - {1.0}:
        problems.append(f"partial_rotary_factor must be 1, got {factor}")
    if found.rope.rope_type not in _SCALING:
        problems.append(
            f"rope_scaling must be of type {', '.join(_SCALING)}, got {found.rope.rope_type}"
        )
    return problems
