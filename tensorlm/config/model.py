"""The shape of the model, and the kind of attention of each of its layers."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fold_parallel.grid import check_sizes
from tensor_attention import validate_fold

from .layer_kinds import LayerKind, kind_of_layer, kind_problems
from .section import Section, raise_all


class RopeScaling(Section):
    """Rotary frequencies of a model whose context was extended ("llama3" as in Llama 3.1)."""

    rope_type: Literal["linear", "llama3"]
    """how frequencies are scaled: linear (all divided by factor), or llama3 (Llama 3.1: only low
    ones)"""
    factor: float = Field(ge=1)
    """how many times longer the context became"""
    low_freq_factor: float = 1.0
    """llama3: context lengths per wavelength below which a frequency is divided by factor"""
    high_freq_factor: float = 4.0
    """llama3: context lengths per wavelength above which a frequency is unchanged"""
    original_max_position_embeddings: int = 8192
    """llama3: context length, in tokens, before the extension"""


class RouteConfig(Section):
    """The blocks that a token of a routed layer chooses to read beyond its window."""

    block: PositiveInt
    """tokens per block, at most the window"""
    top_k: PositiveInt
    """blocks that each token chooses, in addition to the document's first block"""
    pool: PositiveInt = 16
    """tokens whose mean key is one candidate of the choice; a block counts as its best candidate
    (block or more: the mean of the block)"""
    stretch: PositiveInt
    """divisor of rotary positions beyond the window, which keeps long contexts inside the trained
    range (1: unchanged positions)"""
    open_tile: PositiveInt = 16
    """tokens per tile: a block that one token chooses is also read by later tokens of its tile (1:
    each token reads only its own choice)"""
    choice: Literal["content", "random"] = "content"
    """how blocks are chosen; random is a reference for experiments, needs open_tile = 1, and cannot
    be exported or generate text"""

    @model_validator(mode="after")
    def _random_blocks_are_not_shared(self) -> "RouteConfig":
        if self.choice == "random" and self.open_tile > 1:
            # Random choices of neighbors differ: together, they would open nearly all blocks.
            raise ValueError(
                f"open_tile must be 1 with choice = random, got {self.open_tile} (set open_tile = "
                "1)"
            )
        return self


class ModelConfig(Section):
    """Shape of the Llama decoder and of the attention of its layers."""

    vocab_size: PositiveInt
    """number of token ids: at least the largest id of the tokenizer plus 1"""
    hidden_size: PositiveInt
    """width of the hidden states"""
    intermediate_size: PositiveInt
    """width of the SwiGLU layers"""
    num_layers: PositiveInt
    """number of decoder layers"""
    num_heads: PositiveInt
    """number of query heads"""
    num_kv_heads: PositiveInt
    """number of key and value heads; must divide num_heads"""
    head_dim: NonNegativeInt = 0
    """size of one attention head (0: hidden_size / num_heads)"""
    rope_theta: PositiveFloat = 500000.0
    """base of the rotary frequencies"""
    rope_scaling: RopeScaling | None = None
    """scaling of the rotary frequencies, for a model whose context was extended (default: none)"""
    rms_norm_eps: PositiveFloat = 1e-5
    """epsilon of RMSNorm, added to the mean square"""
    tie_embeddings: bool = False
    """use the token embedding as the output head too"""
    init_std: PositiveFloat = 0.02
    """standard deviation of random initial weights"""
    window: NonNegativeInt = 0
    """tokens that every window and routed layer reads, the token itself included (0: fold[0] if
    fold is given)"""
    fold: tuple[int, ...] = Field((), strict=False)
    """lengths of the inner axes of strided layers, innermost first (default (): no strided
    layers)"""
    hop_bias_init: float = -4.0
    """initial bias of hops 2, 3, ... of strided layers; with a low bias, training starts almost as
    a window"""
    full_every: NonNegativeInt = 0
    """distance between layers with full attention: layers k, 2 k, ... (0: no layer)"""
    route: RouteConfig | None = None
    """routed layers and what they read (default: no routed layers)"""
    route_every: NonNegativeInt = 0
    """distance between routed layers: layers k, 2 k, ... (0: every layer)"""
    layers: tuple[LayerKind, ...] = Field((), strict=False)
    """kind of each layer by name, instead of full_every and route_every (default (): the kinds
    follow from the other settings)"""

    @model_validator(mode="after")
    def _shapes_agree(self) -> "ModelConfig":
        problems = []
        if self.head_dim == 0 and self.hidden_size % self.num_heads:
            problems.append(
                f"hidden_size must be a multiple of num_heads = {self.num_heads}, got "
                f"{self.hidden_size} (or set head_dim)"
            )
        elif self.head_size % 2:
            problems.append(
                f"head_dim must be even for rotary embedding, got {self.head_size} (set head_dim, "
                "or change hidden_size / num_heads)"
            )
        if self.num_heads % self.num_kv_heads:
            problems.append(
                f"num_heads must be a multiple of num_kv_heads = {self.num_kv_heads}, got "
                f"{self.num_heads}"
            )
        try:
            validate_fold(self.fold)
        except ValueError as error:
            problems.append(str(error))
        return raise_all(self, problems + kind_problems(self))

    @property
    def head_size(self) -> int:
        """Size of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def window_size(self) -> int:
        """Tokens in the window of window and routed layers; 0 if neither setting is given."""
        return self.window or (self.fold[0] if self.fold else 0)

    def layer_kind(self, layer: int) -> LayerKind:
        """The kind of layer `layer` (from 0)."""
        return kind_of_layer(self, layer)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(self.layer_kind(layer) for layer in range(self.num_layers))

    def layer_fold(self, layer: int) -> tuple[int, ...]:
        """The fold of layer `layer` (from 0): () unless it is strided."""
        return self.fold if self.layer_kind(layer) == "strided" else ()

    def check_sharing(self, seq_len: int, sp: int) -> None:
        """Raise ValueError with legal sizes unless `sp` ranks can share a row of `seq_len`."""
        kinds = set(self.layer_kinds)
        heads = self.num_heads if "full" in kinds else None
        check_sizes(seq_len, sp, self.fold if "strided" in kinds else (), heads)
