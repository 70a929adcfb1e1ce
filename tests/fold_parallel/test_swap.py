"""Swaps put every token, or head, where the documentation says, and back."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fold_parallel import create_grid
from fold_parallel.swap import columns_to_rows, heads_to_tokens, rows_to_columns, tokens_to_heads
from tests.fold_parallel.backends import device, ranks_and_backends, result
from tests.support.distributed import run_distributed


def token_numbers(batch: int, seq_len: int, heads: int) -> Tensor:
    """[B, T, H, 2] float64: (token, 100 batch + head) at each place."""
    shape = (batch, seq_len, heads)
    token = torch.arange(seq_len)[None, :, None].expand(shape)
    place = 100 * torch.arange(batch)[:, None, None] + torch.arange(heads)
    return torch.stack((token, place.expand(shape)), -1).double()


def swap_there_and_back(seq_len: int, inner: int, batch: int) -> list[Tensor]:
    grid = create_grid(dist.get_world_size())
    assert grid.swap_group is not None
    x = token_numbers(batch, seq_len, 3)[:, grid.tokens(seq_len)].to(device())
    x.requires_grad_()
    token = x.detach()[..., 0, 0].to(torch.int32)
    columns, column_token = rows_to_columns((x, token), inner, grid.swap_group)
    rows, row_token = columns_to_rows((columns, column_token), inner, grid.swap_group)
    assert torch.equal(rows, x)
    assert torch.equal(row_token, token)
    (gradient,) = torch.autograd.grad(columns, x, columns.detach() * 2)
    return [result(z) for z in (x, columns, column_token, gradient)]


@ranks_and_backends(2, 4)
@pytest.mark.parametrize(("rows_per_rank", "inner"), [(1, 4), (3, 8)])
def test_columns_are_the_inner_indices_of_a_rank_in_the_order_of_the_row(
    world_size: int, backend: str, rows_per_rank: int, inner: int
) -> None:
    seq_len = world_size * rows_per_rank * inner
    results = run_distributed(swap_there_and_back, world_size, seq_len, inner, 2, backend=backend)
    whole, width = token_numbers(2, seq_len, 3), inner // world_size
    for rank, (x, columns, column_token, gradient) in enumerate(results):
        owned = [t for t in range(seq_len) if t % inner // width == rank]
        assert torch.equal(columns, whole[:, owned])
        assert column_token[0].tolist() == owned
        assert torch.equal(gradient, 2 * x)


def swap_heads(seq_len: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    grid = create_grid(dist.get_world_size())
    assert grid.swap_group is not None
    x = token_numbers(2, seq_len, heads)[:, grid.tokens(seq_len)].to(device()).requires_grad_()
    (by_heads,) = tokens_to_heads((x,), grid.swap_group)
    (back,) = heads_to_tokens((by_heads,), grid.swap_group)
    assert torch.equal(back, x)
    (gradient,) = torch.autograd.grad(by_heads, x, by_heads.detach() * 2)
    return result(x), result(by_heads), result(gradient)


@ranks_and_backends(2, 4)
def test_heads_are_contiguous_blocks_over_all_tokens(world_size: int, backend: str) -> None:
    seq_len, heads = 3 * world_size, 2 * world_size
    results = run_distributed(swap_heads, world_size, seq_len, heads, backend=backend)
    whole = token_numbers(2, seq_len, heads)
    for rank, (x, by_heads, gradient) in enumerate(results):
        assert torch.equal(by_heads, whole[:, :, 2 * rank : 2 * rank + 2])
        assert torch.equal(gradient, 2 * x)
