"""Sliding-window attention: hop 1 of the folded or routed sequence, without the later hops."""

from torch import Tensor

from .api import Backend, check_operator, hop
from .fold import Rotary, document_reach


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    doc_start: Tensor | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend to the last `window` tokens of the document, the token itself included.

    Args:
        q: [B, T, H, D], not rotated if `rotary` is given.
        k: [B, T, K, D] with H a multiple of K; query head h reads key head h // (H / K).
        v: [B, T, K, E].
        window: number of tokens, at least 1.
        doc_start, rotary, scale, backend: as in `tensor_attention`.

    Returns:
        [B, T, H, E] in the dtype of v.

    Raises:
        ValueError: the arguments do not match, or the backend does not support them.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    starts = check_operator(q, k, v, (), doc_start, None, rotary, scale, backend, q.shape[1])
    return hop(
        q, k, v, stride=1, length=window, reach=document_reach(starts, 1), rotary=rotary,
        scale=scale, backend=backend,
    )[0]  # fmt: skip
