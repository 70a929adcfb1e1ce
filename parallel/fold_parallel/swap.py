"""Swaps: an all-to-all that changes which part of the row a rank holds.

*Rows*: rank p holds the contiguous tokens [p T/P, (p+1) T/P), whole inner rows of n_1 tokens.
*Columns*: rank p holds the tokens of all inner rows whose inner index is in
[p n_1/P, (p+1) n_1/P), in the order of the row. A token's index among them is
floor(t / n_1) * n_1/P + (inner index within the column block). So a stride s = n_1 n_2 ... of an
outer axis becomes s / P, and floor(t / s) does not change: outer hops are local, with the same
steps and positions.
*Heads*: rank p holds the heads [p H/P, (p+1) H/P) of all tokens (full attention).

Shape letters as in `layout`.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .collectives import InFlight, start_all_to_all
from .layout import Layout


def start_rows_to_columns(
    tensors: Sequence[Tensor], inner_length: int, group: dist.ProcessGroup, left_out: int = 0
) -> InFlight:
    """Start `rows_to_columns`; the result's `wait` returns the columns."""
    return start_all_to_all(
        tensors, group, _rows(inner_length, group, left_out), _columns(inner_length, group)
    )


def rows_to_columns(
    tensors: Sequence[Tensor], inner_length: int, group: dist.ProcessGroup, left_out: int = 0
) -> tuple[Tensor, ...]:
    """Swap tensors [B, left_out + T/P, ...] from rows to columns, without their first tokens."""
    return start_rows_to_columns(tensors, inner_length, group, left_out).wait()


def columns_to_rows(
    tensors: Sequence[Tensor], inner_length: int, group: dist.ProcessGroup
) -> tuple[Tensor, ...]:
    """Swap tensors [B, T/P, ...] from columns back to rows."""
    return start_all_to_all(
        tensors, group, _columns(inner_length, group), _rows(inner_length, group)
    ).wait()


def tokens_to_heads(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Swap tensors [B, T/P, H, ...] to [B, T, H/P, ...] (after DeepSpeed-Ulysses)."""
    return start_all_to_all(tensors, group, _tokens(group), _heads(group)).wait()


def heads_to_tokens(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Swap tensors [B, T, H/P, ...] back to [B, T/P, H, ...]."""
    return start_all_to_all(tensors, group, _heads(group), _tokens(group)).wait()


def _rows(inner_length: int, group: dist.ProcessGroup, left_out: int = 0) -> Layout:
    """[B, R n_1, ...] is [B, R, P, C, ...]: each inner row is divided into column blocks."""
    ranks = dist.get_world_size(group)
    return Layout(axis=1, sizes=(-1, ranks, inner_length // ranks), place=2, left_out=left_out)


def _columns(inner_length: int, group: dist.ProcessGroup) -> Layout:
    """[B, P R C, ...] is [B, P, R, C, ...]: the inner rows of rank 0 come first."""
    ranks = dist.get_world_size(group)
    return Layout(axis=1, sizes=(ranks, -1, inner_length // ranks), place=1)


def _tokens(group: dist.ProcessGroup) -> Layout:
    """[B, T/P, H, ...] is [B, T/P, P, H/P, ...]."""
    return Layout(axis=2, sizes=(dist.get_world_size(group), -1), place=2)


def _heads(group: dist.ProcessGroup) -> Layout:
    """[B, T, H/P, ...] is [B, P, T/P, H/P, ...]."""
    return Layout(axis=1, sizes=(dist.get_world_size(group), -1), place=1)
