"""Inputs for which routed attention costs as much as in a trained model.

For each tile of neighboring tokens, a routed hop reads the union of their choices. Independent
random queries do not agree, so their union is several times that of a real model. Here queries are
a slow signal plus noise, mixed so that 16 neighbors open a given number of blocks. By default, it
is 2.3 times one token's choice, as measured on SmolLM2-135M before blocks had parts
(kernels/README.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tensor_attention import choose_blocks
from tensor_attention.routing import POOL

NEIGHBORS = 16
MEASURED_UNION = 2.3
_SLOW = 512  # tokens between independent values of the slow signal


class Route(NamedTuple):
    """Settings of routed attention."""

    window: int
    block: int
    top_k: int
    stretch: int
    pool: int = POOL

    def keys(self, length: int) -> float:
        """Mean number of keys in a token's window and own choice, in a document of `length`."""
        position = torch.arange(length, dtype=torch.float64)
        near = (position + 1).clamp(max=self.window)
        far = (position + 1 - self.window).clamp(min=0)
        return float((near + far.clamp(max=(self.top_k + 1) * self.block)).mean())


def agreeing_queries(k: Tensor, heads: int, route: Route, union: float = MEASURED_UNION) -> Tensor:
    """[1, T, H, D]: queries whose neighbors open `union` times one token's blocks.

    Bisection finds the share of the slow signal; `union_of_neighbors` measures the result.

    Args:
        k: keys [1, T, K, D].
        heads: H.
        route: settings with which the tokens choose.
        union: between 1 and `NEIGHBORS`; values out of reach yield the nearest possible union.
    """
    generator = torch.Generator(device=k.device).manual_seed(1)
    length, size = k.shape[1], k.shape[3]

    def draw(tokens: int) -> Tensor:
        return torch.randn(tokens, heads, size, device=k.device, generator=generator)

    anchors, noise = draw(length // _SLOW + 2), draw(length)
    token = torch.arange(length, device=k.device)
    weight = ((token % _SLOW) / _SLOW)[:, None, None]
    slow = (
        anchors[token // _SLOW] * (1 - weight).sqrt() + anchors[token // _SLOW + 1] * weight.sqrt()
    )
    low, high = 0.0, 1.0
    for _ in range(10):
        share = (low + high) / 2
        q = (share * slow + (1 - share**2) ** 0.5 * noise).to(k.dtype)[None]
        if union_of_neighbors(q, k, route) > union:
            low = share
        else:
            high = share
    return q


def union_of_neighbors(q: Tensor, k: Tensor, route: Route) -> float:
    """Number of blocks that 16 neighboring tokens open / number that one of them chooses."""
    choice = choose_blocks(
        q, k, window=route.window, block=route.block, top_k=route.top_k, pool=route.pool
    )
    first = route.window + (route.top_k + 1) * route.block  # from here on choices are complete
    choice = choice[:, -((choice.shape[1] - first) // NEIGHBORS * NEIGHBORS) :]
    opened = choice.unflatten(1, (-1, NEIGHBORS)).transpose(2, 3).flatten(3).sort(dim=-1).values
    distinct = (opened[..., 1:] != opened[..., :-1]).sum(-1) + 1
    return float(distinct.double().mean()) / (route.top_k + 1)
