"""The routed hop: its derivatives, its implementations against each other, states, and memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_attention import (
    apply_rotary,
    document_reach,
    hop,
    routed_attention,
    routed_hop,
)
from tensor_attention.api import Backend
from tests.tensor_attention.cases import (
    BACKENDS,
    LargestTensor,
    choice_of,
    cotangent_like,
    doc_start_of,
    inputs,
    read_beyond_window,
    relative_error,
    rotary_table,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)


def state_like(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A random state z [B, T, H, E], lse [B, T, H], as a window might leave it."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(*q.shape[:3], v.shape[3], generator=generator, dtype=torch.float64)
    return z, torch.randn(q.shape[:3], generator=generator, dtype=torch.float64) + 1


@both_backends
@pytest.mark.parametrize("open_tile", [1, 3])
def test_gradients_of_the_hop_pass_gradcheck_in_float64(backend: Backend, open_tile: int) -> None:
    q, k, v = inputs(12, dim=2)
    state = state_like(q, v)
    route: dict[str, Any] = {
        "window": 3, "block": 2, "stretch": 2, "rotary": rotary_table(12, 2),
        "doc_start": doc_start_of([3, 9]), "backend": backend,
    }  # fmt: skip
    choice = choice_of(q, k, top_k=1, **route)

    def operator(q: Tensor, k: Tensor, v: Tensor, z: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return routed_hop(q, k, v, choice, state=(z, lse), open_tile=open_tile, **route)

    assert torch.autograd.gradcheck(operator, tuple(x.requires_grad_() for x in (q, k, v, *state)))


@both_backends
def test_gradients_of_the_whole_operator_pass_gradcheck_in_float64(backend: Backend) -> None:
    leaves = tuple(x.requires_grad_() for x in inputs(12, dim=2))
    doc_start, rotary = doc_start_of([2, 10]), rotary_table(12, 2)

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(
            q, k, v, window=3, block=2, top_k=1, stretch=2, open_tile=2,
            doc_start=doc_start, rotary=rotary, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(operator, leaves)


@both_backends
@pytest.mark.parametrize("open_tile", [1, 4])
def test_written_formulas_and_derivatives_equal_the_hop_and_autograd(
    backend: Backend, open_tile: int
) -> None:
    num_tokens, stretch, scale = 33, 3, 0.6
    q, k, v = inputs(num_tokens, 4, 2)
    state = state_like(q, v)
    doc_start, rotary = doc_start_of([4, 29]), rotary_table(num_tokens, 4)
    options: dict[str, Any] = {
        "window": 4, "block": 3, "stretch": stretch, "doc_start": doc_start, "rotary": rotary,
        "backend": backend,
    }  # fmt: skip
    choice = choice_of(q, k, top_k=2, **options)
    leaves = [x.requires_grad_() for x in (q, k, v, *state)]
    z, lse = routed_hop(q, k, v, choice, state=state, open_tile=open_tile, scale=scale, **options)
    dz, dl = cotangent_like(z), cotangent_like(lse)
    automatic = torch.autograd.grad((z, lse), leaves, (dz, dl))

    # The formulas, with P as a [B, H, T, T] matrix.
    position = (torch.arange(num_tokens) - doc_start) // stretch
    q, k = (apply_rotary(x.detach(), rotary, position).requires_grad_() for x in (q, k))
    keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
    read = read_beyond_window(choice, doc_start, 4, 3, open_tile).repeat_interleave(2, dim=1)
    z_before, lse_before = state
    score = torch.einsum("bthd,buhd->bhtu", q, keys) * scale
    far = score.masked_fill(~read, float("-inf")).logsumexp(-1).transpose(1, 2)
    lse_written = torch.logaddexp(lse_before, far)
    keep = (lse_before - lse_written).exp()
    weights = (score - lse_written.transpose(1, 2)[..., None]).exp() * read
    z_written = keep[..., None] * z_before + torch.einsum("bhtu,buhe->bthe", weights, values)
    torch.testing.assert_close(lse, lse_written, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(z, z_written, rtol=1e-12, atol=1e-13)
    delta = (dz * z).sum(-1)
    inner = torch.einsum("bthe,buhe->bhtu", dz, values)
    dscore = weights * (inner + (dl - delta).transpose(1, 2)[..., None])
    back = [
        torch.einsum("bhtu,buhd->bthd", dscore, keys) * scale,
        torch.einsum("bhtu,bthd->buhd", dscore, q).unflatten(2, (2, 2)).sum(3) * scale,
    ]
    written = [
        *(apply_rotary(x, type(rotary)(rotary.cos, -rotary.sin), position) for x in back),
        torch.einsum("bhtu,bthe->buhe", weights, dz).unflatten(2, (2, 2)).sum(3),
        keep[..., None] * dz,
        keep * ((dz * z_before).sum(-1) - delta + dl),
    ]
    for ours, expected in zip(written, automatic, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


LENGTHS = {"one": [201], "many": [40, 1, 5, 90, 17, 48], "single tokens": [1] * 63}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (3, 1), (8, 2), (8, 1)])
@pytest.mark.parametrize(
    ("route", "open_tile"),
    [
        ({"window": 8, "block": 5, "top_k": 1}, 1),
        ({"window": 33, "block": 16, "top_k": 2, "stretch": 4}, 5),
        ({"window": 7, "block": 7, "top_k": 3, "stretch": 3}, 70),
        ({"window": 16, "block": 2, "top_k": 40}, 16),
    ],
)
def test_blocked_equals_dense_in_choice_output_and_every_gradient(
    route: dict[str, int], open_tile: int, heads: int, key_heads: int, kind: str
) -> None:
    lengths = LENGTHS[kind]
    num_tokens, batch = sum(lengths), 1 + (heads == 3)
    q, k, v = inputs(num_tokens, heads, key_heads, batch=batch)
    doc_start = doc_start_of(lengths)
    if batch == 2:
        doc_start = torch.cat((doc_start, doc_start_of([num_tokens])))
    rotary = rotary_table(num_tokens, 4) if heads != 2 else None
    shared: dict[str, Any] = {"doc_start": doc_start, "rotary": rotary, **route}
    choices = [choice_of(q, k, backend=backend, **shared) for backend in BACKENDS]
    assert torch.equal(*choices)
    del shared["top_k"]
    results = []
    for backend in BACKENDS:
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *state_like(q, v))]
        z, lse = routed_hop(
            leaves[0], leaves[1], leaves[2], choices[0], state=(leaves[3], leaves[4]),
            open_tile=open_tile, backend=backend, **shared,
        )  # fmt: skip
        gradients = torch.autograd.grad(
            (z, lse), leaves, (cotangent_like(z), cotangent_like(lse)),
            allow_unused=True, materialize_grads=True,  # in short documents nothing is read
        )  # fmt: skip
        names = ("q", "k", "v", "dz", "dl")
        results.append({"z": z, "lse": lse} | dict(zip(names, gradients, strict=True)))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-12, atol=1e-12, msg=name)


@both_backends
def test_the_order_of_a_choice_does_not_matter(backend: Backend) -> None:
    q, k, v = inputs(60, 2, 2)
    options: dict[str, Any] = {"window": 6, "block": 4, "backend": backend}
    choice = choice_of(q, k, top_k=3, **options)
    state = state_like(q, v)
    expected = routed_hop(q, k, v, choice, state=state, **options)
    out = routed_hop(q, k, v, choice.flip(-1), state=state, **options)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])


@both_backends
def test_it_is_the_window_and_a_hop_that_starts_from_its_state(backend: Backend) -> None:
    q, k, v = inputs(60, 4, 2)
    shared: dict[str, Any] = {"rotary": rotary_table(60, 4), "scale": 0.4, "backend": backend}
    doc_start = doc_start_of([13, 47])
    route: dict[str, Any] = {"window": 8, "block": 4, "stretch": 2, "doc_start": doc_start}
    reach = document_reach(doc_start, 1)
    state = hop(q, k, v, stride=1, length=8, reach=reach, **shared)
    choice = choice_of(q, k, top_k=2, rotary=shared["rotary"], backend=backend, **route)
    z, _ = routed_hop(q, k, v, choice, state=state, open_tile=3, **route, **shared)
    out = routed_attention(q, k, v, top_k=2, open_tile=3, **route, **shared)
    assert torch.equal(z, out)
    assert relative_error(state[0], out) > 0.1


@both_backends
def test_it_joins_a_strided_hop_too(backend: Backend) -> None:
    # The weights of the window, of a strided hop over it, and of a routed hop sum to one.
    q, k, _ = inputs(50, 2, 2)
    v = torch.ones(1, 50, 2, 4, dtype=torch.float64)
    doc_start = doc_start_of([15, 35])
    state = hop(q, k, v, stride=1, length=4, reach=document_reach(doc_start, 1), backend=backend)
    strided = hop(
        q, k, state[0], stride=4, length=3, reach=document_reach(doc_start, 4), state=state,
        backend=backend,
    )  # fmt: skip
    route: dict[str, Any] = {"window": 12, "block": 4, "doc_start": doc_start, "backend": backend}
    choice = choice_of(q, k, top_k=2, **route)
    z, lse = routed_hop(q, k, v, choice, state=strided, **route)
    torch.testing.assert_close(z, torch.ones_like(z), rtol=0, atol=1e-13)
    far = read_beyond_window(choice, doc_start, 12, 4).any(-1).transpose(1, 2)
    assert torch.equal(lse > strided[1], far)
    assert torch.equal(lse[~far], strided[1][~far])


@both_backends
def test_rows_of_a_batch_do_not_mix(backend: Backend) -> None:
    q, k, v = inputs(61, batch=2)
    doc_start = torch.cat((doc_start_of([61]), doc_start_of([22, 39])))
    options: dict[str, Any] = {"window": 5, "block": 3, "top_k": 2, "open_tile": 4}
    out = routed_attention(q, k, v, doc_start=doc_start, backend=backend, **options)
    for row in (slice(0, 1), slice(1, 2)):
        alone = routed_attention(
            q[row], k[row], v[row], doc_start=doc_start[row], backend=backend, **options
        )
        torch.testing.assert_close(out[row], alone, rtol=1e-13, atol=1e-14)


# Low precision, and cost.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_backends
def test_low_precision_keeps_its_dtype_and_is_rounded_once(
    dtype: torch.dtype, backend: Backend
) -> None:
    q, k, v = (x.to(dtype) for x in inputs(80, 4, 2, dim=16))
    z, lse = state_like(q, v)
    route: dict[str, Any] = {"window": 9, "block": 4, "backend": backend}
    choice = choice_of(q, k, top_k=3, **route)
    ours = routed_hop(q, k, v, choice, state=(z.to(dtype), lse.float()), **route)
    assert (ours[0].dtype, ours[1].dtype) == (dtype, torch.float32)
    exact = routed_hop(
        q.double(), k.double(), v.double(), choice,
        state=(z.to(dtype).double(), lse.float().double()), **(route | {"backend": "dense"}),
    )  # fmt: skip
    assert relative_error(ours[0].double(), exact[0]) < 4 * torch.finfo(dtype).eps
    assert relative_error(ours[1].double(), exact[1]) < 8 * torch.finfo(torch.float32).eps


@both_backends
def test_scores_of_a_million_overflow_neither_forward_nor_backward(backend: Backend) -> None:
    q, k, v = inputs(50)
    leaves = [x.float().requires_grad_() for x in (q * 1000, k * 1000, v)]
    out = routed_attention(
        leaves[0], leaves[1], leaves[2], window=5, block=3, top_k=2, backend=backend
    )
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


def elements_of(num_tokens: int) -> tuple[int, int]:
    """Elements of the largest tensor of forward and backward, and of all that is kept between."""
    q, k, v = (x.requires_grad_() for x in inputs(num_tokens))
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        alive.append(x)
        return x

    alive: list[Tensor] = []
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = routed_attention(q, k, v, window=16, block=8, top_k=1, backend="blocked")
        total = sum(kept.values())
        out.sum().backward()
    return largest.numel, total


def test_memory_of_blocked_grows_with_tokens_not_with_their_square() -> None:
    small, large = elements_of(1024), elements_of(4096)
    # Scores of all blocks exist for one tile of tokens: 512 T / 8 of them.
    assert large[0] <= 4096 * 64
    assert large[0] <= 4.1 * small[0]
    # What is kept has a mask of each tile's union, which in a short row is less than 128 blocks.
    assert large[1] <= 5 * small[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 6}, "block must be between 1 and the window of 5 tokens, got 6"),
        ({"stretch": 0}, "stretch must be at least 1, got 0"),
        ({"open_tile": 0}, "open_tile must be at least 1, got 0"),
    ],
)
def test_a_bad_number_is_a_value_error_that_names_it(change: dict[str, int], message: str) -> None:
    q, k, v = inputs(8)
    options: dict[str, Any] = {"window": 5, "block": 3} | change
    choice = torch.full((1, 8, 1, 2), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        routed_hop(q, k, v, choice, state=state_like(q, v), **options)
