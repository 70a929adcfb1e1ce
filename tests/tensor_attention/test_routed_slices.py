"""Queries that are a slice of the row choose, read and yield what they do in the whole row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_attention import routed_hop
from tensor_attention.api import Backend
from tests.tensor_attention.cases import (
    BACKENDS,
    choice_of,
    cotangent_like,
    doc_start_of,
    inputs,
    relative_error,
    rotary_table,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
LENGTHS = [22, 1, 41, 6]
ROUTE: dict[str, Any] = {"window": 5, "block": 3, "stretch": 2}
TOP_K = 2


def whole_row(open_tile: int, backend: Backend, **change: Any) -> dict[str, Any]:
    """Two rows of a batch with other documents; the state is that of no window."""
    num_tokens = sum(LENGTHS)
    q, k, v = inputs(num_tokens, 4, 2, batch=2)
    z, lse, _ = inputs(num_tokens, 4, 4, batch=2, seed=1)
    return {
        "q": q, "k": k, "v": v, "z": z, "lse": lse[..., 0],
        "options": {
            **ROUTE, "rotary": rotary_table(num_tokens, 4), "backend": backend,
            "doc_start": torch.cat((doc_start_of(LENGTHS), doc_start_of([num_tokens]))),
        },
        "open_tile": open_tile,
    } | change  # fmt: skip


def run(row: dict[str, Any], first: int, end: int, known: int, keys: int) -> dict[str, Tensor]:
    """Choice, state and gradients of the tokens first ... end - 1.

    The hop gets the choice of `known` tokens before them, and the first `keys` tokens of the row.
    """
    options = row["options"] | {"doc_start": row["options"]["doc_start"][:, :keys]}
    leaves = {n: row[n][:, first:end].clone().requires_grad_() for n in ("q", "z", "lse")}
    leaves |= {n: row[n][:, :keys].clone().requires_grad_() for n in ("k", "v")}
    q, k = row["q"][:, first - known : end], leaves["k"]
    choice = choice_of(q, k, top_k=TOP_K, first=first - known, **options)
    state = (leaves["z"], leaves["lse"])
    z, lse = routed_hop(
        leaves["q"], k, leaves["v"], choice, first=first, state=state, open_tile=row["open_tile"],
        **options,
    )  # fmt: skip
    num_tokens = row["q"].shape[1]
    cotangents = [
        cotangent_like(x.new_empty(x.shape[0], num_tokens, *x.shape[2:]))[:, first:end]
        for x in (z, lse)
    ]
    gradients = torch.autograd.grad(
        (z, lse), list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    named = {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {"choice": choice[:, known:], "z": z.detach(), "lse": lse.detach(), **named}


def joined(parts: list[dict[str, Tensor]], num_tokens: int) -> dict[str, Tensor]:
    """Of the whole row: gradients of keys and values added up, the rest side by side."""
    out = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name in ("dk", "dv"):
            padded = [x.new_zeros(x.shape[0], num_tokens, *x.shape[2:]) for x in tensors]
            for whole, x in zip(padded, tensors, strict=True):
                whole[:, : x.shape[1]] = x
            out[name] = torch.stack(padded).sum(0)
        else:
            out[name] = torch.cat(tensors, dim=1)
    return out


def assert_slices_are_the_row(
    row: dict[str, Any], borders: list[int], keys_end_with_queries: bool, tolerance: float
) -> None:
    num_tokens = row["q"].shape[1]
    expected = run(row, 0, num_tokens, 0, num_tokens)
    parts = []
    for first, end in zip(borders, [*borders[1:], num_tokens], strict=True):
        known = min(first, row["open_tile"] - 1)
        keys = end if keys_end_with_queries else num_tokens
        parts.append(run(row, first, end, known, keys))
    for name, x in joined(parts, num_tokens).items():
        if name == "choice":
            assert torch.equal(x, expected[name])
        else:
            assert relative_error(x, expected[name]) < tolerance, name


@both_backends
@pytest.mark.parametrize("keys_end_with_queries", [False, True])
@pytest.mark.parametrize("open_tile", [1, 4, 16])
@pytest.mark.parametrize("borders", [[0, 35], [0, 1, 7, 22, 23, 24, 50], [0, 30, 31, 69]], ids=str)
def test_slices_choose_yield_and_give_back_what_the_row_does(
    backend: Backend, borders: list[int], open_tile: int, keys_end_with_queries: bool
) -> None:
    row = whole_row(open_tile, backend)
    assert_slices_are_the_row(row, borders, keys_end_with_queries, 1e-13)


@both_backends
@pytest.mark.parametrize("open_tile", [1, 5])
def test_token_by_token_it_is_the_row(backend: Backend, open_tile: int) -> None:
    row = whole_row(open_tile, backend)
    assert_slices_are_the_row(row, list(range(sum(LENGTHS))), True, 1e-13)


@both_backends
def test_the_choice_of_more_tokens_before_changes_nothing(backend: Backend) -> None:
    row = whole_row(4, backend)
    least, more, all_before = (run(row, 40, 60, known, 70) for known in (3, 17, 40))
    for name, x in least.items():
        assert torch.equal(more[name], x), name
        assert torch.equal(all_before[name], x), name


@both_backends
def test_blocks_that_were_opened_before_the_slice_stay_open_in_its_first_tile(
    backend: Backend,
) -> None:
    row = whole_row(16, backend)
    q, k, options = row["q"], row["k"], row["options"]
    state = (row["z"][:, 60:], row["lse"][:, 60:])
    choice = choice_of(q, k, top_k=TOP_K, **options)
    outputs = []
    for forget in (False, True):
        known = choice[:, 45:].clone()
        known[:, :15] = torch.where(torch.tensor(forget), -1, known[:, :15])
        outputs.append(
            routed_hop(
                q[:, 60:], k, row["v"], known, first=60, state=state, open_tile=16, **options
            )[0]
        )
    # In the second row, one document, a tile ends with token 63.
    changed = (outputs[0] != outputs[1]).flatten(2).any(-1)[1]
    assert changed.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_aligned_slices_of_a_long_row_have_its_bits() -> None:
    q, k, v = (x.float() for x in inputs(1024, 4, 2, dim=8))
    rotary = rotary_table(1024, 8)
    options: dict[str, Any] = {
        "window": 40, "block": 16, "stretch": 2, "backend": "blocked",
        "rotary": type(rotary)(rotary.cos.float(), rotary.sin.float()),
        "doc_start": doc_start_of([300, 517, 207]),
    }  # fmt: skip
    choice = choice_of(q, k, top_k=3, **options)
    state = (torch.zeros_like(q), torch.zeros(q.shape[:3]))
    whole = routed_hop(q, k, v, choice, state=state, open_tile=16, **options)
    for first in (512, 576, 960):
        here = slice(first, first + 64)
        rows = (state[0][:, here], state[1][:, here])
        known = choice[:, first - 15 : first + 64]
        part = routed_hop(q[:, here], k, v, known, first=first, state=rows, open_tile=16, **options)
        assert torch.equal(part[0], whole[0][:, here])
        assert torch.equal(part[1], whole[1][:, here])


@pytest.mark.parametrize(
    ("first", "known", "message"),
    [
        (-1, 0, r"first must be between 0 and T - Q = 60, got -1"),
        (61, 0, r"first must be between 0 and T - Q = 60, got 61"),
        (30, 2, r"choice must cover 10 queries and 3 to 30 tokens before, got 12 tokens"),
        (2, 1, r"choice must cover 10 queries and 2 to 2 tokens before, got 11 tokens"),
        (2, 3, r"choice must cover 10 queries and 2 to 2 tokens before, got 13 tokens"),
        (0, 1, r"choice must cover 10 queries, got 11 tokens"),
    ],
)
def test_a_slice_that_does_not_fit_is_refused(first: int, known: int, message: str) -> None:
    q, k, v = inputs(70)
    state = (q[:, :10], torch.zeros(1, 10, 2, dtype=torch.float64))
    choice = torch.full((1, known + 10, 1, 2), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        routed_hop(
            q[:, :10], k, v, choice, window=5, block=3, first=first, state=state, open_tile=4
        )
    if "first" in message:
        with pytest.raises(ValueError, match=message):
            choice_of(q[:, :10], k, window=5, block=3, top_k=1, first=first)
