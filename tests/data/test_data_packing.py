"""Packing, mixing and phases: nothing lost or repeated, rows full, shares exact at every prefix."""

import sysconfig
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorlm.data.epochs import SourceRows
from tensorlm.data.mixing import Mix
from tensorlm.data.packing import Pieces, RowPlan, pack, plan_rows, shuffled

packings = st.sampled_from(["best_fit", "concat"])


def count_tokens(seen: list[np.ndarray], pieces: Pieces) -> None:
    """Add 1 to the count of every token of the pieces."""
    for document, start, length in zip(pieces.document, pieces.start, pieces.length, strict=True):
        assert length > 0
        seen[document][start : start + length] += 1


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    seq_len=st.integers(2, 64),
    packing=packings,
    seed=st.integers(0, 5),
)
def test_every_token_is_in_exactly_one_row(
    lengths: list[int], seq_len: int, packing: str, seed: int
) -> None:
    plan = plan_rows(np.array(lengths), seq_len, packing, seed)
    seen = [np.zeros(n, dtype=int) for n in lengths]
    count_tokens(seen, plan.pieces)
    assert all((count == 1).all() for count in seen)
    assert ((plan.row_tokens > 0) & (plan.row_tokens <= seq_len)).all()
    again = plan_rows(np.array(lengths), seq_len, packing, seed)
    assert np.array_equal(plan.pieces.document, again.pieces.document)
    assert np.array_equal(plan.pieces.start, again.pieces.start)


def test_adjacent_parts_of_a_document_are_packed_as_one() -> None:
    parts = Pieces(np.array([1, 0, 1, 1]), np.array([8, 0, 0, 4]), np.array([6, 3, 4, 4]))
    plan = pack(parts, 16, "best_fit", 0)
    assert plan.num_rows == 2
    assert sorted(plan.pieces.length) == [3, 14]


@pytest.mark.parametrize("seq_len", [8192, 32768])
def test_best_fit_fills_rows_of_log_normal_documents(seq_len: int) -> None:
    sigma = 1.0
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(3000) - sigma**2 / 2, sigma, 40_000).astype(np.int64) + 1
    assert lengths.mean() == pytest.approx(3000, rel=0.02)
    assert plan_rows(lengths, seq_len, "best_fit", 0).fill >= 0.995


@pytest.mark.parametrize("seq_len", [8192, 32768])
def test_best_fit_wastes_no_row_of_the_standard_library(seq_len: int) -> None:
    files = Path(sysconfig.get_path("stdlib")).rglob("*.py")
    sizes = (file.stat().st_size for file in files if "site-packages" not in file.parts)
    lengths = np.array([size for size in sizes if size > 0])  # of one token a byte
    plan = plan_rows(lengths, seq_len, "best_fit", 0)
    fewest = -(-int(lengths.sum()) // seq_len)
    # Full but for the last row, which no packing can fill.
    assert lengths.sum() / ((plan.num_rows - (plan.num_rows == fewest)) * seq_len) >= 0.999


def test_permutations_stay_what_they_are() -> None:
    # A checkpoint counts rows in this order: another one would lose and repeat data.
    assert shuffled(10, 7, 1).tolist() == [7, 9, 6, 1, 4, 8, 3, 2, 5, 0]
    assert sorted(shuffled(1000, 3)) == list(range(1000))
    assert not np.array_equal(shuffled(1000, 3), shuffled(1000, 4))


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=7))
def test_shares_are_exact_at_every_prefix(weights: list[int]) -> None:
    total = sum(weights)
    num_rows = 2 * total + 3
    mix = Mix([float(weight) for weight in weights], num_rows)
    counts = [0] * len(weights)
    for row in range(num_rows):
        counts[mix.source(row)] += 1
        assert [mix.count(i, row + 1) for i in range(len(weights))] == counts
        for weight, count in zip(weights, counts, strict=True):
            assert abs(Fraction((row + 1) * weight, total) - count) < 1


def test_weights_are_the_decimals_that_they_print_as() -> None:
    assert Mix([0.7, 0.2, 0.1], 100).shares == [7, 2, 1]
    assert Mix([3, 1.5], 100).shares == [2, 1]
    fine = Mix([0.123456789, 1.0], 10)  # of a long period, only what is asked for is computed
    assert fine.count(0, 500) in (54, 55)
    assert sum(fine.source(row) == 0 for row in range(500)) == fine.count(0, 500)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=40),
    phases=st.lists(st.tuples(st.integers(2, 40), st.integers(0, 60)), max_size=3),
    last=st.integers(2, 64),
    packing=packings,
    seed=st.integers(0, 3),
)
def test_each_epoch_holds_every_token_once_whatever_the_phases(
    lengths: list[int], phases: list[tuple[int, int]], last: int, packing: str, seed: int
) -> None:
    source = SourceRows(np.array(lengths), [*phases, (last, None)], packing, seed)
    total, served = sum(lengths), 0
    seen = [np.zeros(n, dtype=int) for n in lengths]

    def serve(phase: int, row: int) -> None:
        nonlocal served
        plan, number = source.locate(phase, row)
        served += row_of(plan, number).num_tokens
        count_tokens(seen, row_of(plan, number))
        # No token comes again before all others have come as often.
        assert max(c.max() for c in seen) <= -(-served // total)
        assert source.num_tokens(phase, row + 1) == served

    for phase, (seq_len, num_rows) in enumerate(phases):
        for row in range(num_rows):
            serve(phase, row)
            assert source.locate(phase, row)[0].seq_len == seq_len
    row = 0
    while served % total or served < 2 * total:
        serve(len(phases), row)
        row += 1
    assert len({count for counts in seen for count in counts.tolist()}) == 1


def row_of(plan: RowPlan, number: int) -> Pieces:
    return plan.pieces[slice(plan.row_first[number], plan.row_first[number + 1])]


def test_a_phase_takes_whole_documents_and_leaves_the_others_whole() -> None:
    lengths = np.full(100, 60)
    source = SourceRows(lengths, [(64, 40), (128, None)], "best_fit", seed=1)
    first = {int(d) for row in range(40) for d in row_of(*source.locate(0, row)).document}
    assert len(first) == 40
    rest = source.last_plan.pieces
    assert set(rest.document.tolist()) == set(range(100)) - first
    assert (rest.length == 60).all()
