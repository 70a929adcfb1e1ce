"""The batch: what `data` passes to `model`."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows, or one slice of each row, for one forward pass.

    Attributes:
        tokens, labels: [B, T] int64.
        doc_start: [B, T] int32, index in the row of the first token of each token's document.
        row_tokens: number of document tokens in each row of this slice; padding follows them.
        first_token: index in the row at which the slice begins.
        digest: hash of the tokens and their places. The sum over all ranks (modulo 2^64) identifies
            which tokens were at which place in which rows.
    """

    tokens: Tensor
    labels: Tensor
    doc_start: Tensor
    row_tokens: tuple[int, ...]
    first_token: int = 0
    digest: int = 0

    @property
    def num_labels(self) -> int:
        """Number of tokens with a label to predict."""
        return int((self.labels != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Number of document tokens, without padding."""
        return sum(self.row_tokens)

    @property
    def depth(self) -> Tensor:
        """[B, T] int64: number of earlier tokens in each token's document; 0 for padding."""
        return torch.arange(self.tokens.shape[1]) + self.first_token - self.doc_start

    @property
    def text_depth(self) -> Tensor:
        """[num_tokens] int64: `depth` without padding."""
        rows = zip(self.depth, self.row_tokens, strict=True)
        return torch.cat([depth[:count] for depth, count in rows])

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, doc_start, labels) on `device`: the arguments of `Llama.forward`."""
        tokens, doc_start, labels = (
            t.to(device, non_blocking=True) for t in (self.tokens, self.doc_start, self.labels)
        )
        return tokens, doc_start, labels


IGNORED = -100
