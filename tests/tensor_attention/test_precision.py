"""Every path is as exact as the definition in the same dtype: at most twice its error.

The error of an output or a gradient is its distance from that in float64, with the same inputs; a
result may also be one rounding off. Scores of standard deviation 1, 3 and 6: the larger they are,
the more their rounding would cost. Without rotary: its rounding of q and k, which all paths share,
would hide that of the scores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_attention import document_reach, fold_axes, hop, tensor_attention
from tensor_attention.cached import hop_cached
from tests.tensor_attention.cases import cotangent_like, doc_start_of, inputs

TOKENS, HEADS, KEY_HEADS, DIM = 192, 4, 2, 64
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DOCUMENTS = [50, 1, 141]
Run = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]
blocked_hop = partial(hop, backend="blocked")


def definition(q: Tensor, k: Tensor, v: Tensor, fold: list[int]) -> Tensor:
    """All hops by `dense`."""
    return operator(q, k, v, fold, backend="dense")


def operator(q: Tensor, k: Tensor, v: Tensor, fold: list[int], **options: Any) -> Tensor:
    return tensor_attention(
        q, k, v, fold, doc_start=doc_start_of(DOCUMENTS), hop_bias=bias(fold, q.dtype), **options
    )


def bias(fold: list[int], dtype: torch.dtype) -> Tensor:
    return torch.linspace(-2, 1, len(fold) * HEADS).view(len(fold), HEADS).to(dtype)


def blocked(q: Tensor, k: Tensor, v: Tensor, fold: list[int]) -> Tensor:
    """As training on a CPU, and an exported model where the kernels are not installed."""
    return operator(q, k, v, fold, backend="blocked")


def autocast(q: Tensor, k: Tensor, v: Tensor, fold: list[int]) -> Tensor:
    """As in a model that runs under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return operator(q, k, v, fold, backend="blocked")


def decoded(q: Tensor, k: Tensor, v: Tensor, fold: list[int]) -> Tensor:
    """All hops by `hop_cached`, for all tokens at once: as decoding."""
    z, state = v, None
    for i, axis in enumerate(fold_axes(fold, TOKENS)):
        z, lse = hop_cached(
            q, k, z, stride=axis.stride, length=axis.length, state=state,
            bias=bias(fold, q.dtype)[i - 1] if i else None,
            reach=document_reach(doc_start_of(DOCUMENTS), axis.stride),
        )  # fmt: skip
        state = (z, lse)
    return z


def errors(run: Run, tensors: list[Tensor], fold: list[int]) -> dict[str, float]:
    """Relative distance from float64 of the output and of the gradients of q, k, v."""
    exact_tensors = [x.double() for x in tensors]
    ours, exact = results(run, tensors, fold), results(definition, exact_tensors, fold)
    distances = {}
    for name, x in exact.items():
        assert ours[name].dtype == tensors[0].dtype
        distances[name] = float((ours[name].double() - x).norm() / x.norm())
    return distances


def results(run: Run, tensors: list[Tensor], fold: list[int]) -> dict[str, Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    q, k, v = leaves
    out = run(q, k, v, fold)
    gradients = torch.autograd.grad(out, leaves, cotangent_like(out))
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def case(dtype: torch.dtype, spread: float) -> list[Tensor]:
    """q, k, v whose scores have that standard deviation."""
    q, k, v = inputs(TOKENS, HEADS, KEY_HEADS, DIM)
    return [x.to(dtype) for x in (q * spread, k, v)]


def assert_within_twice(
    ours: dict[str, float], plain: dict[str, float], dtype: torch.dtype
) -> None:
    for name, error in ours.items():
        floor = torch.finfo(dtype).eps / 4  # one rounding, in the norm
        assert error <= 2 * plain[name] + floor, f"{name}: {error:.1e}, plain {plain[name]:.1e}"


@pytest.mark.parametrize("spread", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fold", [[], [16], [8, 4]], ids=str)
@pytest.mark.parametrize("run", [blocked, decoded, autocast])
def test_output_and_gradients(run: Run, fold: list[int], dtype: torch.dtype, spread: float) -> None:
    tensors = case(dtype, spread)
    assert_within_twice(errors(run, tensors, fold), errors(definition, tensors, fold), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", [hop, blocked_hop, hop_cached])
def test_log_sum_exp_is_exact_to_float32(run: Any, dtype: torch.dtype) -> None:
    q, k, v = case(dtype, 6.0)
    reach = document_reach(doc_start_of(DOCUMENTS), 1)
    z, lse = run(q, k, v, stride=1, length=64, reach=reach)
    exact = hop(*(x.double() for x in (q, k, v)), stride=1, length=64, reach=reach)[1]
    assert (z.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-5)


def test_float16_scores_beyond_its_range_stay_finite() -> None:
    q, k, v = (x.half() * 200 for x in inputs(20, 2, 2, 16))
    reach = document_reach(doc_start_of([20]), 1)
    for run in (blocked_hop, hop_cached):
        z, lse = run(q, k, v / 200, stride=1, length=8, reach=reach, scale=1.0)
        wide = [x.double() for x in (q, k, v / 200)]
        exact, _ = hop(*wide, stride=1, length=8, reach=reach, scale=1.0)
        assert lse.isfinite().all()
        torch.testing.assert_close(z.double(), exact, rtol=1e-3, atol=1e-3)
