"""Configuration of an exported model: Llama's, plus the fold. Travels inside exported folders."""

from transformers import LlamaConfig

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
