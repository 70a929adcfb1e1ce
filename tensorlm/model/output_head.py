"""The output head with its cross-entropy summed over tokens, computed in chunks of tokens."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorlm.batch import IGNORED
from tensorlm.config import FusedLayers

from .sums import add_product

Reduction = Literal["sum", "none"]


class OutputHead(nn.Linear):
    """Linear map to the vocabulary; with labels, computes the loss directly.

    The loss is computed in the module that owns the weight, where ZeRO-3 has gathered it.
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, fused_layers: FusedLayers = "auto"
    ) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self.fused_layers = fused_layers

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        chunk: int = 0,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """Compute logits [..., V], or with labels the losses.

        Each token's loss is float32, or of the dtype of `hidden` if that is wider. Their sum is
        float64, so that it does not depend on how tokens are divided among chunks and ranks.

        Args:
            hidden: [..., C].
            labels: [...] int64; IGNORED if there is nothing to predict.
            chunk: number of tokens whose logits are in memory at a time (with "sum", also in
                backward); 0: all.
            reduction: "sum" for the sum of the losses (a scalar), or "none" for each loss [...]
                (0 where IGNORED).
        """
        if labels is None:
            return super().forward(hidden)
        flat, flat_labels = hidden.flatten(0, -2), labels.flatten()
        chunk = chunk or flat_labels.numel()
        if reduction == "sum" and torch.is_grad_enabled():
            is_fused = runs_loss_kernel(self.fused_layers, flat.is_cuda)
            return _SummedLoss.apply(flat, self.weight, flat_labels, chunk, is_fused)
        parts = zip(flat.split(chunk), flat_labels.split(chunk), strict=True)
        losses = torch.cat([_losses(h, self.weight, y)[0] for h, y in parts]).view_as(labels)
        return losses if reduction == "none" else losses.sum(dtype=torch.float64)


def runs_loss_kernel(fused_layers: FusedLayers, on_gpu: bool) -> bool:
    """Whether losses and gradients of logits are computed by one kernel (`loss_kernel.py`)."""
    return on_gpu and fused_layers != "torch"


class _SummedLoss(torch.autograd.Function):
    """Sum of the losses; forward computes the gradients too, so no logits are computed twice.

    The gradient of the weight is summed over the chunks in float32 (or wider).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, is_fused: bool
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        dhidden = torch.empty_like(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=wide)
        parts = zip(hidden.split(chunk), labels.split(chunk), dhidden.split(chunk), strict=True)
        for part, label, dpart in parts:
            total += _add_chunk(part, weight, label, dpart, dweight, is_fused)
        ctx.gradients = dhidden, dweight, chunk
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply by `scale` in float32: rounded to bf16 it would change the learning rate."""
        (dhidden, dweight, chunk), ctx.gradients = ctx.gradients, None
        for part in dhidden.split(chunk):
            part.copy_(part.to(dweight.dtype) * scale)
        return dhidden, dweight.mul_(scale).to(dhidden.dtype), None, None, None


def _add_chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, dhidden: Tensor, dweight: Tensor,
    is_fused: bool,
) -> Tensor:  # fmt: skip
    """Summed loss of one chunk [n]; writes `dhidden` [n, C] and adds to `dweight` [V, C].

    A separate function, so that its [n, V] tensors are freed before the next chunk.
    """
    if is_fused:
        from .loss_kernel import losses_and_gradients  # needs Triton

        dlogits = F.linear(hidden, weight)
        losses = losses_and_gradients(dlogits, labels, IGNORED)
    else:
        losses, log_p = _losses(hidden, weight, labels)
        dlogits = _logit_gradients(log_p, labels).to(weight.dtype)
        del log_p
    torch.mm(dlogits, weight, out=dhidden)
    add_product(dweight, dlogits.t(), hidden)
    return losses.sum(dtype=torch.float64)


def _logit_gradients(log_p: Tensor, labels: Tensor) -> Tensor:
    """softmax - 1 at the label, 0 where IGNORED; overwrites `log_p` [n, V]."""
    ignored = (labels == IGNORED)[:, None]
    probabilities = log_p.exp_()
    probabilities.scatter_add_(1, labels.clamp(min=0)[:, None], -torch.ones_like(log_p[:, :1]))
    return probabilities.masked_fill_(ignored, 0)


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [n] and log probabilities [n, V] of one chunk, in float32 (or wider)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    log_p = F.log_softmax(F.linear(hidden, weight).to(wide), -1)
    return F.nll_loss(log_p, labels, ignore_index=IGNORED, reduction="none"), log_p
