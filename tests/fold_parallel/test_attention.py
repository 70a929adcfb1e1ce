"""Attention over a shared row equals attention over the whole row, and costs what is documented."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.distributed import run_distributed
from tests.fold_parallel.backends import ranks_and_backends
from tests.fold_parallel.cases import Case, Results, joined, make_row, shards, whole

# Documents that begin and end inside shards, on their borders, and one token off them.
MANY = (5, 40, 1, 1, 17, 1, 63)
CASES = [
    Case((8,), (128,)),
    Case((8,), MANY, key_heads=2),
    Case((16,), MANY, heads=2, bias=False),  # one inner row per rank at sp = 8
    Case((8, 2), (128,), heads=2, key_heads=2),
    Case((8, 2), MANY, batch=2),
    Case((8, 3), (70, 122), key_heads=2, rotary=False),  # the outermost axis is not full
    Case((8, 2, 4), MANY),
    Case((8, 2), (1,) * 128, heads=2),
    Case((8, 64), MANY, heads=2),  # no token is as far as the outermost axis
]
FULL_CASES = [
    Case((), MANY, heads=8, key_heads=1),
    Case((), MANY, heads=8, key_heads=2, batch=2),
    Case((), (128,), heads=8, key_heads=8, rotary=False),
    Case((), (128,), heads=24, key_heads=12),  # at sp = 8 neither divides the other
]
LOW = [
    replace(case, dtype=dtype)
    for case in (*CASES, *FULL_CASES)
    for dtype in (torch.float32, torch.bfloat16)
]


def shards_of_all(cases: list[Case], sp: int) -> list[Results]:
    return [shards(case, sp) for case in cases]


@cache
def sharded(world_size: int, backend: str) -> dict[Case, Results]:
    """All cases in one launch: starting ranks takes longer than computing."""
    cases = [*CASES, *FULL_CASES, *LOW]
    ranks = run_distributed(shards_of_all, world_size, cases, world_size, backend=backend)
    return {case: joined([rank[i] for rank in ranks]) for i, case in enumerate(cases)}


@ranks_and_backends(2, 4, 8)
@pytest.mark.parametrize("case", [*CASES, *FULL_CASES], ids=str)
def test_output_and_every_gradient_equal_those_of_the_whole_row(
    world_size: int, backend: str, case: Case
) -> None:
    ours, expected = sharded(world_size, backend)[case], whole(case, make_row(case))
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        error = (ours[name] - x).abs().max() / x.abs().max().clamp_min(1e-3)
        assert ours[name].shape == x.shape, name
        assert error <= 1e-10, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("case", [*CASES, *FULL_CASES, *LOW], ids=str)
def test_the_forward_is_bitwise_that_of_the_whole_row(world_size: int, case: Case) -> None:
    ours = sharded(world_size, "gloo")[case]
    assert torch.equal(ours["out"], whole(case, make_row(case))["out"])
