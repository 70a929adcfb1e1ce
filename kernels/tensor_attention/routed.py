"""The routed axis: a window, and a few blocks beyond it that each token chooses.

`routed_attention` is hop 1 (the window) and one routed hop that starts from its state. The choice
is a separate function, so that it can be inspected, kept or replaced. The mathematics and
measurements are in `kernels/README.md`. Routing by mean keys follows MoBA (Lu et al., 2025) and
InfLLM-V2 (2025).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import routed_blocked, routed_dense
from .api import Backend, chosen_backend, hop
from .checks import check_heads, check_rotary, check_scale, check_state, per_token
from .fold import Rotary, State, document_reach
from .routing import POOL, check_choice_of_blocks, validate_route

# Takes a function that chooses; returns its choice, or the choice kept from an earlier call.
Keep = Callable[[Callable[[], Tensor]], Tensor]


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    block: int,
    top_k: int,
    pool: int = POOL,
    stretch: int = 1,
    open_tile: int = 1,
    doc_start: Tensor | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    keep: Keep | None = None,
) -> Tensor:
    """Attend to the last `window` tokens and to the chosen blocks before them, in one softmax.

    Args:
        q: [B, T, H, D], not rotated if `rotary` is given.
        k: [B, T, K, D] with H a multiple of K; query head h reads key head h // (H / K).
        v: [B, T, K, E].
        window: number of tokens that are always read, including the token itself.
        block: tokens per block, at most `window`.
        top_k: blocks that each token and key head chooses, in addition to the document's first.
        pool: tokens whose mean key is one candidate; a block counts as its best candidate.
        stretch: rotary positions beyond the window are floor((t - d(t)) / stretch), where d(t) is
            the first token of t's document.
        open_tile: tokens per tile, counted from the document's start: a token also reads the blocks
            that earlier tokens of its tile chose. 1: only its own.
        doc_start: [B, T] integer (or [1, T] for all rows of the batch), index in the row of the
            first token of each token's document; None: one document per row. An index after t
            counts as t, one before the row as 0.
        rotary: table of at least T positions.
        scale: factor on the scores, 1 / sqrt(D) by default.
        backend: as in `tensor_attention`.
        keep: see `Keep`; spares a recomputed forward pass from choosing again.

    Returns:
        [B, T, H, E] in the dtype of v.

    Raises:
        ValueError: the arguments do not match, or the backend does not support them.
    """
    validate_route(window, block, top_k, stretch, open_tile, pool)
    doc_start = _checked_starts(q, k, v, doc_start, rotary, scale)
    state = hop(
        q, k, v, stride=1, length=window, reach=document_reach(doc_start, 1), rotary=rotary,
        scale=scale, backend=backend,
    )  # fmt: skip

    def choose() -> Tensor:
        return _choice(q, k, window, block, top_k, pool, doc_start, backend)

    choice = choose() if keep is None else keep(choose)
    return routed_hop(
        q, k, v, choice, window=window, block=block, stretch=stretch, open_tile=open_tile,
        doc_start=doc_start, state=state, rotary=rotary, scale=scale, backend=backend,
    )[0]  # fmt: skip


@torch.no_grad()
def choose_blocks(
    q: Tensor,
    k: Tensor,
    *,
    window: int,
    block: int,
    top_k: int,
    pool: int = POOL,
    doc_start: Tensor | None = None,
    first: int = 0,
    ordered: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """The blocks that each token and key head reads beyond its window; no gradient.

    The score of a far block is that of its best part of `pool` tokens: <sum over the group of
    q_h(t), mean over the part of k(u)>. It depends on content, not on positions. Sums and means are
    rounded to the dtype of q and k; products are in float32 or wider. Arguments as in
    `routed_attention`, except:

    Args:
        q: [B, Q, H, D]: queries may be a slice of the row, the tokens first ... first + Q - 1.
        k: [B, T, K, D] of the whole row, T at least first + Q; so is doc_start [B, T].
        first: index in the row of the first query.
        ordered: False returns the blocks of a token in any order, which is faster.

    Returns:
        [B, Q, K, top_k + 1] int32: indices of blocks in the document, ascending, then -1 if fewer
        are far. If block 0 is far, it is chosen in addition to the `top_k` best of the others. Ties
        go to the earlier block.
    """
    validate_route(window, block, top_k, 1, 1, pool)
    doc_start = _checked_starts(q, k, k, doc_start, None, None, first)
    choice = _choice(q, k, window, block, top_k, pool, doc_start, backend, first)
    if not ordered:
        return choice
    nothing = torch.iinfo(torch.int32).max
    ascending = torch.where(choice < 0, nothing, choice).sort(dim=-1).values
    return torch.where(ascending == nothing, -1, ascending)


def _routed_backend(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    values: Tensor,
    block: int,
    open_tile: int,
    pool: int = POOL,
) -> Backend:
    """Replace "auto" by a backend: "triton" only if its kernels support these numbers."""
    chosen = chosen_backend(backend, q, k, values, False)
    if backend == "auto" and chosen == "triton":
        from .gpu.routed_op import why_not

        return "blocked" if why_not(q, k, values, block, open_tile, pool) else "triton"
    return chosen


def _checked_starts(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    doc_start: Tensor | None,
    rotary: Rotary | None,
    scale: float | None,
    first: int | None = None,
) -> Tensor:
    """Check all shapes; returns document starts [B, T] int32 within 0 ... t (zeros for None).

    Raises:
        ValueError: the arguments do not match.
    """
    check_heads(q, k, values, "values", of_queries=False, first=first)
    check_rotary(rotary, k.shape[1], q)
    check_scale(scale)
    if doc_start is None:
        return torch.zeros(k.shape[:2], dtype=torch.int32, device=q.device)
    position = torch.arange(k.shape[1], dtype=torch.int32, device=q.device)
    return position - document_reach(per_token("doc_start", doc_start, k), 1)


@torch.no_grad()
def _choice(
    q: Tensor,
    k: Tensor,
    window: int,
    block: int,
    top_k: int,
    pool: int,
    doc_start: Tensor,
    backend: Backend,
    first: int = 0,
) -> Tensor:
    """`choose_blocks` in any order, as the hop takes it: the kernels need not sort."""
    backend = _routed_backend(backend, q, k, k, block, 1, pool)
    if backend == "triton":
        from .gpu.routed_op import choose_blocks as run
    else:
        run = (routed_dense if backend == "dense" else routed_blocked).choose_blocks
    return run(
        q, k, window=window, block=block, top_k=top_k, pool=pool, doc_start=doc_start, first=first
    )


def routed_hop(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    choice: Tensor,
    *,
    window: int,
    block: int,
    stretch: int = 1,
    open_tile: int = 1,
    doc_start: Tensor | None = None,
    state: State,
    rotary: Rotary | None = None,
    scale: float | None = None,
    first: int = 0,
    backend: Backend = "auto",
) -> State:
    """Attend to the tokens of open blocks that are before the window, starting from a state.

    Token t attends to each u <= t - window in an open block. The result is joined to the window's
    state by one log-sum-exp.

    Queries may be a slice of the row: the tokens first ... first + Q - 1. They attend to the same
    tokens as in the whole row. The gradients of k and values are those of these queries only.

    Args:
        q: [B, Q, H, D].
        k: [B, T, K, D] of the whole row, T at least first + Q; so is doc_start [B, T].
        values: [B, T, K, E] of the whole row.
        choice: [B, P + Q, K, C] int32 as from `choose_blocks`, in any order, -1 for none. Every
            block must be full, begin at or before t - window, and occur once per token. The last Q
            are the queries' choices. The P before them, at least min(first, open_tile - 1), are
            needed for the tile of the first query.
        window, block, stretch, open_tile, doc_start, rotary, scale, backend: as in
            `routed_attention`.
        state: (z [B, Q, H, E], lse [B, Q, H]) of the window.
        first: index in the row of the first query.

    Returns:
        (z [B, Q, H, E] in the dtype of `values`, lse [B, Q, H] in float32 or wider).

    Raises:
        ValueError: the arguments do not match, or the backend does not support them.
    """
    validate_route(window, block, 1, stretch, open_tile)
    doc_start = _checked_starts(q, k, values, doc_start, rotary, scale, first)
    check_state(state, q, values)
    check_choice_of_blocks(choice, k, q.shape[1], first, open_tile)
    backend = _routed_backend(backend, q, k, values, block, open_tile)
    if backend == "triton":
        from .gpu.routed_op import hop as run
    else:
        run = (routed_dense if backend == "dense" else routed_blocked).hop
    return run(
        q, k, values, choice, window=window, block=block, stretch=stretch, open_tile=open_tile,
        doc_start=doc_start, state=state, rotary=rotary,
        scale=q.shape[3] ** -0.5 if scale is None else scale, first=first,
    )  # fmt: skip
