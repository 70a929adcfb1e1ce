"""Attention over a shared row equals attention over the whole row."""

from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fold_parallel import Grid, collectives, create_grid, sharded_tensor_attention
from tensor_attention import Rotary, tensor_attention
from tests.fold_parallel.backends import device, ranks_and_backends, require_equal_bits, result
from tests.fold_parallel.cases import Case, Results, joined, make_row, run, whole
from tests.support.distributed import run_distributed

# Documents that begin and end inside shards, on their borders, and one token off them.
MANY = (5, 40, 1, 1, 17, 1, 63)
CASES = [
    Case((8,), (128,)),
    Case((8,), MANY, key_heads=2),
    Case((16,), MANY, heads=2, bias=False),  # one inner row per rank at sp = 8
    Case((8, 2), (128,), heads=2, key_heads=2),
    Case((8, 2), MANY, batch=2, scale=0.3),
    Case((8, 3), (70, 122), key_heads=2, rotary=False),  # the outermost axis is not full
    Case((8, 2, 4), MANY),
    Case((8, 2), (1,) * 128, heads=2),
    Case((8, 64), MANY, heads=2),  # no token is as far as the outermost axis
]
FULL_CASES = [
    Case((), MANY, heads=8, key_heads=1),
    Case((), MANY, heads=8, key_heads=2, batch=2, scale=0.3),
    Case((), (128,), heads=8, key_heads=8, rotary=False),
    Case((), (128,), heads=24, key_heads=12),  # at sp = 8 neither divides the other
]
LOW = [
    replace(case, dtype=dtype) for case in CASES[:6] for dtype in (torch.float32, torch.bfloat16)
]


def shards_of_all(cases: list[Case], sp: int) -> list[Results]:
    grid = create_grid(sp)
    return [run(case, make_row(case), grid, device()) for case in cases]


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
@pytest.mark.parametrize("case", [*CASES, *LOW], ids=str)
def test_the_tensorized_forward_is_bitwise_that_of_the_whole_row(
    world_size: int, case: Case
) -> None:
    require_equal_bits(world_size, case.dtype)
    # Blocks, positions and softmaxes are those of the whole row, so are the matrix products. Full
    # attention multiplies other shapes (fewer heads at once); its last bit is up to the library.
    ours = sharded(world_size, "gloo")[case]
    assert torch.equal(ours["out"], whole(case, make_row(case))["out"])


def with_messages_of(least: int, cases: list[Case], sp: int) -> list[Results]:
    """Tensors of `least` bytes for each rank have a message of their own."""
    with patch.object(collectives, "OWN_MESSAGE", least):
        return shards_of_all(cases, sp)


@ranks_and_backends(2, 4)
def test_what_shares_a_message_changes_no_bit(world_size: int, backend: str) -> None:
    cases = [*CASES, *FULL_CASES, *LOW]
    ranks = run_distributed(with_messages_of, world_size, 1, cases, world_size, backend=backend)
    for i, case in enumerate(cases):
        ours, expected = joined([rank[i] for rank in ranks]), sharded(world_size, backend)[case]
        for name, x in expected.items():
            assert torch.equal(ours[name], x), f"{case}: {name}"


def changed_in_place(fold: tuple[int, ...], sp: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The output, doubled in place and as it is, and the gradients of k of both."""
    case, grid = Case(fold, MANY, heads=8, key_heads=2), create_grid(sp)
    row, tokens, gradients = make_row(case), grid.tokens(case.seq_len), []
    outputs = []
    for doubled in (True, False):
        q, k, v = (x[:, tokens].to(device()).requires_grad_() for x in (row.q, row.k, row.v))
        out = sharded_tensor_attention(q, k, v, fold, grid=grid)
        out = out.mul_(2) if doubled else out
        gradients.append(result(torch.autograd.grad(out.sum(), k)[0]))
        outputs.append(result(out))
    return outputs[0], outputs[1], gradients


@ranks_and_backends(2)
@pytest.mark.parametrize("fold", [(8, 2), (8,), ()], ids=str)
def test_the_output_may_be_changed_in_place(
    world_size: int, backend: str, fold: tuple[int, ...]
) -> None:
    for doubled, out, (gradient, half) in run_distributed(
        changed_in_place, world_size, fold, world_size, backend=backend
    ):
        assert torch.equal(doubled, 2 * out)
        assert torch.equal(gradient, 2 * half)


def change_one_token(fold: tuple[int, ...], sp: int) -> list[Tensor]:
    """This rank's outputs before and after each of TOKENS has changed."""
    case, grid = Case(fold, MANY, heads=8), create_grid(sp)
    row, tokens = make_row(case), grid.tokens(case.seq_len)
    doc_start = row.doc_start[:, tokens].to(device())
    outputs = []
    for token in (None, *TOKENS):
        tensors = [x.clone() for x in (row.q, row.k, row.v)]
        if token is not None:
            for x in tensors:
                x[:, token] += 1.5
        q, k, v = (x[:, tokens].to(device()) for x in tensors)
        out = sharded_tensor_attention(q, k, v, case.fold, grid=grid, doc_start=doc_start)
        outputs.append(result(out))
    return outputs


# Of the first document, beside a border, a document alone, and the last one.
TOKENS = [4, 10, 44, 45, 63, 64, 100]


@ranks_and_backends(1, 2, 4, 8)
@pytest.mark.parametrize("fold", [(8, 2), ()], ids=str)
def test_a_changed_token_changes_nothing_outside_the_rest_of_its_document(
    world_size: int, backend: str, fold: tuple[int, ...]
) -> None:
    ranks = run_distributed(change_one_token, world_size, fold, world_size, backend=backend)
    before, *after = (torch.cat(parts, dim=1) for parts in zip(*ranks, strict=True))
    doc_start = make_row(Case(fold, MANY)).doc_start[0]
    positions = torch.arange(len(doc_start))
    for token, out in zip(TOKENS, after, strict=True):
        changed = (before != out).flatten(2).any(-1)[0]
        expected = (doc_start == doc_start[token]) & (positions >= token)
        assert torch.equal(changed, expected), token


def recompute(case: Case, sp: int) -> list[list[Tensor]]:
    """Gradients of this rank's q, k, v: kept activations, then recomputed ones."""
    grid, row = create_grid(sp), make_row(case)
    tokens = grid.tokens(case.seq_len)
    results = []
    for again in (False, True):
        q, k, v = (x[:, tokens].to(device()).requires_grad_() for x in (row.q, row.k, row.v))

        def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sharded_tensor_attention(q, k, v, case.fold, grid=grid).sin()

        x = checkpoint(layer, q, k, v, use_reentrant=False) if again else layer(q, k, v)
        x = checkpoint(layer, x, k, v, use_reentrant=False) if again else layer(x, k, v)
        gradients = torch.autograd.grad(x, (q, k, v), row.cotangent[:, tokens].to(device()))
        results.append([result(gradient) for gradient in gradients])
    return results


@ranks_and_backends(2)
@pytest.mark.parametrize("fold", [(8, 2), ()], ids=str)
def test_recomputed_activations_give_the_same_gradients(
    world_size: int, backend: str, fold: tuple[int, ...]
) -> None:
    case = Case(fold, (128,), key_heads=2)
    for kept, again in run_distributed(recompute, world_size, case, world_size, backend=backend):
        for x, y in zip(kept, again, strict=True):
            assert torch.equal(x, y)


def two_rows() -> tuple[Results, int]:
    """Ranks 0, 1 share one row and ranks 2, 3 another."""
    grid = create_grid(2)
    case = [CASES[1], CASES[4]][grid.dp_rank]
    return run(case, make_row(case), grid, device()), grid.dp_rank


@ranks_and_backends(4)
def test_rows_of_different_sequence_groups_do_not_meet(world_size: int, backend: str) -> None:
    results = run_distributed(two_rows, world_size, backend=backend)
    for row, case in enumerate([CASES[1], CASES[4]]):
        ours = joined([x for x, dp_rank in results if dp_rank == row])
        for name, x in whole(case, make_row(case)).items():
            torch.testing.assert_close(ours[name], x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [CASES[4], FULL_CASES[1]], ids=str)
def test_one_rank_is_the_plain_operator_and_needs_no_process_group(case: Case) -> None:
    assert not dist.is_initialized()
    row = make_row(case)
    bias = row.hop_bias if case.fold else None
    options: dict[str, Any] = {
        "doc_start": row.doc_start, "hop_bias": bias, "rotary": row.rotary, "scale": 0.3,
        "backend": "dense",
    }  # fmt: skip
    ours = sharded_tensor_attention(row.q, row.k, row.v, case.fold, grid=Grid(), **options)
    assert torch.equal(ours, tensor_attention(row.q, row.k, row.v, case.fold, **options))


@pytest.mark.parametrize(
    ("fold", "tokens", "key_heads", "message"),
    [
        ([8], 12, 1, r"seq_len = 48, fold = \[8\] \(legal: sp in \[1, 2\]"),
        ([6], 12, 1, r"legal: sp in \[1, 2\]; or fold\[0\] a multiple of 4"),
        ([8], 8, 4, r"H % K must be 0"),
        ([], 8, 1, r"heads = 6 \(legal: sp in \[1, 2\]"),
    ],
)
def test_illegal_sizes_fail_before_anything_is_communicated(
    fold: list[int], tokens: int, key_heads: int, message: str
) -> None:
    # A grid without groups: any communication would fail in another way.
    grid = Grid(world_size=4, rank=1, sp=4)
    q, k = torch.zeros(1, tokens, 6, 4), torch.zeros(1, tokens, key_heads, 4)
    with pytest.raises(ValueError, match=message):
        sharded_tensor_attention(q, k, k, fold, grid=grid)


@pytest.mark.parametrize("fold", [[8], []], ids=str)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"doc_start": torch.zeros(3, 8)}, r"doc_start must be \[B, T\] = \[2, 8\]"),
        ({"doc_start": torch.zeros(2, 8)}, "doc_start must be integers"),
        ({"rotary": Rotary(torch.ones(32, 1), torch.ones(32, 1))}, r"rotary.cos .*got \[32, 1\]"),
        (
            {"rotary": Rotary(torch.ones(31, 2), torch.ones(31, 2))},
            "must have at least 32 positions, got 31",
        ),
        ({"hop_bias": torch.zeros(3, 4)}, r"hop_bias must be .*got \[3, 4\]"),
        ({"scale": 0.0}, "scale must be a positive number, got 0.0"),
        ({"backend": "tritn"}, 'got "tritn"'),
    ],
    ids=str,
)
def test_bad_arguments_fail_before_anything_is_communicated(
    fold: list[int], options: dict[str, Any], message: str
) -> None:
    grid = Grid(world_size=4, rank=1, sp=4)
    q, k = torch.zeros(2, 8, 4, 4), torch.zeros(2, 8, 2, 4)
    with pytest.raises(ValueError, match=message):
        sharded_tensor_attention(q, k, k, fold, grid=grid, **options)


@pytest.mark.parametrize("fold", [(8, 2), ()], ids=str)
@pytest.mark.parametrize("shape", [(2, 0), (0, 32)], ids=str)
def test_empty_rows_are_empty_results_and_nothing_is_communicated(
    fold: tuple[int, ...], shape: tuple[int, int]
) -> None:
    grid = Grid(world_size=4, rank=1, sp=4)
    q, k = torch.zeros(*shape, 4, 4, requires_grad=True), torch.zeros(*shape, 2, 4)
    out = sharded_tensor_attention(q, k, k, fold, grid=grid)
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


# Document starts of a whole row: of one row for the batch, outside of 0 ... t, in another dtype.
STARTS = {
    "of one row": lambda starts: starts[:1],
    "after their tokens": lambda starts: (starts + 9).expand(2, -1),
    "far after": lambda starts: starts.long() + 2**40,
    "before the row": lambda starts: starts.long() - 2**40,
    "in int16": lambda starts: starts.to(torch.int16),
}


def with_starts(fold: tuple[int, ...], sp: int) -> list[Tensor]:
    case, grid = Case(fold, MANY, batch=2, heads=4, key_heads=2), create_grid(sp)
    row, tokens = make_row(case), grid.tokens(case.seq_len)
    q, k, v = (x[:, tokens].to(device()) for x in (row.q, row.k, row.v))
    outputs = []
    for change in STARTS.values():
        doc_start = change(row.doc_start)[:, tokens].to(device())
        out = sharded_tensor_attention(q, k, v, fold, grid=grid, doc_start=doc_start)
        outputs.append(result(out))
    return outputs


@ranks_and_backends(2)
@pytest.mark.parametrize("fold", [(8, 2), ()], ids=str)
def test_document_starts_mean_what_they_mean_in_the_whole_row(
    world_size: int, backend: str, fold: tuple[int, ...]
) -> None:
    ranks = run_distributed(with_starts, world_size, fold, world_size, backend=backend)
    row = make_row(Case(fold, MANY, batch=2, heads=4, key_heads=2))
    for change, *parts in zip(STARTS.values(), *ranks, strict=True):
        doc_start = change(row.doc_start)
        whole_row = tensor_attention(row.q, row.k, row.v, fold, doc_start=doc_start)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole_row, rtol=1e-10, atol=1e-12)
