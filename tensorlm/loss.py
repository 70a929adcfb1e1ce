"""The output head and its token-summed cross-entropy, without all logits at one time."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
            chunk: tokens whose logits exist at one time, in forward and backward; 0: all.
            reduction: "sum" of the losses (a scalar), or "none": each, [...], 0 where IGNORED.
        """
        if labels is None:
            return super().forward(hidden)
        shape = labels.shape
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        chunk = chunk or labels.numel()
        parts = [
            checkpoint(self._losses, h, y, reduction, use_reentrant=False)
            for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
        ]
        if reduction == "none":
            return torch.cat(parts).view(shape)
        total = hidden.new_zeros((), dtype=torch.float64)
        for part in parts:
            total = total + part
        return total

    def _losses(self, hidden: Tensor, labels: Tensor, reduction: Reduction) -> Tensor:
        logits = F.linear(hidden, self.weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits.to(wide), labels, ignore_index=IGNORED, reduction="none")
        return losses if reduction == "none" else losses.sum(dtype=torch.float64)
