"""The output head and its token-summed cross-entropy, without all logits at one time."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100

Reduction = Literal["sum", "none"]


class OutputHead(nn.Linear):
    """Linear map to the vocabulary; with labels, straight to the summed loss.

    The module that owns the weight calls it, so that ZeRO-3 has it gathered here.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        chunk: int = 0,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """Logits [..., V], or the losses at labels that are not IGNORED.

        Each token's loss is float32 (or that of `hidden`, if wider). Their sum is float64, so that
        it does not depend on how the tokens are divided among chunks and ranks.

        Args:
            hidden: [..., C].
            labels: [...] int64, IGNORED where there is nothing to predict.
            chunk: tokens whose logits exist at one time (reduction "sum": in backward too); 0: all.
            reduction: "sum" of the losses (a scalar), or "none": each, [...], 0 where IGNORED.
        """
        if labels is None:
            return super().forward(hidden)
        flat, flat_labels = hidden.flatten(0, -2), labels.flatten()
        chunk = chunk or flat_labels.numel()
        if reduction == "sum" and torch.is_grad_enabled():
            return _SummedLoss.apply(flat, self.weight, flat_labels, chunk)
        parts = [losses for losses, _ in _chunks(flat, self.weight, flat_labels, chunk)]
        losses = torch.cat(parts).view_as(labels)
        return losses if reduction == "none" else losses.sum(dtype=torch.float64)


class _SummedLoss(torch.autograd.Function):
    """The sum, with its gradients made along with it: no logits are computed twice.

    The gradient of the weight is summed over the chunks in float32 (or wider).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float64)
        dhidden = torch.empty_like(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        dweight = torch.zeros_like(weight, dtype=wide)
        parts = zip(hidden.split(chunk), labels.split(chunk), dhidden.split(chunk), strict=True)
        losses_of = _chunks(hidden, weight, labels, chunk)
        for (part, label, dpart), (losses, log_p) in zip(parts, losses_of, strict=True):
            total += losses.sum(dtype=torch.float64)
            dlogits = _logit_gradients(log_p, label).to(weight.dtype)
            torch.mm(dlogits, weight, out=dpart)
            dweight += dlogits.t() @ part
        ctx.gradients = dhidden, dweight, chunk
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """`scale` multiplies in float32: rounded to bf16 it would change the learning rate."""
        (dhidden, dweight, chunk), ctx.gradients = ctx.gradients, None
        for part in dhidden.split(chunk):
            part.copy_(part.to(dweight.dtype) * scale)
        return dhidden, dweight.mul_(scale).to(dhidden.dtype), None, None


def _logit_gradients(log_p: Tensor, labels: Tensor) -> Tensor:
    """softmax - one at the label, 0 where IGNORED; takes the memory of `log_p` [n, V]."""
    ignored = (labels == IGNORED)[:, None]
    probabilities = log_p.exp_()
    probabilities.scatter_add_(1, labels.clamp(min=0)[:, None], -torch.ones_like(log_p[:, :1]))
    return probabilities.masked_fill_(ignored, 0)


def _chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of `chunk` tokens after another: their losses [n] and log probabilities [n, V]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    for part, label in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        log_p = F.log_softmax(F.linear(part, weight), -1, dtype=wide)
        yield F.nll_loss(log_p, label, ignore_index=IGNORED, reduction="none"), log_p
