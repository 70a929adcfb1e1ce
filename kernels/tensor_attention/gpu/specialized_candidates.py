# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""The candidates of `specialized_choice`: a list per token, from which the best are kept.

A list has `CAPACITY` scores, then as many slots, in global memory that stays in the L2 cache.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .specialized import ROWS, barrier

CAPACITY = gl.constexpr(128)  # candidates that a token's list can hold
CHUNK = gl.constexpr(32)  # candidates compared at a time
LAST = gl.constexpr(2147483647)


@gluon.jit
def load_candidates(lists, row, column, here):
    """Scores and slots of candidates; -inf where not `here`."""
    at = lists + row[:, None] + column[None, :]
    slots = (at + ROWS * CAPACITY).to(gl.pointer_type(gl.int32), bitcast=True)
    score = gl.load(at, mask=here, other=float("-inf"))
    return score, gl.load(slots, mask=here, other=LAST)


@gluon.jit
def exchange(kept, ids, score, slot):
    """Replace the worst kept scores by better new ones, the best first; ties: upto slots first.

    kept, ids [64, KEEP]: scores and slots kept so far. score, slot [64, CHUNK]: candidates, whose
    slots ascend and are above all kept slots of the row.
    """
    best = gl.max(score, 1)
    worst = gl.min(kept, 1)
    while gl.max((best > worst).to(gl.int32), 0) > 0:
        enters = best > worst
        entering = gl.min(gl.where(score == best[:, None], slot, LAST), 1)
        leaving = gl.max(gl.where(kept == worst[:, None], ids, -LAST), 1)
        here = enters[:, None] & (ids == leaving[:, None])
        kept = gl.where(here, best[:, None], kept)
        ids = gl.where(here, entering[:, None], ids)
        score = gl.where(enters[:, None] & (slot == entering[:, None]), float("-inf"), score)
        best = gl.max(score, 1)
        worst = gl.min(kept, 1)
    return kept, ids


@gluon.jit
def keep_best(
    kept, ids, lists, count, taken,
    KEEP: gl.constexpr, KEPT: gl.constexpr,
):  # fmt: skip
    """Take the first `taken` candidates into empty places, and exchange the others."""
    barrier()  # all warps have written their candidates
    count = gl.convert_layout(count, gl.SliceLayout(1, KEPT))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, KEPT)) * CAPACITY
    column = gl.arange(0, KEEP, layout=gl.SliceLayout(0, KEPT))
    here = column[None, :] < gl.minimum(count, taken)[:, None]
    first_score, first_slot = load_candidates(lists, row, column, here)
    kept = gl.where(here, first_score, kept)
    ids = gl.where(here, first_slot, ids)
    for start in range(taken, gl.max(count, 0), CHUNK):
        later = start + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, KEPT))
        score, slot = load_candidates(lists, row, later, later[None, :] < count[:, None])
        kept, ids = exchange(kept, ids, score, slot)
    barrier()  # all warps have read the candidates
    return kept, ids
