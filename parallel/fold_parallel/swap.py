"""Swaps: one all-to-all that changes which part of the row a rank holds.

*Rows*: rank p holds the contiguous tokens [p T/P, (p+1) T/P), whole inner rows of n_1 tokens.
*Columns*: rank p holds the tokens whose inner index is in [p n_1/P, (p+1) n_1/P), of all inner
rows, in the order of the row. A token's index among them is floor(t / n_1) * n_1/P + (inner index
within the column block), so a stride s = n_1 n_2 ... of an outer axis becomes s / P, and
floor(t / s) is the same number before and after: outer hops are local, with unchanged steps and
positions.
*Heads*: rank p holds the heads [p H/P, (p+1) H/P) of all tokens (full attention).

Shape letters: P ranks, B batch, T tokens of the whole row, R = T / (P n_1) inner rows per rank,
C = n_1 / P columns per rank, H heads.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .collectives import InFlight, start_all_to_all


def start_rows_to_columns(
    tensors: Sequence[Tensor], inner_length: int, group: dist.ProcessGroup
) -> InFlight:
    """Launch the swap of tensors [B, T/P, ...]; `finish_rows_to_columns` gives the columns."""
    ranks = dist.get_world_size(group)
    columns = inner_length // ranks
    # [B, R, P, C, ...] -> [P, B, R, C, ...]: the column blocks of each inner row go apart.
    return start_all_to_all(
        [x.unflatten(1, (-1, ranks, columns)).movedim(2, 0) for x in tensors], group
    )


def finish_rows_to_columns(swap: InFlight) -> tuple[Tensor, ...]:
    """Tensors [B, T/P, ...] in columns, from a swap that `start_rows_to_columns` launched."""
    # [P, B, R, C, ...] -> [B, P R C, ...]: the inner rows of rank 0 come first.
    return tuple(x.movedim(0, 1).flatten(1, 3) for x in swap.wait())


def rows_to_columns(
    tensors: Sequence[Tensor], inner_length: int, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Swap tensors [B, T/P, ...] from rows to columns."""
    return finish_rows_to_columns(start_rows_to_columns(tensors, inner_length, group))


def columns_to_rows(
    tensors: Sequence[Tensor], inner_length: int, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Swap tensors [B, T/P, ...] from columns back to rows."""
    ranks = dist.get_world_size(group)
    columns = inner_length // ranks
    chunks = [x.unflatten(1, (ranks, -1, columns)).movedim(1, 0) for x in tensors]
    received = start_all_to_all(chunks, group).wait()
    # [P, B, R, C, ...] -> [B, R, P, C, ...] -> [B, R n_1, ...]
    return tuple(x.movedim(0, 2).flatten(1, 3) for x in received)


def tokens_to_heads(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Swap tensors [B, T/P, H, ...] to [B, T, H/P, ...] (after DeepSpeed-Ulysses)."""
    ranks = dist.get_world_size(group)
    chunks = [x.unflatten(2, (ranks, -1)).movedim(2, 0) for x in tensors]
    received = start_all_to_all(chunks, group).wait()
    return tuple(x.movedim(0, 1).flatten(1, 2) for x in received)


def heads_to_tokens(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Swap tensors [B, T, H/P, ...] back to [B, T/P, H, ...]."""
    ranks = dist.get_world_size(group)
    chunks = [x.unflatten(1, (ranks, -1)).movedim(1, 0) for x in tensors]
    received = start_all_to_all(chunks, group).wait()
    # [P, B, T/P, H/P, ...] -> [B, T/P, P, H/P, ...]
    return tuple(x.movedim(0, 2).flatten(2, 3) for x in received)
