"""Tensorized attention: the public operator, a loop of hops over the folded axes.

Which implementation runs is decided here and only by the arguments: `triton_op` and `triton_chain`
are imported on first use, so that a machine without triton has the other backends.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from . import blocked, dense
from .fold import Axis, Rotary, document_ahead, document_reach, fold_axes, line_digit

Mode = Literal["distance", "fold"]
Backend = Literal["auto", "dense", "blocked", "triton"]
State = tuple[Tensor, Tensor]

_HOPS: dict[str, Callable[..., State]] = {"dense": dense.hop, "blocked": blocked.hop}


def hop(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    *,
    stride: int,
    length: int,
    reach: Tensor,
    bias: Tensor | None = None,
    state: State | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    ahead: Tensor | None = None,
    backend: Backend = "auto",
) -> State:
    """One hop by the chosen backend; arguments and results as in `dense.hop`."""
    backend = _chosen(backend, q, k, values, ahead is not None)
    run = _HOPS[backend] if backend in _HOPS else _triton_hop()
    return run(
        q, k, values, stride=stride, length=length, reach=reach, bias=bias, state=state,
        rotary=rotary, scale=scale, ahead=ahead,
    )  # fmt: skip


def tensor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fold: Sequence[int],
    *,
    doc_start: Tensor | None = None,
    hop_bias: Tensor | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    mode: Mode = "distance",
    causal: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Attend along each axis of the folded sequence in turn (after Feng et al., EMNLP 2024).

    Args:
        q: [B, T, H, D], not rotated when `rotary` is given.
        k: [B, T, K, D] with H a multiple of K; query head h reads key head h // (H / K).
        v: [B, T, K, E].
        fold: lengths of the inner axes, innermost first; [] is full attention.
        doc_start: [B, T] integer, index in the row of the first token of each token's document;
            None: one document per row.
        hop_bias: [len(fold), H], added to the scores of hops 2, 3, ... (distance mode only).
        rotary: table of at least T positions; axis i uses position floor(t / stride_i).
        scale: factor on the scores, 1 / sqrt(D) by default.
        mode: "distance" folds the distance t - u and ends in one joint softmax (kernels/README.md);
            "fold" attends inside the lines of the folded tensor, one softmax per hop, as the paper.
        causal: False lets tokens look ahead too (fold mode only: the encoder case).
        backend: "dense" is the T x T definition, "blocked" plain PyTorch, "triton" the GPU kernels
            (causal only); "auto" is "triton" for CUDA tensors that it covers, else "blocked".

    Returns:
        [B, T, H, E] in the dtype of v.

    Raises:
        ValueError: on a combination of arguments that has no meaning.
    """
    _check(q, k, v, fold, hop_bias, rotary, mode, causal)
    if doc_start is None:
        doc_start = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    axes = fold_axes(fold, q.shape[1])
    bounds = [_bounds(doc_start, axis, mode, causal) for axis in axes]
    if _chosen(backend, q, k, v, not causal) == "triton":
        from .triton_chain import chain

        return chain(
            q, k, v, axes, [_causal_reach(*pair) for pair in bounds], hop_bias=hop_bias,
            rotary=rotary, scale=scale, joint=mode == "distance",
        )  # fmt: skip
    z, state = v, None
    for i, (axis, (reach, ahead)) in enumerate(zip(axes, bounds, strict=True)):
        z, lse = hop(
            q, k, z, stride=axis.stride, length=axis.length, reach=reach, ahead=ahead,
            bias=hop_bias[i - 1] if hop_bias is not None and i > 0 else None,
            state=state, rotary=rotary, scale=scale, backend=backend,
        )  # fmt: skip
        state = (z, lse) if mode == "distance" else None
    return z


def _chosen(backend: Backend, q: Tensor, k: Tensor, values: Tensor, ahead: bool) -> Backend:
    """The backend that "auto" stands for."""
    if backend != "auto":
        return backend
    if not q.is_cuda or importlib.util.find_spec("triton") is None:
        return "blocked"
    from .triton_op import why_not

    return "blocked" if why_not(q, k, values, ahead) else "triton"


def _triton_hop() -> Callable[..., State]:
    from . import triton_op

    return triton_op.hop


def _causal_reach(reach: Tensor, ahead: Tensor | None) -> Tensor:
    if ahead is not None:
        raise ValueError('backend = "triton" is causal only: use "blocked" with causal = False')
    return reach


def _bounds(
    doc_start: Tensor, axis: Axis, mode: Mode, causal: bool
) -> tuple[Tensor, Tensor | None]:
    """How many strides back, and forward (None if causal), each token may look along `axis`."""
    reach = document_reach(doc_start, axis.stride)
    if mode == "distance":
        return reach, None
    digit = line_digit(doc_start.shape[1], axis, doc_start.device)
    reach = torch.minimum(reach, digit)
    if causal:
        return reach, None
    ahead = torch.minimum(document_ahead(doc_start, axis.stride), axis.length - 1 - digit)
    return reach, ahead


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fold: Sequence[int],
    hop_bias: Tensor | None,
    rotary: Rotary | None,
    mode: Mode,
    causal: bool,
) -> None:
    batch, num_tokens, num_heads, head_dim = q.shape
    if k.shape[:2] != (batch, num_tokens) or k.shape[3] != head_dim or num_heads % k.shape[2]:
        raise ValueError(f"k {list(k.shape)} does not match q {list(q.shape)} (H % K must be 0)")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v {list(v.shape)} does not match k {list(k.shape)}")
    if mode == "distance" and not causal:
        raise ValueError('causal = False needs mode = "fold": distances only reach back')
    if hop_bias is not None:
        if mode == "fold":
            raise ValueError('hop_bias has no effect in mode = "fold": each hop is its own softmax')
        if hop_bias.shape != (len(fold), num_heads):
            raise ValueError(f"hop_bias {list(hop_bias.shape)} must be {[len(fold), num_heads]}")
    if rotary is not None and rotary.cos.shape[0] < num_tokens:
        raise ValueError(f"rotary table has {rotary.cos.shape[0]} positions, need {num_tokens}")
