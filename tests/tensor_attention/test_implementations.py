"""The implementations agree with each other, with the written derivatives, and with float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_attention import document_reach, fold_axes, hop, tensor_attention
from tensor_attention.api import Backend
from tests.tensor_attention.cases import (
    BACKENDS,
    cotangent_like,
    doc_start_of,
    inputs,
    relative_error,
    rotary_table,
    run_with_gradients,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)


def documents(kind: str, num_tokens: int) -> list[int]:
    if kind == "one":
        return [num_tokens]
    if kind == "single tokens":
        return [1] * num_tokens
    lengths, left = [], num_tokens
    for n in (1, 5, 40, 17, 90, 64):
        if n < left:
            lengths.append(n)
            left -= n
    return [*lengths, left]


MODES: dict[str, dict[str, Any]] = {
    "distance": {},
    "fold": {"mode": "fold"},
    "fold, look ahead": {"mode": "fold", "causal": False},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["one", "many", "single tokens"])
@pytest.mark.parametrize("num_tokens", [1, 63, 250, 509])
@pytest.mark.parametrize("fold", [[], [16], [8, 8], [3, 5], [2, 3, 7]])
def test_blocked_equals_dense_in_output_and_every_gradient(
    fold: list[int], num_tokens: int, kind: str, mode: str
) -> None:
    # The ratio of query to key heads, the rotary table and the batch cycle over the grid.
    case = len(fold) + num_tokens + len(kind) + len(mode)
    if num_tokens == 509 and case % 2:
        num_tokens = 127
    key_heads = (4, 1, 2)[case % 3]
    batch = 1 + case % 2 if num_tokens < 100 else 1
    tensors = list(inputs(num_tokens, 4, key_heads, batch=batch))
    if mode == "distance" and fold:
        tensors.append(torch.randn(len(fold), 4, dtype=torch.float64))
    doc_start = doc_start_of(documents(kind, num_tokens)).expand(batch, -1)
    rotary = rotary_table(num_tokens, 4) if case % 2 else None
    results = [
        run_with_gradients(
            tensors, fold, doc_start=doc_start, rotary=rotary, backend=backend, **MODES[mode]
        )
        for backend in BACKENDS
    ]
    (dense_out, dense_grads), (blocked_out, blocked_grads) = results
    torch.testing.assert_close(blocked_out, dense_out, rtol=1e-11, atol=1e-13)
    for name, ours, expected in zip("qkvb", blocked_grads, dense_grads, strict=False):
        assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-12), f"d{name}"


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2), (8, 1), (3, 1)])
@both_backends
def test_grouped_heads_equal_repeated_key_heads(
    backend: Backend, heads: int, key_heads: int
) -> None:
    q, k, v = inputs(40, heads, key_heads)
    out = tensor_attention(q, k, v, [4, 3], backend=backend)
    k, v = (x.repeat_interleave(heads // key_heads, dim=2) for x in (k, v))
    expected = tensor_attention(q, k, v, [4, 3], backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)


@both_backends
def test_rows_of_a_batch_do_not_mix(backend: Backend) -> None:
    q, k, v = inputs(33, batch=2)
    doc_start = torch.cat((doc_start_of([33]), doc_start_of([10, 23])))
    together = tensor_attention(q, k, v, [4], doc_start=doc_start, backend=backend)
    for row in (slice(0, 1), slice(1, 2)):
        alone = tensor_attention(
            q[row], k[row], v[row], [4], doc_start=doc_start[row], backend=backend
        )
        torch.testing.assert_close(together[row], alone, rtol=1e-13, atol=1e-14)


@both_backends
@pytest.mark.parametrize("fold", [[], [2], [2, 2]])
def test_gradients_pass_gradcheck_in_float64(backend: Backend, fold: list[int]) -> None:
    q, k, v = inputs(9, dim=2)
    bias = torch.randn(len(fold), 2, dtype=torch.float64)
    doc_start, rotary = doc_start_of([2, 7]), rotary_table(9, 2)

    def operator(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return tensor_attention(
            q, k, v, fold, doc_start=doc_start, hop_bias=bias, rotary=rotary, backend=backend
        )

    leaves = tuple(x.requires_grad_() for x in (q, k, v, bias))
    assert torch.autograd.gradcheck(operator, leaves)


@both_backends
def test_gradients_of_the_look_ahead_mode_pass_gradcheck(backend: Backend) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(8, dim=2))

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"doc_start": doc_start_of([3, 5]), "backend": backend}
        return tensor_attention(q, k, v, [2, 2], mode="fold", causal=False, **options)

    assert torch.autograd.gradcheck(operator, (q, k, v))


@both_backends
def test_written_derivatives_of_one_hop_equal_autograd(backend: Backend) -> None:
    num_tokens, heads, stride, length, scale = 23, 2, 3, 4, 0.6
    q, k, z_before = inputs(num_tokens, heads, heads)
    lse_before = torch.randn(1, num_tokens, heads, dtype=torch.float64)
    bias = torch.randn(heads, dtype=torch.float64)
    reach = document_reach(doc_start_of([5, 18]), stride)
    leaves = [x.requires_grad_() for x in (q, k, z_before, lse_before, bias)]
    z, lse = hop(
        q, k, z_before, stride=stride, length=length, reach=reach, bias=bias,
        state=(z_before, lse_before), scale=scale, backend=backend,
    )  # fmt: skip
    dz, dl = torch.randn_like(z), torch.randn_like(lse)
    automatic = torch.autograd.grad((z, lse), leaves, (dz, dl))

    # The formulas, with P as a [B, H, T, T] matrix.
    t, u = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)[None]
    steps = (t - u) // stride
    allowed = ((t - u) % stride == 0) & (steps >= 1) & (steps < length)
    allowed = allowed & (steps <= reach[0][:, None])
    score = torch.einsum("bthd,buhd->bhtu", q, k) * scale + bias[:, None, None]
    weights = (score - lse.transpose(1, 2)[..., None]).exp() * allowed
    keep = (lse_before - lse).exp()
    delta = (dz * z).sum(-1)
    inner = torch.einsum("bthe,buhe->bhtu", dz, z_before)
    dscore = weights * (inner + (dl - delta).transpose(1, 2)[..., None])
    dlse_before = keep * ((dz * z_before).sum(-1) - delta + dl)
    written = (
        torch.einsum("bhtu,buhd->bthd", dscore, k) * scale,
        torch.einsum("bhtu,bthd->buhd", dscore, q) * scale,
        torch.einsum("bhtu,bthe->buhe", weights, dz) + keep[..., None] * dz,
        dlse_before,
        dscore.sum(dim=(0, 2, 3)),
    )
    for ours, expected in zip(written, automatic, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(written[4], (dl - dlse_before).sum((0, 1)), rtol=1e-10, atol=1e-12)


# Low precision.


def plain_operator(q: Tensor, k: Tensor, v: Tensor, fold: list[int], doc_start: Tensor) -> Tensor:
    """The same operator as one would write it in PyTorch, every step in the dtype of the inputs."""
    position, z, lse = torch.arange(q.shape[1]), v, None
    for axis in fold_axes(fold, q.shape[1]):
        distance = position[:, None] - position[None]
        steps = distance // axis.stride
        allowed = (distance % axis.stride == 0) & (steps < axis.length) & (steps >= 0)
        allowed = allowed & (steps <= document_reach(doc_start, axis.stride)[..., None])
        score = torch.einsum("bthd,buhd->bhtu", q, k) * q.shape[-1] ** -0.5
        if lse is not None:
            score = torch.where(steps == 0, lse.transpose(1, 2)[..., None], score)
        score = score.masked_fill(~allowed[:, None], float("-inf"))
        z = torch.einsum("bhtu,buhe->bthe", score.softmax(-1), z)
        lse = score.logsumexp(-1).transpose(1, 2)
    return z


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fold", [[], [16], [8, 4]])
def test_error_is_at_most_twice_that_of_plain_pytorch_in_the_same_dtype(
    fold: list[int], dtype: torch.dtype, backend: Backend
) -> None:
    low = [x.to(dtype) for x in inputs(200, heads=2, key_heads=2, dim=16)]
    exact = [x.double() for x in low]
    doc_start = doc_start_of([70, 1, 129])
    reference, reference_grads = run_with_gradients(
        exact, fold, doc_start=doc_start, backend="dense"
    )
    ours, our_grads = run_with_gradients(low, fold, doc_start=doc_start, backend=backend)
    q, k, v = (x.requires_grad_() for x in low)
    plain = plain_operator(q, k, v, fold, doc_start)
    plain_grads = torch.autograd.grad(plain, (q, k, v), cotangent_like(plain))
    assert ours.dtype == dtype
    for x, y, exact_x in zip(
        [ours, *our_grads], [plain.detach(), *plain_grads], [reference, *reference_grads],
        strict=True,
    ):  # fmt: skip
        floor = torch.finfo(dtype).eps
        assert relative_error(x, exact_x) <= 2 * relative_error(y, exact_x) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_backends
def test_log_sum_exp_is_float32_for_low_precision_inputs(
    dtype: torch.dtype, backend: Backend
) -> None:
    q, k, v = (x.to(dtype) for x in inputs(20))
    reach = document_reach(doc_start_of([20]), 1)
    z, lse = hop(q, k, v, stride=1, length=4, reach=reach, backend=backend)
    assert (z.dtype, lse.dtype) == (dtype, torch.float32)


@both_backends
def test_scores_of_a_million_overflow_neither_forward_nor_backward(backend: Backend) -> None:
    q, k, v = inputs(50)
    tensors = [(q * 1000).float(), (k * 1000).float(), v.float()]
    out, gradients = run_with_gradients(tensors, [4, 3], backend=backend)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients)
