"""One hop for the newest tokens of a sequence. This file is part of exported folders.

Shape letters: B batch, Q new tokens, T all tokens, H query heads, K key/value heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from tensor_attention import Axis, Rotary, hop
    from tensor_attention.cached import hop_cached
except ImportError:
    from .blocked import hop as hop_blocked  # type: ignore[import-not-found]
    from .cached import hop_cached  # type: ignore[import-not-found, no-redef]
    from .fold import Axis, HopInputs, Rotary  # type: ignore[import-not-found, no-redef]

    def hop(q: Tensor, k: Tensor, values: Tensor, **others: Any) -> Any:  # type: ignore[misc]
        """Replaces `tensor_attention.hop` if that package is not installed."""
        return hop_blocked(HopInputs(q, k, values, **others))


# If there are more unread rows per new query than this, gathering the visited entries is faster
# than the kernel. Measured on a CPU. For GPUs an estimate: gathering for 65,536 queries took about
# a second, a hop of 131,072 rows takes the kernel 2 ms.
_GATHER_FROM, _GATHER_FROM_ON_GPU = 4, 256


def depth_of(doc_start: Tensor | None, q: Tensor, num_seen: int) -> Tensor:
    """[B, Q] int32: distance of each new token from the first token of its document.

    Args:
        doc_start: [B, Q] document starts of the new tokens; None: all are 0.
        q: [B, Q, H, D].
        num_seen: T - Q.
    """
    positions = torch.arange(num_seen, num_seen + q.shape[1], device=q.device)
    depth = positions if doc_start is None else positions - doc_start
    return depth.to(torch.int32).expand(q.shape[0], -1)


def hop_new(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    axis: Axis,
    reach: Tensor,
    *,
    scale: float,
    rotary: Rotary | None = None,
    bias: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One hop for the last Q of T tokens; arguments as in `hop_cached`.

    For stride 1, `k` may also have only the last tokens, as far as the hop reaches.

    A few queries gather the entries that they visit. Many queries (a prompt, or a long part of it)
    run the kernel on the tokens within reach, with padding before them that is not read. This is
    valid from any first token, since a hop moves by whole strides and only differences of positions
    matter.
    """
    num_tokens, num_new = k.shape[1], q.shape[1]
    first = max(0, num_tokens - num_new - (axis.length - 1) * axis.stride)
    pad = num_tokens - num_new - first
    if pad > num_new * (_GATHER_FROM_ON_GPU if q.is_cuda else _GATHER_FROM):
        return hop_cached(
            q, k, values, stride=axis.stride, length=axis.length, reach=reach, bias=bias,
            state=state, rotary=rotary, scale=scale,
        )  # fmt: skip
    if pad or first:
        q, reach = F.pad(q, (0, 0, 0, 0, pad, 0)), F.pad(reach, (pad, 0))
        k, values = k[:, first:], values[:, -pad - num_new :]
        if state is not None:
            state = (F.pad(state[0], (0, 0, 0, 0, pad, 0)), F.pad(state[1], (0, 0, pad, 0)))
    z, lse = hop(
        q, k, values, stride=axis.stride, length=axis.length, reach=reach, bias=bias, state=state,
        rotary=rotary, scale=scale,
    )  # fmt: skip
    return z[:, pad:], lse[:, pad:]
