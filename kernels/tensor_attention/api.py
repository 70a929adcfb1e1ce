"""Tensorized attention: the public operator, a loop of hops over the folded axes.

This module alone chooses the implementation, from the arguments only. `gpu.op` and `gpu.chain` are
imported on first use, so that the other backends work without triton.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from . import blocked, checks, dense
from .fold import (
    Axis,
    HopInputs,
    Rotary,
    State,
    document_ahead,
    document_reach,
    fold_axes,
    line_digit,
    validate_fold,
)

Mode = Literal["distance", "fold"]
Backend = Literal["auto", "dense", "blocked", "triton"]

_HOPS: dict[str, Callable[[HopInputs], State]] = {"dense": dense.hop, "blocked": blocked.hop}


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
    """One hop by the chosen backend. For arguments see `HopInputs`, for results `dense.hop`.

    `reach` and `ahead` may be [1, T] for all rows of the batch, and of any integer dtype.

    Raises:
        ValueError: the arguments do not match, or the backend does not support them.
    """
    checks.check_heads(q, k, values, "values", of_queries=True)
    checks.check_axis(stride, length)
    checks.check_rotary(rotary, -(-q.shape[1] // stride), q)
    checks.check_bias("bias", bias, [q.shape[2]], q)
    checks.check_state(state, q, values)
    checks.check_scale(scale)
    reach = checks.steps_per_token("reach", reach, q)
    ahead = None if ahead is None else checks.steps_per_token("ahead", ahead, q)
    # A longer axis has no more steps: every token is alone on its line or reads all of it.
    stride, length = (min(size, max(1, q.shape[1])) for size in (stride, length))
    backend = chosen_backend(backend, q, k, values, ahead is not None)
    run = _HOPS[backend] if backend in _HOPS else _triton_hop()
    return run(HopInputs(q, k, values, stride, length, reach, bias, state, rotary, scale, ahead))


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
        q: [B, T, H, D], not rotated if `rotary` is given.
        k: [B, T, K, D] with H a multiple of K; query head h reads key head h // (H / K).
        v: [B, T, K, E].
        fold: lengths of the inner axes, innermost first; [] is full attention.
        doc_start: [B, T] integer (or [1, T] for all rows of the batch), index in the row of the
            first token of each token's document; None: one document per row. An index after t
            counts as t, one before the row as 0.
        hop_bias: [len(fold), H], added to the scores of hops 2, 3, ... (distance mode only).
        rotary: table of at least T positions; axis i uses position floor(t / stride_i).
        scale: factor on the scores, 1 / sqrt(D) by default.
        mode: "distance" folds the distance t - u and ends in one joint softmax (kernels/README.md).
            "fold" attends inside the lines of the folded tensor, with one softmax per hop, as in
            the paper.
        causal: False lets tokens also look ahead (fold mode only: for encoders).
        backend: "dense" is the T x T definition, "blocked" plain PyTorch, "triton" the GPU kernels
            (causal only). "auto" is "triton" for CUDA tensors that it supports, else "blocked".

    Returns:
        [B, T, H, E] in the dtype of v.

    Raises:
        ValueError: the arguments do not match, or the backend does not support them.
    """
    checks.check_choice("mode", mode, get_args(Mode))
    if mode == "distance" and not causal:
        raise ValueError('causal must be True in mode = "distance", got False (use mode = "fold")')
    if mode == "fold" and hop_bias is not None:
        raise ValueError('hop_bias must be None in mode = "fold": each hop has its own softmax')
    doc_start = check_operator(
        q, k, v, fold, doc_start, hop_bias, rotary, scale, backend, q.shape[1]
    )
    row = max(1, q.shape[1])  # a longer stride reaches no other token
    axes = [Axis(min(stride, row), min(n, row)) for stride, n in fold_axes(fold, q.shape[1])]
    bounds = [_bounds(doc_start, axis, mode, causal) for axis in axes]
    if chosen_backend(backend, q, k, v, not causal) == "triton":
        from .gpu.chain import chain

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


def check_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fold: Sequence[int],
    doc_start: Tensor | None,
    hop_bias: Tensor | None,
    rotary: Rotary | None,
    scale: float | None,
    backend: Backend,
    positions: int,
) -> Tensor:
    """Check all arguments but the mode; returns the document starts [B, T] (zeros for None).

    Args:
        positions: number of positions that the rotary table must have: tokens of the whole row.

    Raises:
        ValueError: the arguments do not match.
    """
    checks.check_heads(q, k, v, "v", of_queries=False)
    checks.check_rotary(rotary, positions, q)
    checks.check_bias("hop_bias", hop_bias, [len(fold), q.shape[2]], q)
    checks.check_scale(scale)
    checks.check_choice("backend", backend, get_args(Backend))
    validate_fold(fold)
    if doc_start is None:
        return torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
    return checks.per_token("doc_start", doc_start, q)


def chosen_backend(backend: Backend, q: Tensor, k: Tensor, values: Tensor, ahead: bool) -> Backend:
    """Replace "auto" by a backend; "dense" if there are no tokens.

    Raises:
        ValueError: the backend is unknown.
    """
    checks.check_choice("backend", backend, get_args(Backend))
    if not q.shape[0] or not q.shape[1]:
        return "dense"
    if backend != "auto":
        return backend
    if not q.is_cuda or importlib.util.find_spec("triton") is None:
        return "blocked"
    from .gpu.op import why_not

    return "blocked" if why_not(q, k, values, ahead) else "triton"


def _triton_hop() -> Callable[[HopInputs], State]:
    from .gpu import op as triton_op

    return triton_op.hop


def _causal_reach(reach: Tensor, ahead: Tensor | None) -> Tensor:
    if ahead is not None:
        raise ValueError('causal must be True for backend = "triton", got False (use "blocked")')
    return reach


def _bounds(
    doc_start: Tensor, axis: Axis, mode: Mode, causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Number of strides that each token may look back and ahead (None if causal) along `axis`."""
    reach = document_reach(doc_start, axis.stride)
    if mode == "distance":
        return reach, None
    digit = line_digit(doc_start.shape[1], axis, doc_start.device)
    reach = torch.minimum(reach, digit)
    if causal:
        return reach, None
    ahead = torch.minimum(document_ahead(doc_start, axis.stride), axis.length - 1 - digit)
    return reach, ahead
