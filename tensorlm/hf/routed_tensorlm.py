"""A routed layer: a window, and the blocks of the past that a token chooses.

The cache stores rotated keys, and their means for the choice. This file is part of exported
folders. Shape letters: B batch, Q new tokens, T all tokens, N slots (`routing.py`), H query heads,
K key/value heads, D head size, P tokens before the new ones.
"""

import torch
from torch import Tensor

from .cache_tensorlm import RoutedLayer
from .configuration_tensorlm import Route
from .documents_tensorlm import Documents, row_starts
from .hop_tensorlm import hop_new

try:
    from tensor_attention import (
        Axis,
        Rotary,
        apply_rotary,
        choose_blocks,
        routed_attention,
        routed_hop,
    )
    from tensor_attention.routed_cached import choose_cached, routed_hop_cached
    from tensor_attention.routed_decode import attend_step, choose_step, make_step, rotate_step
    from tensor_attention.routing import block_starts, pooled_keys
except ImportError:
    routed_attention = None  # type: ignore[assignment]
    from .fold import Axis, Rotary, apply_rotary  # type: ignore[import-not-found, no-redef]
    from .routed_blocked import choose_blocks  # type: ignore[import-not-found, no-redef]
    from .routed_blocked import hop as routed_hop  # type: ignore[no-redef]
    from .routed_cached import (  # type: ignore[import-not-found, no-redef]
        choose_cached,
        routed_hop_cached,
    )
    from .routed_decode import (  # type: ignore[import-not-found, no-redef]
        attend_step,
        choose_step,
        make_step,
        rotate_step,
    )
    from .routing import block_starts, pooled_keys  # type: ignore[import-not-found, no-redef]

try:
    from tensor_attention.gpu.decode import decode_token, supports
    from tensor_attention.gpu.decode_prepare import prepare_token
except ImportError:
    decode_token = None  # type: ignore[assignment]

# Maximum number of new tokens for which gathering is faster than tiles of tokens (an estimate).
_GATHER_UP_TO = 16


def routed_documents(
    starts: Tensor | None, x: Tensor, num_seen: int, route: Route, rotary: Rotary
) -> Documents:
    """The documents of the new tokens `x` [B, Q, ...], as needed by routed layers."""
    row = row_starts(starts, x.shape[0], x.shape[1], num_seen, x.device)
    blocks = block_starts(row, route.block)
    if x.shape[1] > 1 or not num_seen:
        return Documents(starts, row, blocks)
    step = make_step(
        row, blocks, rotary, window=route.window, block=route.block, stretch=route.stretch,
        open_tile=route.open_tile,
    )  # fmt: skip
    return Documents(starts, row, blocks, step)


def attend_routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    rotary: Rotary,
    route: Route,
    scale: float,
    memory: RoutedLayer | None,
) -> Tensor:
    """Attend from Q new tokens to themselves and to the cached tokens.

    Args:
        q: [B, Q, H, D]; k, v: [B, Q, K, D]; not rotated.
        documents: from `routed_documents`.
        rotary: table of at least T positions.
        route: settings of the layer.
        scale: factor on the scores.
        memory: this layer's cache, to which the new tokens are added; None: Q = T.

    Returns:
        [B, Q, H, D].
    """
    if memory is None and routed_attention is not None and not _needs_gather(q):
        return routed_attention(
            q, k, v, **route._asdict(), doc_start=documents.starts, rotary=rotary, scale=scale
        )
    if memory is not None and documents.step is not None:
        return _attend_one(q, k, v, documents, route, scale, memory)
    assert documents.row is not None
    num_new, first = q.shape[1], 0 if memory is None else memory.get_seq_length()
    starts = documents.row[:, first:]
    positions = torch.arange(first, first + num_new, device=q.device)
    depth = positions.to(torch.int32) - starts
    far = (depth // route.stretch).long()
    near_q, near_k = apply_rotary(q, rotary, positions), apply_rotary(k, rotary, positions)
    choice = choices = _choose(q, k, documents, route, memory)
    q, k = apply_rotary(q, rotary, far), apply_rotary(k, rotary, far)
    if memory is not None:
        near_k = memory.near_rows.append(near_k)
        k, v = memory.update(k, v)
        choices = memory.choice_rows.append(choice)
    state = hop_new(
        near_q, near_k, v[:, -near_k.shape[1] :], Axis(1, route.window), depth, scale=scale
    )
    if num_new <= _GATHER_UP_TO or _needs_gather(q):
        return routed_hop_cached(
            q, k, v, choices, window=route.window, block=route.block, open_tile=route.open_tile,
            doc_start=starts, state=state, scale=scale,
        )[0]  # fmt: skip
    return routed_hop(
        q, k, v, choices, window=route.window, block=route.block, stretch=route.stretch,
        open_tile=route.open_tile, doc_start=documents.row, state=state, rotary=None, scale=scale,
        first=first,
    )[0]  # fmt: skip


def _attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    route: Route,
    scale: float,
    memory: RoutedLayer,
) -> Tensor:
    """`attend_routed` for a single new token."""
    assert documents.blocks is not None
    with torch.no_grad():
        pooled = _pooled(k, documents.blocks, route, memory)
        if uses_decode_kernels(q, k, v, documents, route, memory):
            return _decode(q, k, v, pooled, documents, route, scale, memory)
        choice = choose_step(q, pooled, documents.step, route.top_k)
    queries, (near_k, k) = rotate_step(q, k, documents.step)
    near_k = memory.near_rows.append(near_k)
    k, v = memory.update(k, v)
    choices = memory.choice_rows.append(choice)
    return attend_step(
        queries, (near_k, k), v, choices, documents.step, block=route.block, scale=scale
    )


def uses_decode_kernels(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, route: Route, memory: RoutedLayer
) -> bool:
    """Whether kernels decode this token: on a GPU, if no gradient is needed.

    The cache must have the dtype of `q`. It has not if, for example, only the prompt was read
    without autocast.
    """
    return (
        runs_kernels(q)
        and memory.has_dtype(q.dtype)
        and not any(x.requires_grad for x in (q, k, v))
        and not any(rows.requires_grad for rows in memory.all_rows())
        and supports(q, v, documents.step, route.top_k, route.block, route.pool)
    )


def runs_kernels(q: Tensor) -> bool:
    """Whether the decode kernels are installed, and run on the device of `q`."""
    return decode_token is not None and q.is_cuda and not torch.compiler.is_compiling()


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: Tensor,
    documents: Documents,
    route: Route,
    scale: float,
    memory: RoutedLayer,
) -> Tensor:
    """`_attend_one` by two kernels, which write the token to the memory."""
    near = memory.near_rows.reserve(k.shape, k.dtype, k.device)
    keys, values = memory.reserve(k, v)
    turned, scores = prepare_token(q, k, v, pooled, documents.step, near, keys, values)
    shape = (k.shape[0], 1, k.shape[2], route.top_k + 1)
    choices = memory.choice_rows.reserve(shape, torch.int32, k.device)
    return decode_token(
        turned, scores, near, keys, values, choices, documents.step, block=route.block,
        top_k=route.top_k, scale=scale,
    )  # fmt: skip


def _needs_gather(q: Tensor) -> bool:
    """Whether tiles cannot be used: in a compiled graph their sizes would depend on values."""
    has_kernels = q.is_cuda and routed_attention is not None
    return torch.compiler.is_compiling() and not has_kernels


@torch.no_grad()
def _choose(
    q: Tensor, k: Tensor, documents: Documents, route: Route, memory: RoutedLayer | None
) -> Tensor:
    """The choice [B, Q, K, top_k + 1] of the new tokens, from queries and keys before rotation.

    The memory does not hold the new tokens yet.
    """
    assert documents.row is not None
    assert documents.blocks is not None
    num_seen = 0 if memory is None else memory.get_seq_length()
    pooled = None if memory is None else _pooled(k, documents.blocks, route, memory)
    if pooled is None or not num_seen:
        return choose_blocks(
            q, k, window=route.window, block=route.block, top_k=route.top_k, pool=route.pool,
            doc_start=documents.row,
        )  # fmt: skip
    return choose_cached(
        q, pooled, documents.blocks[:, : pooled.shape[1]], documents.row, window=route.window,
        block=route.block, top_k=route.top_k,
    )  # fmt: skip


def _pooled(k: Tensor, blocks: Tensor, route: Route, memory: RoutedLayer) -> Tensor:
    """[B, N, P, K, D]: `pooled_keys` of the slots that can be far from the last new token.

    Those that later tokens cannot change are cached. The last one or two are computed each time,
    but only if a window of less than two blocks allows them to be far.

    Args:
        k: [B, Q, K, D] of the new tokens, which the memory does not hold yet; not rotated.
        blocks: [B, all slots], first tokens of their blocks.
        route: numbers of the layer.
        memory: of this layer.
    """
    num_tokens = memory.get_seq_length() + k.shape[1]
    recent = memory.recent_rows.append(k.detach())
    first = num_tokens - recent.shape[1]

    def pool(start: int, stop: int) -> Tensor:
        return pooled_keys(recent, blocks[:, start:stop], route.block, route.pool, first)

    known, settled = memory.pooled_rows.stop, memory.num_settled(num_tokens)
    kept = memory.pooled_rows.rows()
    if settled > known or kept is None:
        kept = memory.pooled_rows.append(pool(known, settled))
    num_far = max(0, (num_tokens - 1 - route.window) // route.block + 1)
    if num_far <= settled:
        return kept[:, :num_far]
    return torch.cat([kept, pool(settled, num_far)], dim=1)
