"""Bytes sent by one shared layer, by the formulas of docs/sequence_parallelism.md."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Traffic(NamedTuple):
    """Bytes that all ranks send to others in one layer, in one direction, per token of the row."""

    halo: float  # to the next rank, before hop 1
    queries_keys: float  # swap that overlaps hop 1 (full layers: q, k and v to heads)
    values: float  # swap of z and its log-sum-exp after hop 1
    back: float  # swap of the output


def layer_traffic(
    seq_len: int,
    sp: int,
    fold: Sequence[int],
    *,
    heads: int,
    key_heads: int,
    head_dim: int,
    itemsize: int,
    backward: bool = False,
) -> Traffic:
    """Traffic of one layer's forward or backward (E = D; without the padding of messages).

    A swap sends (P-1)/P of a rank's data: q and k with a 4-byte position, then z with a log-sum-exp
    (4 bytes, or the itemsize if that is wider), then z. The halo is n_1 - 1 keys and values at each
    of P - 1 borders. In backward, gradients are sent in the other direction; positions have none.

    Args:
        seq_len, sp, fold: a legal combination (`check_sizes`).
        heads, key_heads, head_dim: H, K, D.
        itemsize: bytes of one element of q, k, v.
    """
    if sp == 1:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    swapped, per_head = (sp - 1) / sp, head_dim * itemsize
    position = 0 if backward else 4
    if not fold:
        to_heads = (heads + 2 * math.lcm(key_heads, sp)) * per_head + position * sp
        return Traffic(0.0, swapped * to_heads, 0.0, swapped * heads * per_head)
    return Traffic(
        halo=(sp - 1) * (fold[0] - 1) * 2 * key_heads * per_head / seq_len,
        queries_keys=swapped * ((heads + key_heads) * per_head + position),
        values=swapped * heads * (per_head + max(4, itemsize)),
        back=swapped * heads * per_head,
    )


class RoutedTraffic(NamedTuple):
    """Like `Traffic`, for a routed layer, or for a window layer, which has only the halo."""

    halo: float  # keys and values to the next ranks, before hop 1
    gather: float  # keys, values and document starts to all ranks, during hop 1
    choice: float  # the choices that later tokens of an open tile share, after hop 1


def routed_traffic(
    seq_len: int,
    sp: int,
    *,
    window: int,
    key_heads: int,
    head_dim: int,
    itemsize: int,
    top_k: int = 0,
    open_tile: int = 1,
    backward: bool = False,
) -> RoutedTraffic:
    """Traffic of a routed layer's forward or backward (E = D; without the padding of messages).

    Each rank sends its keys, values and a 4-byte document start per token to the P - 1 others. In
    backward, it sends them its gradients of their keys and values.

    Args:
        seq_len, sp: T and P; P must divide T.
        window, top_k, open_tile: settings of the layer; top_k = 0: a window layer.
        key_heads, head_dim: K, D.
        itemsize: bytes of one element of q, k, v.
    """
    keys_values = 2 * key_heads * head_dim * itemsize
    halo = _halo_tokens(seq_len, sp, min(window, seq_len) - 1) * keys_values / seq_len
    if not top_k:
        return RoutedTraffic(halo, 0.0, 0.0)
    gather = (sp - 1) * (keys_values + (0 if backward else 4))
    chosen = 0 if backward else key_heads * (top_k + 1) * 4
    choice = _halo_tokens(seq_len, sp, open_tile - 1) * chosen / seq_len
    return RoutedTraffic(halo, gather, choice)


def _halo_tokens(seq_len: int, sp: int, halo: int) -> int:
    """Tokens sent by all ranks: each receives the `halo` tokens before its own, if they exist."""
    return sum(min(halo, rank * (seq_len // sp)) for rank in range(sp))
