"""The rank grid and the sizes that ranks can share."""

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from fold_parallel import Grid, check_sizes, check_world, create_grid, legal_degrees
from tests.fold_parallel.backends import ranks_and_backends
from tests.support.distributed import run_distributed


@given(st.integers(1, 400), st.integers(1, 40), st.lists(st.integers(2, 24), max_size=2))
def test_sizes_pass_exactly_when_ranks_hold_whole_rows_and_whole_columns(
    seq_len: int, sp: int, fold: list[int]
) -> None:
    inner = fold[0] if fold else sp
    whole_rows = seq_len % sp == 0 and (not fold or seq_len // sp % inner == 0)
    legal = sp == 1 or (whole_rows and inner % sp == 0)
    assert (sp in legal_degrees(seq_len, fold)) == legal
    if legal:
        check_sizes(seq_len, sp, fold)
    else:
        with pytest.raises(ValueError, match=f"sp = {sp}, "[:-2]):
            check_sizes(seq_len, sp, fold)


@given(st.integers(1, 64), st.integers(1, 8), st.data())
def test_ranks_own_each_token_exactly_once(rows: int, sp: int, data: st.DataObject) -> None:
    seq_len = rows * sp
    dp = data.draw(st.integers(1, 3))
    grids = [Grid(dp * sp, rank, sp) for rank in range(dp * sp)]
    assert {(g.dp_rank, g.sp_rank) for g in grids} == {(d, s) for d in range(dp) for s in range(sp)}
    for d in range(dp):
        owned = [t for g in grids if g.dp_rank == d for t in range(seq_len)[g.tokens(seq_len)]]
        assert owned == list(range(seq_len))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (100, 4, [8]),
            "sp = 4 cannot share rows with seq_len = 100, fold = [8]"
            " (legal: sp in [1]; or seq_len a multiple of 32, such as 96 or 128)",
        ),
        (
            (96, 8, [16, 2]),
            "sp = 8 cannot share rows with seq_len = 96, fold = [16, 2]"
            " (legal: sp in [1, 2]; or seq_len a multiple of 128, such as 128)",
        ),
        (
            (64, 3, [8]),
            "sp = 3 cannot share rows with seq_len = 64, fold = [8]"
            " (legal: sp in [1, 2, 4, 8];"
            " or fold[0] a multiple of 3, and seq_len one of 3 x fold[0])",
        ),
        (
            (10, 4, []),
            "sp = 4 cannot share rows with seq_len = 10"
            " (legal: sp in [1, 2, 5, 10]; or seq_len a multiple of 4, such as 8 or 12)",
        ),
        (
            (64, 8, [8], 12),
            "sp = 8 cannot share rows with seq_len = 64, fold = [8], heads = 12"
            " (legal: sp in [1, 2, 4])",
        ),
        (  # Other rows would not help: 3 ranks cannot share 32 heads.
            (64, 3, [], 32),
            "sp = 3 cannot share rows with seq_len = 64, heads = 32"
            " (legal: sp in [1, 2, 4, 8, 16, 32])",
        ),
        (
            (64, 3, [8], 32),
            "sp = 3 cannot share rows with seq_len = 64, fold = [8], heads = 32"
            " (legal: sp in [1, 2, 4, 8])",
        ),
        (
            (64, 0, [8]),
            "sp = 0 cannot share rows with seq_len = 64, fold = [8] (legal: sp in [1, 2, 4, 8])",
        ),
    ],
)
def test_illegal_sizes_are_one_line_that_lists_legal_ones(
    sizes: tuple[int, int, list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match="legal") as error:
        check_sizes(*sizes)
    assert str(error.value) == message
    assert not dist.is_initialized()


def test_a_degree_that_does_not_divide_the_world_is_an_error_that_lists_those_that_do() -> None:
    with pytest.raises(ValueError, match="legal") as error:
        check_world(12, 5)
    assert str(error.value) == "sp = 5 does not divide 12 ranks (legal sp: 1, 2, 3, 4, 6, 12)"
    with pytest.raises(ValueError, match="legal sp: 1"):
        create_grid(2)


def test_without_a_process_group_the_grid_is_one_rank() -> None:
    assert create_grid(1) == Grid(world_size=1, rank=0, sp=1)


def describe_grid(sp: int) -> tuple[int, int, int, list[list[int]]]:
    grid = create_grid(sp)
    groups = [g for g in (grid.sp_group, grid.swap_group) if g is not None]
    assert len(set(groups)) == len(groups), "halo and swap share a communicator"
    members = [dist.get_process_group_ranks(g) for g in groups]
    return grid.dp, grid.dp_rank, grid.sp_rank, members


@ranks_and_backends(4)
def test_consecutive_ranks_share_a_row_and_two_communicators(world_size: int, backend: str) -> None:
    results = run_distributed(describe_grid, world_size, 2, backend=backend)
    for rank, (dp, dp_rank, sp_rank, members) in enumerate(results):
        first = rank // 2 * 2
        assert (dp, dp_rank, sp_rank) == (2, rank // 2, rank % 2)
        assert members == [[first, first + 1], [first, first + 1]]


@ranks_and_backends(2)
def test_sp_of_one_makes_no_groups(world_size: int, backend: str) -> None:
    results = run_distributed(describe_grid, world_size, 1, backend=backend)
    assert results == [(2, 0, 0, []), (2, 1, 0, [])]
