"""Configuration of an exported model: Llama's, plus the fold. Travels inside exported folders."""

from typing import Any

from transformers import LlamaConfig

_ROPE_TYPES = ("default", "linear", "llama3")

# Where `transformers` finds the classes of a folder that carries this code.
AUTO_MAP = {
    "AutoConfig": "configuration_tensorlm.TensorLMConfig",
    "AutoModel": "modeling_tensorlm.TensorLMModel",
    "AutoModelForCausalLM": "modeling_tensorlm.TensorLMForCausalLM",
}


class TensorLMConfig(LlamaConfig):
    """`fold`, `full_every` and `hop_bias_init` as in training; the first is always given."""

    model_type = "tensorlm"

    fold: list[int] | None = None
    full_every: int = 0
    hop_bias_init: float = -4.0

    def layer_fold(self, layer: int) -> list[int]:
        """The fold of layer `layer` (from 0); [] is full attention."""
        is_full = self.full_every > 0 and (layer + 1) % self.full_every == 0
        return [] if is_full else list(self.fold or [])


def check_operator(config: LlamaConfig) -> None:
    """Raise ValueError if a field asks for what the operator does not have."""
    rope_type = rope_fields(config)["rope_type"]
    if rope_type not in _ROPE_TYPES:
        raise ValueError(f"rope type {rope_type}, not one of {', '.join(_ROPE_TYPES)}")
    if config.attention_dropout:
        raise ValueError("attention_dropout is set: tensorized attention has no dropout")
    if not getattr(config, "is_causal", True):
        raise ValueError("is_causal is false: tensorized attention never looks ahead")


def rope_fields(config: LlamaConfig) -> dict[str, Any]:
    """The rotary embedding's fields, by their names in transformers 5."""
    fields = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = getattr(config, "rope_theta", None)  # of its own in transformers 4
    return {"rope_type": "default", "rope_theta": theta, **fields}
