"""The Triton kernels against the definition in float64: in the interpreter, and on a GPU at size.

The rule: an error is at most twice that of the definition run in the same dtype, plus a rounding
floor. The interpreter truncates to bf16 where a GPU rounds, so bf16 is tested on the GPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_attention import Rotary, document_reach, hop, tensor_attention
from tests.tensor_attention.cases import (
    Results,
    assert_as_good_as_plain,
    cotangent_like_on,
    doc_start_of,
    inputs,
    poisoned_memory,
    rotary_table,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Programs race on a GPU only: in the interpreter, which is slow, few cases are run twice.
MOST_TOKENS_RUN_TWICE = 1 if DEVICE == "cpu" else 1 << 30


def operator(
    tensors: Results, dtype: torch.dtype, backend: Any, rotary: Rotary | None, **options: Any
) -> Results:
    """Output and every gradient of `tensor_attention` on copies of `tensors` in `dtype`."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    if rotary is not None:
        rotary = Rotary(*(x.to(torch.promote_types(dtype, torch.float32)) for x in rotary))
    fold = options.pop("fold")
    out = tensor_attention(
        leaves["q"], leaves["k"], leaves["v"], fold, hop_bias=leaves.get("hop_bias"),
        rotary=rotary, backend=backend, **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent_like_on(out))
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


def check_operator(
    tensors: Results, dtype: torch.dtype, rotary: Rotary | None, exact_backend: Any = "dense",
    **options: Any,
) -> None:  # fmt: skip
    """The rule for the output and every gradient; every element written; two runs bit-equal."""
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    with poisoned_memory():
        ours = operator(tensors, dtype, "triton", rotary, **options)
        again = ours
        if tensors["q"].shape[1] <= MOST_TOKENS_RUN_TWICE:
            again = operator(tensors, dtype, "triton", rotary, **options)
    plain = operator(tensors, dtype, exact_backend, rotary, **options)
    exact = operator(tensors, torch.float64, exact_backend, rotary, **options)
    assert_as_good_as_plain(ours, plain, exact)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def case(
    num_tokens: int, heads: int, key_heads: int, dim: int, fold: list[int], batch: int = 1
) -> Results:
    q, k, v = inputs(num_tokens, heads, key_heads, dim, batch)
    tensors = {"q": q, "k": k, "v": v}
    if fold:
        generator = torch.Generator().manual_seed(2)
        tensors["hop_bias"] = torch.randn(len(fold), heads, generator=generator).double()
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def documents(kind: str, num_tokens: int, batch: int = 1) -> Tensor:
    """[batch, T] starts of one document, of single tokens, or of documents of uneven lengths."""
    lengths = {"one": [num_tokens], "single": [1] * num_tokens}.get(kind, [])
    while sum(lengths) < num_tokens:
        size = (1, 37, 5, 250, 64)[len(lengths) % 5]
        lengths.append(min(size, num_tokens - sum(lengths)))
    return doc_start_of(lengths).expand(batch, -1).to(DEVICE)


def table(num_tokens: int, dim: int) -> Rotary:
    return Rotary(*(x.to(DEVICE) for x in rotary_table(num_tokens, dim)))


# The operator at sizes that the interpreter can run.


@pytest.mark.parametrize(
    ("num_tokens", "kind"), [(1, "one"), (33, "one"), (33, "many"), (33, "single"), (70, "many")]
)
@pytest.mark.parametrize("fold", [[], [16], [8, 3], [2, 3, 5], [64]])
def test_output_and_gradients(fold: list[int], num_tokens: int, kind: str) -> None:
    # The group size, the dtype, the batch, the rotary table and the head size cycle over the grid.
    cycle = len(fold) + num_tokens + len(kind)
    key_heads, dtype = (4, 1, 2)[cycle % 3], (torch.float32, torch.float16)[cycle % 2]
    dim, batch = (16, 20)[cycle // 2 % 2], 2 if kind == "single" else 1
    check_operator(
        case(num_tokens, 4, key_heads, dim, fold, batch), dtype,
        table(num_tokens, dim) if cycle % 4 else None,
        fold=fold, doc_start=documents(kind, num_tokens, batch),
    )  # fmt: skip


def test_eight_query_heads_of_one_key_head() -> None:
    check_operator(case(40, 8, 1, 16, [4, 3]), torch.float32, table(40, 16), fold=[4, 3])


@pytest.mark.parametrize("fold", [[], [100]])
def test_as_many_key_heads_as_query_heads_and_a_long_window(fold: list[int]) -> None:
    check_operator(case(120, 2, 2, 16, fold), torch.float32, table(120, 16), fold=fold)


def test_window_so_long_that_keys_are_rotated_first() -> None:
    check_operator(case(160, 2, 1, 16, [100]), torch.float32, table(160, 16), fold=[100])


@pytest.mark.parametrize("fold", [[], [16], [3, 5]])
def test_fold_mode(fold: list[int]) -> None:
    tensors = case(50, 4, 2, 16, [])
    doc_start = documents("many", 50)
    check_operator(
        tensors, torch.float32, table(50, 16), fold=fold, doc_start=doc_start, mode="fold"
    )


def test_value_size_that_differs_from_head_size() -> None:
    tensors = case(40, 2, 1, 16, [8])
    tensors["v"] = torch.randn(1, 40, 1, 34, dtype=torch.float64, device=DEVICE)
    check_operator(tensors, torch.float32, None, fold=[8])


def test_inputs_that_are_not_contiguous() -> None:
    q, k, v = (x.float().to(DEVICE) for x in inputs(30, 2, 2, 16))
    joined = torch.cat((q, k, v), dim=2)
    parts = joined[:, :, :2], joined[:, :, 2:4], joined[:, :, 4:]
    assert not parts[1].is_contiguous()
    expected = tensor_attention(q, k, v, [4], backend="triton")
    out = tensor_attention(parts[0], parts[1], parts[2], [4], backend="triton")
    torch.testing.assert_close(out, expected)


def test_large_scores_overflow_neither_forward_nor_backward() -> None:
    tensors = case(40, 2, 1, 16, [4, 3])
    tensors |= {"q": tensors["q"] * 1000, "k": tensors["k"] * 1000}
    results = operator(tensors, torch.float32, "triton", None, fold=[4, 3])
    assert all(x.isfinite().all() for x in results.values())


# The operator at real sizes.


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fold", [[], [64], [16, 8], [512]])
def test_real_sizes(fold: list[int], dtype: torch.dtype, dim: int) -> None:
    num_tokens = 1500 if dtype == torch.float32 else 2041
    check_operator(
        case(num_tokens, 8, 2, dim, fold), dtype, table(num_tokens, dim), fold=fold,
        doc_start=documents("one" if dim % 64 else "many", num_tokens),
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("fold", [[], [16, 8], [512]])
def test_as_many_key_heads_as_query_heads(fold: list[int], dim: int) -> None:
    check_operator(case(2041, 4, 4, dim, fold), torch.bfloat16, table(2041, dim), fold=fold)


@pytest.mark.gpu
def test_extra_memory_grows_with_tokens_not_with_their_square() -> None:
    num_tokens, heads = 65536, 8
    q, k, v = (
        torch.randn(1, num_tokens, h, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, 2, 2)
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = tensor_attention(q, k, v, [256], rotary=table(num_tokens, 128))
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    token_bytes = 2 * 128 * (2 * heads + 4)
    # z of each hop, gradients of q, k, v and z, rotated copies, the tables: a few rows of tensors.
    assert torch.cuda.max_memory_allocated() - before < 6 * token_bytes * num_tokens


# One hop.


@pytest.mark.parametrize("values_are_state", [True, False])
@pytest.mark.parametrize("value_heads", [1, 4])
def test_one_hop_from_a_state(values_are_state: bool, value_heads: int) -> None:
    if values_are_state and value_heads == 1:
        value_heads = 2  # the state has a z per query head: here, two query heads
    heads = 2 if values_are_state else 4
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (2, 45, heads, 16), "k": (2, 45, 1, 16), "values": (2, 45, value_heads, 16),
        "z": (2, 45, heads, 16), "lse": (2, 45, heads), "bias": (heads,),
    }  # fmt: skip
    tensors = {n: torch.randn(s, generator=generator).double() for n, s in shapes.items()}
    if values_are_state:
        del tensors["values"]
    doc_start = documents("many", 45, 2)

    def run(dtype: torch.dtype, backend: Any) -> Results:
        x = {n: t.to(DEVICE, dtype).requires_grad_() for n, t in tensors.items()}
        z, lse = hop(
            x["q"], x["k"], x.get("values", x["z"]), stride=4, length=5, bias=x["bias"],
            state=(x["z"], x["lse"]), reach=document_reach(doc_start, 4), scale=0.3,
            backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad(
            (z, lse), list(x.values()), (cotangent_like_on(z), cotangent_like_on(lse))
        )
        named = {f"d{n}": g for n, g in zip(x, gradients, strict=True)}
        return {"z": z.detach(), "lse": lse.detach()} | named

    with poisoned_memory():
        ours = run(torch.float32, "triton")
    assert_as_good_as_plain(ours, run(torch.float32, "dense"), run(torch.float64, "dense"))


def test_tokens_that_see_nothing_yield_zero_and_pass_no_gradient() -> None:
    q, k, v = (x.float().to(DEVICE).requires_grad_() for x in inputs(20, 2, 1, 16))
    reach = torch.full((1, 20), -1, dtype=torch.int32, device=DEVICE)
    z, lse = hop(q, k, v, stride=1, length=4, reach=reach, backend="triton")
    assert (z == 0).all()
    assert (lse == float("-inf")).all()
    gradients = torch.autograd.grad(z, (q, k, v), torch.ones_like(z))
    assert all((g == 0).all() for g in gradients)


# Registration.


def test_compiled_function_has_no_graph_break_and_the_same_gradients() -> None:
    tensors = case(40, 2, 1, 16, [4])
    rotary = table(40, 16)

    def function(q: Tensor, k: Tensor, v: Tensor, hop_bias: Tensor) -> Tensor:
        out = tensor_attention(q, k, v, [4], hop_bias=hop_bias, rotary=rotary, backend="triton")
        return (out * out).sum()

    results = []
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for run in (function, compiled):
        leaves = [x.float().requires_grad_() for x in tensors.values()]
        results.append(torch.autograd.grad(run(*leaves), leaves))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("name", ["hop", "chain"])
def test_registered_operators_meet_the_contract_of_custom_operators(name: str) -> None:
    q, k, v = (x.float().to(DEVICE).requires_grad_() for x in inputs(20, 2, 1, 16))
    z = torch.randn(1, 20, 2, 16, device=DEVICE, requires_grad=True)
    lse = torch.randn(1, 2, 20, device=DEVICE, requires_grad=True)
    bias = torch.randn(2, device=DEVICE, requires_grad=True)
    doc_start = documents("many", 20)
    reaches = [document_reach(doc_start, stride) for stride in (1, 4)]
    cos, sin = (x.float() for x in table(20, 16))
    arguments: dict[str, tuple[Any, ...]] = {
        "hop": (q, k, z, reaches[1], bias, None, lse, cos, sin, 4, 5, 0.25),
        "chain": (q, k, v, reaches, bias[None], cos, sin, [1, 4], [4, 5], True, 0.25),
    }
    import tensor_attention.gpu.chain  # noqa: F401 - registers both operators

    registered = getattr(torch.ops.tensor_attention, name).default
    torch.library.opcheck(registered, arguments[name])


# What users may get wrong.


def test_errors_name_the_reason() -> None:
    q, k, v = (x.to(DEVICE) for x in inputs(8, 2, 1, 16))
    with pytest.raises(ValueError, match="float64"):
        tensor_attention(q, k, v, [4], backend="triton")
    q, k, v = q.float(), k.float(), v.float()
    with pytest.raises(ValueError, match="causal"):
        tensor_attention(q, k, v, [4], mode="fold", causal=False, backend="triton")
    with pytest.raises(ValueError, match="positive"):
        tensor_attention(q, k, v, [4], scale=-1.0, backend="triton")
    with pytest.raises(ValueError, match="even"):
        tensor_attention(q[..., :5], k[..., :5], v, [4], backend="triton")
    with pytest.raises(ValueError, match="at most 256"):
        tensor_attention(q, k, v.repeat(1, 1, 1, 32), [4], backend="triton")
