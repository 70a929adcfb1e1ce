"""What the data hands to the model."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows, or one slice of them, for one forward pass.

    tokens, labels: [B, T] int64; doc_start: [B, T] int32, an index in the row; first_token: where
    in the row the slice begins; row_tokens: how many of each row's tokens here are of documents,
    padding follows them; digest: what the slices of all ranks add up to (modulo 2^64) tells which
    tokens stood where in which rows.
    """

    tokens: Tensor
    labels: Tensor
    doc_start: Tensor
    row_tokens: tuple[int, ...]
    first_token: int = 0
    digest: int = 0

    @property
    def num_labels(self) -> int:
        """Tokens that have something to predict."""
        return int((self.labels != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of documents: all but the padding."""
        return sum(self.row_tokens)

    @property
    def depth(self) -> Tensor:
        """[B, T] int64: how many tokens of its document precede each token; 0 for padding."""
        return torch.arange(self.tokens.shape[1]) + self.first_token - self.doc_start

    @property
    def text_depth(self) -> Tensor:
        """[num_tokens] int64: `depth` without the padding."""
        rows = zip(self.depth, self.row_tokens, strict=True)
        return torch.cat([depth[:count] for depth, count in rows])

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, doc_start, labels) on `device`: the arguments of `Llama.forward`."""
        tokens, doc_start, labels = (
            t.to(device, non_blocking=True) for t in (self.tokens, self.doc_start, self.labels)
        )
        return tokens, doc_start, labels


IGNORED = -100
