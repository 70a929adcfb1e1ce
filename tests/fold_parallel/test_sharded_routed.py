"""Routed and window attention over a shared row equal those over the whole row."""

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fold_parallel import (
    Grid,
    create_grid,
    sharded_routed_attention,
    sharded_window_attention,
)
from tensor_attention import Backend, Rotary, routed_attention, window_attention
from tests.fold_parallel.backends import device, ranks_and_backends, require_equal_bits, result
from tests.fold_parallel.cases import Case, Results, Row, joined, make_row
from tests.support.distributed import run_distributed

# Documents that begin and end inside slices, on their borders, and one token off them.
MANY = (5, 40, 1, 1, 17, 1, 63)


@dataclass(frozen=True)
class Route:
    window: int
    block: int
    top_k: int
    stretch: int = 1
    open_tile: int = 1


@dataclass(frozen=True)
class Shared:
    """A row, and the route of its tokens; None: the window alone."""

    row: Case
    window: int
    route: Route | None = None

    def __str__(self) -> str:
        numbers = (
            f"window {self.window}" if self.route is None else str(tuple(vars(self.route).values()))
        )
        return f"{numbers}, {self.row}"


def routed(row: Case, *numbers: int) -> Shared:
    return Shared(row, numbers[0], Route(*numbers))


CASES = [
    routed(Case((), (128,)), 8, 4, 2),
    routed(Case((), MANY, heads=3), 6, 5, 2, 3, 5),  # heads set no limit; blocks cross borders
    routed(Case((), MANY, key_heads=2, batch=2, scale=0.3), 8, 3, 1, 2, 16),
    routed(Case((), (70, 50), heads=2, key_heads=2, rotary=False), 5, 2, 3, 1, 40),
    routed(Case((), (128,), heads=2), 64, 16, 2, 4, 16),  # windows longer than a slice
    routed(Case((), MANY, heads=2), 200, 7, 1, 1, 2),  # and than the row
    routed(Case((), (1,) * 128, heads=2), 4, 2, 1),
    Shared(Case((), (128,)), 8),
    Shared(Case((), MANY, heads=3, batch=2), 13),
    Shared(Case((), MANY, key_heads=2, scale=0.3), 50),
    Shared(Case((), (70, 50), heads=2, rotary=False), 500),
    Shared(Case((), MANY, heads=2), 1),
]
# Rows whose slices are cut where tiles are: those of 64 tokens, and quarters of a window.
ALIGNED = [
    routed(Case((), (300, 200, 12), heads=2), 32, 8, 3, 4, 16),
    Shared(Case((), (300, 200, 12), heads=2), 64),
]
LOW = [
    replace(case, row=replace(case.row, dtype=dtype))
    for case in ALIGNED
    for dtype in (torch.float32, torch.bfloat16)
]


def attend(
    case: Shared, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None, **options: Any
) -> Tensor:
    """The operator over a shared row; without a grid, that over a whole row."""
    if case.route is None:
        if grid is None:
            return window_attention(q, k, v, window=case.window, **options)
        return sharded_window_attention(q, k, v, window=case.window, grid=grid, **options)
    if grid is None:
        return routed_attention(q, k, v, **asdict(case.route), **options)
    return sharded_routed_attention(q, k, v, **asdict(case.route), grid=grid, **options)


def options_of(case: Shared, row: Row, grid: Grid, on: torch.device) -> dict[str, Any]:
    rotary = None if row.rotary is None else Rotary(*(x.to(on) for x in row.rotary))
    doc_start = row.doc_start[:, grid.tokens(case.row.seq_len)].to(on)
    return {"doc_start": doc_start, "rotary": rotary, "scale": case.row.scale}


def run(case: Shared, grid: Grid | None, on: torch.device, **options: Any) -> Results:
    """Output and gradients of this rank's tokens; without a grid, of the whole row."""
    row, here = make_row(case.row), grid or Grid()
    tokens = here.tokens(case.row.seq_len)
    leaves = {
        n: x[:, tokens].to(on).requires_grad_()
        for n, x in (("q", row.q), ("k", row.k), ("v", row.v))
    }
    q, k, v = leaves.values()
    out = attend(case, q, k, v, grid, **options_of(case, row, here, on), **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), row.cotangent[:, tokens].to(on))
    named = zip(leaves, gradients, strict=True)
    return {"out": result(out)} | {f"d{name}": result(x) for name, x in named}


def run_all(cases: list[Shared], sp: int) -> list[Results]:
    grid = create_grid(sp)
    return [run(case, grid, device()) for case in cases]


@cache
def sharded(world_size: int, backend: str) -> dict[Shared, Results]:
    """All cases in one launch: starting ranks takes longer than computing."""
    cases = [*CASES, *ALIGNED, *LOW]
    ranks = run_distributed(run_all, world_size, cases, world_size, backend=backend)
    return {case: joined([rank[i] for rank in ranks]) for i, case in enumerate(cases)}


@cache
def whole(case: Shared) -> Results:
    return run(case, None, torch.device("cpu"))


@ranks_and_backends(2, 4, 8)
@pytest.mark.parametrize("case", [*CASES, *ALIGNED], ids=str)
def test_output_and_every_gradient_equal_those_of_the_whole_row(
    world_size: int, backend: str, case: Shared
) -> None:
    ours = sharded(world_size, backend)[case]
    for name, x in whole(case).items():
        error = (ours[name] - x).abs().max() / x.abs().max().clamp_min(1e-3)
        assert ours[name].shape == x.shape, name
        assert error <= 1e-10, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("case", [*ALIGNED, *LOW], ids=str)
def test_the_forward_of_aligned_slices_is_bitwise_that_of_the_whole_row(
    world_size: int, case: Shared
) -> None:
    require_equal_bits(world_size, case.row.dtype)
    assert torch.equal(sharded(world_size, "gloo")[case]["out"], whole(case)["out"])


def odd_slices() -> list[Results]:
    grid = create_grid(3)
    return [run(case, grid, device()) for case in ODD]


ODD = [routed(Case((), (50, 1, 48), heads=2), 7, 3, 2, 2, 6), Shared(Case((), (50, 1, 48)), 40)]


@ranks_and_backends(3)
def test_any_number_of_ranks_that_divides_the_row_will_do(world_size: int, backend: str) -> None:
    ranks = run_distributed(odd_slices, world_size, backend=backend)
    for i, case in enumerate(ODD):
        ours = joined([rank[i] for rank in ranks])
        for name, x in whole(case).items():
            torch.testing.assert_close(ours[name], x, rtol=1e-10, atol=1e-11)


# Of the first document, beside a border, a document alone, and of the last one.
TOKENS = [4, 10, 44, 45, 63, 64, 100]


def change_one_token(case: Shared, sp: int) -> list[Tensor]:
    """This rank's outputs before and after each of TOKENS has changed."""
    grid, row = create_grid(sp), make_row(case.row)
    tokens, outputs = grid.tokens(case.row.seq_len), []
    for token in (None, *TOKENS):
        tensors = [x.clone() for x in (row.q, row.k, row.v)]
        if token is not None:
            for x in tensors:
                x[:, token] += 1.5
        q, k, v = (x[:, tokens].to(device()) for x in tensors)
        out = attend(case, q, k, v, grid, **options_of(case, row, grid, device()))
        outputs.append(result(out))
    return outputs


@ranks_and_backends(2, 4)
@pytest.mark.parametrize("case", [CASES[1], CASES[8]], ids=str)
def test_a_changed_token_changes_nothing_outside_the_rest_of_its_document(
    world_size: int, backend: str, case: Shared
) -> None:
    case = replace(case, row=replace(case.row, batch=1))
    ranks = run_distributed(change_one_token, world_size, case, world_size, backend=backend)
    before, *after = (torch.cat(parts, dim=1) for parts in zip(*ranks, strict=True))
    doc_start = make_row(case.row).doc_start[0]
    position = torch.arange(len(doc_start))
    for token, out in zip(TOKENS, after, strict=True):
        # A tile that holds several documents computes products of another width.
        changed = ((before - out).abs() > 1e-14).flatten(2).any(-1)[0]
        may_change = (doc_start == doc_start[token]) & (position >= token)
        assert changed[token], token
        assert not changed[~may_change].any(), token


def recompute(case: Shared, sp: int) -> list[list[Tensor]]:
    """Gradients of this rank's q, k, v: kept activations, then recomputed ones."""
    grid, row = create_grid(sp), make_row(case.row)
    tokens, results = grid.tokens(case.row.seq_len), []
    options = options_of(case, row, grid, device())
    for again in (False, True):
        q, k, v = (x[:, tokens].to(device()).requires_grad_() for x in (row.q, row.k, row.v))

        def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(case, q, k, v, grid, **options).sin()

        x = checkpoint(layer, q, k, v, use_reentrant=False) if again else layer(q, k, v)
        x = checkpoint(layer, x, k, v, use_reentrant=False) if again else layer(x, k, v)
        gradients = torch.autograd.grad(x, (q, k, v), row.cotangent[:, tokens].to(device()))
        results.append([result(gradient) for gradient in gradients])
    return results


@ranks_and_backends(2)
@pytest.mark.parametrize("case", [CASES[2], CASES[9]], ids=str)
def test_recomputed_activations_give_the_same_gradients(
    world_size: int, backend: str, case: Shared
) -> None:
    for kept, again in run_distributed(recompute, world_size, case, world_size, backend=backend):
        for x, y in zip(kept, again, strict=True):
            assert torch.equal(x, y)


def two_rows() -> tuple[Results, int]:
    """Ranks 0, 1 share one row and ranks 2, 3 another."""
    grid = create_grid(2)
    return run([CASES[1], CASES[2]][grid.dp_rank], grid, device()), grid.dp_rank


@ranks_and_backends(4)
def test_rows_of_different_sequence_groups_do_not_meet(world_size: int, backend: str) -> None:
    results = run_distributed(two_rows, world_size, backend=backend)
    for row, case in enumerate([CASES[1], CASES[2]]):
        ours = joined([x for x, dp_rank in results if dp_rank == row])
        for name, x in whole(case).items():
            torch.testing.assert_close(ours[name], x, rtol=1e-10, atol=1e-12)


# Document starts of a whole row: of one row for the batch, outside of 0 ... t, in another dtype.
STARTS = {
    "of one row": lambda starts: starts[:1],
    "after their tokens": lambda starts: (starts + 9).expand(2, -1),
    "far after": lambda starts: starts.long() + 2**40,
    "before the row": lambda starts: starts.long() - 2**40,
    "in int16": lambda starts: starts.to(torch.int16),
    "none": lambda starts: None,
}


def with_starts(case: Shared, grid: Grid | None, on: torch.device) -> list[Tensor]:
    row, outputs, here = make_row(case.row), [], grid or Grid()
    tokens = here.tokens(case.row.seq_len)
    q, k, v = (x[:, tokens].to(on) for x in (row.q, row.k, row.v))
    for change in STARTS.values():
        starts = change(row.doc_start)
        starts = None if starts is None else starts[:, tokens].to(on)
        outputs.append(result(attend(case, q, k, v, grid, doc_start=starts)))
    return outputs


def with_starts_on_ranks(case: Shared, sp: int) -> list[Tensor]:
    return with_starts(case, create_grid(sp), device())


@ranks_and_backends(2)
@pytest.mark.parametrize("case", [CASES[2], CASES[8]], ids=str)
def test_document_starts_mean_what_they_mean_in_the_whole_row(
    world_size: int, backend: str, case: Shared
) -> None:
    ranks = run_distributed(with_starts_on_ranks, world_size, case, world_size, backend=backend)
    expected = with_starts(case, None, torch.device("cpu"))
    for name, *parts, out in zip(STARTS, *ranks, expected, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), out, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("case", [CASES[1], CASES[8]], ids=str)
def test_one_rank_is_the_plain_operator_and_needs_no_process_group(case: Shared) -> None:
    assert not dist.is_initialized()
    ours = run(case, Grid(), torch.device("cpu"))
    for name, x in whole(case).items():
        assert torch.equal(ours[name], x), name


both_kinds = pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=["routed", "window"])


@both_kinds
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"doc_start": torch.zeros(3, 8)}, r"doc_start must be \[B, T\] = \[2, 8\]"),
        ({"doc_start": torch.zeros(2, 8)}, "doc_start must be integers"),
        (
            {"rotary": Rotary(torch.ones(31, 2), torch.ones(31, 2))},
            "must have at least 32 positions, got 31",
        ),
        ({"scale": 0.0}, "scale must be a positive number, got 0.0"),
        ({"backend": "tritn"}, 'got "tritn"'),
    ],
    ids=str,
)
def test_bad_arguments_fail_before_anything_is_communicated(
    case: Shared, options: dict[str, Any], message: str
) -> None:
    grid = Grid(world_size=4, rank=1, sp=4)
    q, k = torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 4)
    with pytest.raises(ValueError, match=message):
        attend(case, q, k, k, grid, **options)


@both_kinds
def test_bad_numbers_fail_before_anything_is_communicated(case: Shared) -> None:
    grid = Grid(world_size=4, rank=1, sp=4)
    q = torch.zeros(2, 8, 2, 4)
    bad = Shared(case.row, 0, case.route and replace(case.route, window=0, block=1))
    with pytest.raises(ValueError, match=r"window .*0"):
        attend(bad, q, q, q, grid)


@both_kinds
@pytest.mark.parametrize("shape", [(2, 0), (0, 32)], ids=str)
def test_empty_rows_are_empty_results_and_nothing_is_communicated(
    case: Shared, shape: tuple[int, int]
) -> None:
    grid = Grid(world_size=4, rank=1, sp=4)
    q, k = torch.zeros(*shape, 4, 4, requires_grad=True), torch.zeros(*shape, 2, 4)
    out = attend(case, q, k, k, grid)
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


@ranks_and_backends(2)
@pytest.mark.parametrize("backend_of_hops", ["dense", "blocked"])
def test_every_hop_uses_the_chosen_backend(
    world_size: int, backend: str, backend_of_hops: Backend
) -> None:
    ranks = run_distributed(with_backend, world_size, backend_of_hops, world_size, backend=backend)
    for calls in ranks:
        assert calls == [
            f"{backend_of_hops}.hop",
            f"routed_{backend_of_hops}.choose_blocks",
            f"routed_{backend_of_hops}.hop",
        ]


def with_backend(backend: Backend, sp: int) -> list[str]:
    """The functions that an operator of this backend calls, in order."""
    from unittest.mock import patch

    from tensor_attention import api, routed_blocked, routed_dense

    grid, calls = create_grid(sp), list[str]()

    def logged(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        return call

    hops = {name: logged(f"{name}.hop", hop) for name, hop in api._HOPS.items()}
    with patch.dict(api._HOPS, hops):
        for module, name in ((routed_blocked, "routed_blocked"), (routed_dense, "routed_dense")):
            for attribute in ("choose_blocks", "hop"):
                setattr(
                    module, attribute, logged(f"{name}.{attribute}", getattr(module, attribute))
                )
        run(CASES[0], grid, device(), backend=backend)
    return calls
