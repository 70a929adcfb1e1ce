# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""How the program of a new token and a key head chooses blocks, and lists the open ones."""

import triton
import triton.language as tl


@triton.jit
def choose_slots(
    choice, scores, blocks, num_slots, TOP_K: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """choice [TOP_K]: blocks of the best slots, best first, then -1; ties: earlier slots first."""
    slot = tl.arange(0, SLOTS)
    left = tl.load(scores + slot, mask=slot < num_slots, other=float("-inf"))
    for i in range(0, TOP_K):
        best = tl.max(left, 0)
        where = tl.min(tl.where((left == best) & (left > float("-inf")), slot, SLOTS), 0)
        block = tl.load(blocks + where, mask=where < num_slots, other=-1)
        tl.store(choice + i, tl.where(where < num_slots, block, -1).to(tl.int32))
        left = tl.where(slot == where, float("-inf"), left)


@triton.jit
def list_open(
    opened, marks, choices, own, choice_row,
    TOKENS: tl.constexpr, C: tl.constexpr, OPEN: tl.constexpr,
):  # fmt: skip
    """Write the blocks that the tile's tokens chose to `opened`, each once; returns their number.

    `marks` has a place for each block. The last entry that names a block lists it.
    """
    entry = tl.arange(0, OPEN)
    exists = entry < TOKENS * C
    block = tl.load(choices + (entry // C) * choice_row + entry % C, mask=exists, other=-1)
    other = tl.load(own + entry // C, mask=exists, other=1)
    exists = exists & (block >= 0) & (other == 0)
    tl.store(marks + block, tl.full([OPEN], -1, tl.int32), mask=exists)
    tl.debug_barrier()
    tl.atomic_max(marks + block, entry, mask=exists)
    tl.debug_barrier()
    keeps = exists & (tl.load(marks + block, mask=exists, other=-1) == entry)
    place = tl.cumsum(keeps.to(tl.int32), 0) - 1
    tl.store(opened + place, block, mask=keeps)
    return tl.sum(keeps.to(tl.int32), 0)
