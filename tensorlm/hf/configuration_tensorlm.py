"""Configuration of an exported model: Llama's, plus the fold."""

from transformers import LlamaConfig


class TensorLMConfig(LlamaConfig):
    """`fold` lists the inner axes of the folded sequence; `full_every` as in training."""

    model_type = "tensorlm"

    fold: list[int] | None = None
    full_every: int = 0

    def layer_fold(self, layer: int) -> list[int]:
        """The fold of layer `layer`; [] is full attention."""
        is_full = self.full_every > 0 and (layer + 1) % self.full_every == 0
        return [] if is_full else list(self.fold or [])
