"""The Llama decoder; each layer has one of four kinds of attention (`attention.py`).

Module names match Hugging Face's Llama, so weights move in both directions by name; only
`self_attn.hop_bias` has no counterpart there. Shape letters: B batch, T tokens of this rank, C
hidden size, V vocabulary size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fold_parallel import Grid
from tensor_attention import Backend, Rotary
from tensorlm.config import FusedLayers, LinearFormat, ModelConfig, Recompute, TrainConfig

from .attention import Attention, KeptChoice
from .fused import check_layers
from .initial_weights import WeightInit
from .layers import RMSNorm, SwiGLU, rotary_table
from .offload import HostOffload
from .output_head import OutputHead, Reduction
from .recompute import run_block, run_group


def create_llama(
    shape: ModelConfig, train: TrainConfig, grid: Grid, device: torch.device
) -> "Llama":
    """Create a model with the settings of a run, on `device`, directly in its dtype.

    Casting an fp32 model would need twice the memory. The caller sets the weights, with
    `init_weights` or from a checkpoint.

    Raises:
        UserError: kernels for `train.fused_layers` are not installed.
    """
    check_layers(train.fused_layers)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if train.dtype == "bf16" else torch.float32)
    try:
        with device:
            return Llama(
                shape,
                grid,
                attention=train.attention,
                recompute=train.recompute,
                recompute_interval=train.recompute_interval,
                activation_offload=train.activation_offload,
                loss_chunk=train.loss_chunk,
                mlp_chunk=train.mlp_chunk,
                fused_layers=train.fused_layers,
                linear=train.linear,
            )
    finally:
        torch.set_default_dtype(before)


class Block(nn.Module):
    """One decoder layer: attention and SwiGLU, each with a norm before it and a residual."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        grid: Grid,
        attention: Backend,
        mlp_chunk: int = 0,
        fused_layers: FusedLayers = "auto",
        linear: LinearFormat = "bf16",
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, fused_layers)
        self.kind = config.layer_kind(layer)
        self.self_attn = Attention(config, layer, grid, attention, linear)
        self.post_attention_layernorm = RMSNorm(size, eps, fused_layers)
        self.mlp = SwiGLU(config, mlp_chunk, fused_layers, linear)

    def forward(
        self, x: Tensor, doc_start: Tensor, rotary: Rotary, kept: KeptChoice | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), doc_start, rotary, kept)
        return x + self.mlp(self.post_attention_layernorm(x))

    def kept_products(self, x: Tensor) -> int:
        """Number of first products whose results backward can use, for x [B, T, C].

        They are q, k, v, o, and gate and up unless these are tiled; the result of down is not used.
        """
        return 4 if self.mlp.is_tiled(x) else 6


class Llama(nn.Module):
    """The decoder: from token ids to logits or to the summed loss."""

    def __init__(
        self,
        config: ModelConfig,
        grid: Grid = Grid(),  # noqa: B008 (frozen)
        *,
        attention: Backend = "auto",
        recompute: Recompute = "none",
        recompute_interval: int = 1,
        activation_offload: bool = False,
        loss_chunk: int = 2048,
        mlp_chunk: int = 0,
        fused_layers: FusedLayers = "auto",
        linear: LinearFormat = "bf16",
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.recompute = recompute
        self.recompute_interval = recompute_interval
        self.offload = HostOffload() if activation_offload else None
        self.loss_chunk = loss_chunk
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, i, grid, attention, mlp_chunk, fused_layers, linear)
            for i in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, fused_layers)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, fused_layers)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        doc_start: Tensor | None = None,
        labels: Tensor | None = None,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """Run the decoder on packed rows, or on this rank's slice of them (`grid.sp` > 1).

        Args:
            tokens: [B, T] int64.
            doc_start: [B, T] int32, index in the row of the first token of each token's document;
                None: one document.
            labels: [B, T] int64, the token to predict at each position, or IGNORED.
            reduction: "sum" for the sum of the losses, or "none" for the loss of each label.

        Returns:
            Logits [B, T, V]. With labels, the cross-entropy: a float64 sum, or float32 [B, T].
        """
        if doc_start is None:
            doc_start = torch.zeros_like(tokens, dtype=torch.int32)
        rotary = rotary_table(self.config, tokens.shape[1] * self.grid.sp, tokens.device)
        x = self.embed_tokens(tokens)
        recompute: Recompute = self.recompute if torch.is_grad_enabled() else "none"
        offload = self.offload if recompute != "none" else None
        reached = offload.fetch_earlier if offload else lambda _: None
        size = self.recompute_interval if recompute == "block" else 1
        with offload.saving() if offload else nullcontext():
            for start in range(0, len(self.layers), size):
                group = [
                    self._run_of(block, recompute, x, doc_start, rotary)
                    for block in self.layers[start : start + size]
                ]
                x = run_group(group, x, reached)
        x = self.norm(x)
        if labels is None:
            return self.lm_head(x)
        return self.lm_head(x, labels, self.loss_chunk, reduction)

    @staticmethod
    def _run_of(
        block: nn.Module, recompute: Recompute, x: Tensor, doc_start: Tensor, rotary: Rotary
    ) -> Callable[[Tensor], Tensor]:
        """`run_block` as a function of its input, which is like `x`."""
        assert isinstance(block, Block)
        # Without gradients, only the layer itself needs its choice.
        kept = KeptChoice() if torch.is_grad_enabled() else None
        return partial(
            run_block, block, recompute, block.kept_products(x), block.kind,
            doc_start=doc_start, rotary=rotary, kept=kept,
        )  # fmt: skip

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw normal weights of deviation `init_std`, / sqrt(2 x layers) in output projections.

        They depend only on `seed` and the order of the parameters, not on ranks or ZeRO stage.
        """
        init = WeightInit(self.config, seed)
        for name, parameter in self.named_parameters():
            init.fill(name, parameter)
