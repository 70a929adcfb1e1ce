"""The Triton kernels of the routed axis: in the interpreter, and on a GPU at size.

The rule is that of `test_triton.py`. Inputs of the choice are multiples of a quarter: each score is
exact in every dtype, many are equal, and backends must choose the same to the last tie.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_attention import (
    Rotary,
    document_reach,
    hop,
    routed_attention,
    routed_hop,
)
from tensor_attention.api import Backend
from tensor_attention.gpu.routed_launch import SHARED_MEMORY, operand_bytes
from tensor_attention.routing import POOL, best_blocks, block_scores, block_starts, pooled_keys
from tests.tensor_attention.cases import (
    Results,
    assert_as_good_as_plain,
    choice_of,
    cotangent_like_on,
    doc_start_of,
    poisoned_memory,
    rotary_table,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two runs must be bit-equal where programs race: not in the interpreter, which is also slow.
REPEATS: list[Backend] = ["triton"] if DEVICE == "cuda" else []
Shape = tuple[int, int, int, int, int]  # batch, tokens, query heads, key heads, head size


def documents(num_tokens: int, lengths: list[int], batch: int = 1) -> Tensor:
    """[batch, T] starts; `lengths` repeat, and every further row begins one document later."""
    rows = []
    for row in range(batch):
        sizes: list[int] = []
        while sum(sizes) < num_tokens:
            size = lengths[(len(sizes) + row) % len(lengths)]
            sizes.append(min(size, num_tokens - sum(sizes)))
        rows.append(doc_start_of(sizes))
    return torch.cat(rows).to(DEVICE)


def table(num_tokens: int, dim: int) -> Rotary:
    return Rotary(*(x.to(DEVICE) for x in rotary_table(num_tokens, dim)))


def in_dtype(rotary: Rotary | None, dtype: torch.dtype) -> Rotary | None:
    if rotary is None:
        return None
    return Rotary(*(x.to(torch.promote_types(dtype, torch.float32)) for x in rotary))


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


def quarters(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator) / 4).to(DEVICE)


def case(shape: Shape, dtype: torch.dtype, value_size: int | None = None) -> Results:
    """q, k, v and a state z, lse as a window might leave it; lse is float32 whatever the dtype."""
    batch, tokens, heads, key_heads, dim = shape
    value_size = value_size or dim
    sizes = {
        "q": (batch, tokens, heads, dim), "k": (batch, tokens, key_heads, dim),
        "v": (batch, tokens, key_heads, value_size), "z": (batch, tokens, heads, value_size),
    }  # fmt: skip
    tensors = {name: normal(size, i).to(dtype) for i, (name, size) in enumerate(sizes.items())}
    return tensors | {"lse": normal((batch, tokens, heads), 9) + 2}


def run_hop(
    tensors: Results, choice: Tensor, backend: Any, rotary: Rotary | None, double: bool = False,
    **options: Any,
) -> Results:  # fmt: skip
    """z, lse and every gradient of `routed_hop` for fixed cotangents of both."""
    leaves = {n: (x.double() if double else x).requires_grad_() for n, x in tensors.items()}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    z, lse = routed_hop(
        leaves["q"], leaves["k"], leaves["v"], choice, state=(leaves["z"], leaves["lse"]),
        rotary=in_dtype(rotary, leaves["q"].dtype), backend=backend, **options,
    )  # fmt: skip
    cotangents = cotangent_like_on(z), cotangent_like_on(lse)
    gradients = torch.autograd.grad((z, lse), list(leaves.values()), cotangents)
    named = {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {"out": z.detach(), "lse_out": lse.detach()} | named


def check(
    shape: Shape, dtype: torch.dtype, route: dict[str, Any], *, open_tile: int = 1,
    lengths: list[int] | None = None, rotated: bool = True, value_size: int | None = None,
) -> None:  # fmt: skip
    """The choice, then the rule for the hop and every gradient; all written; two runs bit-equal."""
    batch, tokens, heads, key_heads, dim = shape
    doc_start = documents(tokens, lengths or [tokens], batch)
    q, k = quarters((batch, tokens, heads, dim), 5), quarters((batch, tokens, key_heads, dim), 6)
    q, k = q.to(dtype), k.to(dtype)
    with poisoned_memory():
        backends: list[Backend] = ["dense", "triton", *REPEATS]
        choices = [choice_of(q, k, doc_start=doc_start, backend=name, **route) for name in backends]
    for choice in choices[1:]:
        assert torch.equal(choice, choices[0])

    tensors = case(shape, dtype, value_size)
    options = {n: x for n, x in route.items() if n != "top_k"}
    options |= {"doc_start": doc_start, "open_tile": open_tile}
    rotary = table(tokens, dim) if rotated else None
    with poisoned_memory():
        ours = run_hop(tensors, choices[0], "triton", rotary, **options)
        others = [run_hop(tensors, choices[0], "triton", rotary, **options) for _ in REPEATS]
    plain = run_hop(tensors, choices[0], "dense", rotary, **options)
    exact = run_hop(tensors, choices[0], "dense", rotary, double=True, **options)
    # The gradient of the state's lse is a product with z, which is rounded to the dtype.
    rounded = [x | {"dlse": x["dlse"].to(dtype)} for x in (ours, plain)]
    assert_as_good_as_plain(rounded[0], rounded[1], exact)
    for again in others:
        assert all(torch.equal(ours[name], again[name]) for name in ours)


# Sizes that the interpreter can run.


@pytest.mark.parametrize(
    ("shape", "dtype", "route", "options"),
    [
        ((1, 1, 2, 1, 16), torch.float32, (16, 16, 1, 1), {}),
        ((1, 65, 3, 1, 20), torch.float32, (17, 16, 2, 3), {"open_tile": 5, "lengths": [53, 12]}),
        ((1, 79, 4, 1, 16), torch.float16, (16, 16, 1, 4), {"lengths": [57, 1, 21]}),
        ((1, 60, 8, 1, 16), torch.float32, (20, 16, 3, 1), {"open_tile": 16, "lengths": [3, 57]}),
        ((2, 39, 2, 2, 16), torch.float32, (16, 16, 1, 2), {"open_tile": 7, "lengths": [35, 4]}),
        ((1, 75, 2, 1, 16), torch.float16, (32, 32, 1, 1), {"rotated": False, "value_size": 34}),
        ((1, 265, 1, 1, 16), torch.float32, (128, 128, 1, 1), {"lengths": [261]}),
    ],
)
def test_choice_output_and_gradients(
    shape: Shape, dtype: torch.dtype, route: tuple[int, int, int, int], options: dict[str, Any]
) -> None:
    names = ("window", "block", "top_k", "stretch")
    check(shape, dtype, dict(zip(names, route, strict=True)), **options)


def test_a_long_row_chooses_the_best_of_many_blocks() -> None:
    # More slots than one product of the kernel takes, and fewer chosen than bound the choice.
    q, k = quarters((1, 420, 1, 16), 5), quarters((1, 420, 1, 16), 6)
    options: dict[str, Any] = {"window": 16, "block": 16, "top_k": 3}
    choice = choice_of(q[:, :], k, backend="triton", **options)
    assert torch.equal(choice, choice_of(q, k, backend="dense", **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_choice_is_that_of_dense_where_scores_are_not_nearly_equal(dtype: torch.dtype) -> None:
    q, k = normal((1, 90, 4, 20), 1).to(dtype), normal((1, 90, 1, 20), 2).to(dtype)
    rotary, doc_start = table(90, 20), documents(90, [61, 29])
    options: dict[str, Any] = {"window": 16, "block": 16, "top_k": 1, "stretch": 3}
    choices = [
        choice_of(
            q, k, doc_start=doc_start, backend=backend, rotary=in_dtype(rotary, dtype), **options
        )
        for backend in ("triton", "dense")
    ]
    assert torch.equal(*choices)


def test_equal_scores_choose_the_earlier_blocks() -> None:
    q, k = torch.ones(1, 130, 1, 16, device=DEVICE), torch.ones(1, 130, 1, 16, device=DEVICE)
    choice = choice_of(q, k, window=16, block=16, top_k=2, backend="triton")
    for token, blocks in enumerate(choice[0, :, 0].tolist()):
        far = range((token - 16) // 16 + 1)
        assert blocks == [*far[:3], *[-1] * (3 - len(far))]


def test_changing_all_later_tokens_changes_nothing() -> None:
    tokens, cut = 80, 53
    doc_start = documents(tokens, [9, 71])
    tensors = [normal((1, tokens, n, 16), n) for n in (2, 1, 1)]
    changed = [torch.cat((x[:, :cut], -3 * x[:, cut:]), 1) for x in tensors]
    options: dict[str, Any] = {
        "window": 16, "block": 16, "top_k": 1, "open_tile": 5, "doc_start": doc_start,
        "rotary": table(tokens, 16), "backend": "triton",
    }  # fmt: skip
    before, after = (routed_attention(x[0], x[1], x[2], **options) for x in (tensors, changed))
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert not torch.equal(before[:, cut:], after[:, cut:])


def test_the_operator_is_the_window_and_the_hop_on_inputs_that_are_not_contiguous() -> None:
    joined = normal((1, 60, 4, 16), 0)
    q, k, v = joined[:, :, :2], joined[:, :, 2:3], joined[:, :, 3:]
    doc_start, rotary = documents(60, [50, 10]), table(60, 16)
    shared: dict[str, Any] = {"rotary": rotary, "backend": "triton"}
    route: dict[str, Any] = {"window": 16, "block": 16, "doc_start": doc_start}
    out = routed_attention(q, k, v, top_k=1, open_tile=3, **route, **shared)
    q, k, v = (x.contiguous() for x in (q, k, v))
    state = hop(q, k, v, stride=1, length=16, reach=document_reach(doc_start, 1), **shared)
    choice = choice_of(q, k, top_k=1, **route, **shared)
    expected, _ = routed_hop(q, k, v, choice, state=state, open_tile=3, **route, **shared)
    assert torch.equal(out, expected)


def check_slice(
    shape: Shape, dtype: torch.dtype, route: dict[str, Any], here: slice, open_tile: int,
    lengths: list[int],
) -> None:  # fmt: skip
    """A slice of a row chooses and yields what the row does, with the gradients of its outputs."""
    batch, tokens, heads, key_heads, dim = shape
    q, k = quarters((batch, tokens, heads, dim), 5), quarters((batch, tokens, key_heads, dim), 6)
    q, k = q.to(dtype), k.to(dtype)
    options = {n: x for n, x in route.items() if n != "top_k"}
    options |= {"doc_start": documents(tokens, lengths, batch), "backend": "triton"}
    choice = choice_of(q, k, top_k=route["top_k"], **options)
    chosen = choice_of(q[:, here], k, top_k=route["top_k"], first=here.start, **options)
    assert torch.equal(chosen, choice[:, here])

    rotary = in_dtype(table(tokens, dim), dtype)
    options |= {"rotary": rotary, "open_tile": open_tile}
    leaves = {n: x.requires_grad_() for n, x in case(shape, dtype).items()}
    names, earlier = list(leaves.values()), min(here.start, open_tile - 1)
    q, k, v, z, lse = names
    whole = routed_hop(q, k, v, choice, state=(z, lse), **options)
    part = routed_hop(
        q[:, here], k, v, choice[:, here.start - earlier : here.stop], first=here.start,
        state=(z[:, here], lse[:, here]), **options,
    )  # fmt: skip
    cotangents = [cotangent_like_on(x) for x in part]
    expected = torch.autograd.grad([x[:, here] for x in whole], names, cotangents)
    ours = torch.autograd.grad(part, names, cotangents)
    for x, y in zip((*part, *ours), (*(x[:, here] for x in whole), *expected), strict=True):
        # Only the order of sums over tokens differs.
        assert (x - y).abs().max() <= torch.finfo(dtype).eps * tokens**0.5 * y.abs().max()


def test_a_slice_of_a_row() -> None:
    route = {"window": 17, "block": 16, "top_k": 1, "stretch": 2}
    check_slice((2, 44, 1, 1, 16), torch.float32, route, slice(37, 44), 6, [44, 9])


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "end"), [(0, 1), (1024, 2041), (700, 2040), (1999, 2000)])
def test_a_slice_of_a_longer_row(first: int, end: int) -> None:
    route = {"window": 128, "block": 64, "top_k": 5, "stretch": 4}
    check_slice((2, 2041, 8, 2, 64), torch.float32, route, slice(first, end), 16, PACKED)


def test_large_scores_overflow_neither_forward_nor_backward() -> None:
    tensors = case((1, 60, 2, 1, 16), torch.float32)
    tensors |= {"q": tensors["q"] * 1000, "k": tensors["k"] * 1000}
    options: dict[str, Any] = {"window": 16, "block": 16}
    choice = choice_of(tensors["q"], tensors["k"], top_k=1, backend="triton", **options)
    results = run_hop(tensors, choice, "triton", None, **options)
    assert all(x.isfinite().all() for x in results.values())


# Registration.


def compiled_and_eager(tokens: int, heads: int, dim: int, backend: str) -> Iterator[list[Tensor]]:
    rotary, doc_start = table(tokens, dim), documents(tokens, [tokens // 2 + 3, tokens])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = routed_attention(
            q, k, v, window=32, block=16, top_k=1, stretch=2, open_tile=3, doc_start=doc_start,
            rotary=rotary, backend="triton",
        )  # fmt: skip
        return (out * out).sum()

    for run in (torch.compile(function, backend=backend, fullgraph=True), function):
        leaves = [normal((1, tokens, n, dim), n).requires_grad_() for n in (heads, 1, 1)]
        yield list(torch.autograd.grad(run(*leaves), leaves))


def test_compiled_function_has_no_graph_break_and_the_same_gradients() -> None:
    for x, y in zip(*compiled_and_eager(60, 2, 16, "aot_eager"), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.gpu
def test_compiled_by_inductor_at_size() -> None:
    for x, y in zip(*compiled_and_eager(1021, 4, 64, "inductor"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["choose_blocks", "routed_hop"])
def test_registered_operators_meet_the_contract_of_custom_operators(name: str) -> None:
    tensors = case((1, 36, 1, 1, 16), torch.float32)
    q, k, v, z, lse = (x.requires_grad_() for x in tensors.values())
    lse = lse.detach().transpose(1, 2).contiguous().requires_grad_()
    doc_start = documents(36, [36])
    cos, sin = (x.float() for x in table(36, 16))
    choice = choice_of(q, k, window=16, block=16, top_k=1, backend="triton")
    arguments: dict[str, tuple[Any, ...]] = {
        "choose_blocks": (q.detach(), k.detach(), doc_start, 16, 16, 1, 8),
        "routed_hop": (q, k, v, choice, doc_start, z, lse, cos, sin, 16, 16, 2, 3, 0.25),
    }
    registered = getattr(torch.ops.tensor_attention, name).default
    torch.library.opcheck(registered, arguments[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 24}, r"block must be one of \(16, 32, 64, 128\), got 24"),
        ({"open_tile": 17}, "open_tile must be at most 16, got 17"),
        ({"scale": -1.0}, "positive"),
    ],
)
def test_errors_name_the_reason(change: dict[str, Any], message: str) -> None:
    q, k, v = (normal((1, 40, n, 16), n) for n in (2, 1, 1))
    options: dict[str, Any] = {"window": 32, "block": 16, "top_k": 1} | change
    with pytest.raises(ValueError, match=message):
        routed_attention(q, k, v, backend="triton", **options)


# 4 heads of 256 in float32, blocks of 64: an H200 refused these as 262,144 bytes.
@pytest.mark.parametrize(
    ("group", "dim", "dtype", "fits"),
    [
        (4, 256, torch.float32, True), (8, 256, torch.float32, False),
        (8, 256, torch.bfloat16, True), (8, 128, torch.float32, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [32, 64, 128])
def test_operands_fit_the_shared_memory_of_an_h200(
    group: int, dim: int, dtype: torch.dtype, fits: bool, block: int
) -> None:
    q = torch.empty(1, 1, group, dim, dtype=dtype, device="meta")
    assert (operand_bytes(q, q[:, :, :1], q[:, :, :1], block) <= SHARED_MEMORY) == fits


def test_what_does_not_fit_shared_memory_is_refused() -> None:
    q, k, v = (normal((1, 40, n, 256), n) for n in (8, 1, 1))
    with pytest.raises(ValueError, match=r"must fit in 232448 bytes .* got 327680"):
        routed_attention(q, k, v, window=32, block=32, top_k=1, backend="triton")


# At size.

PACKED = [701, 1, 1013, 64, 37, 129, 555]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_head_sizes_dtypes_and_blocks(block: int, dim: int, dtype: torch.dtype) -> None:
    # The other numbers cycle over the grid.
    cycle = block // 32 + dim // 16 + dtype.itemsize
    route = {
        "window": 128 + cycle % 3, "block": block, "top_k": (1, 7, 16)[cycle % 3],
        "stretch": (1, 4)[cycle // 2 % 2],
    }  # fmt: skip
    check(
        (1, 2041, 4, (4, 1, 2)[cycle % 3], dim), dtype, route, open_tile=(1, 5, 16)[cycle // 3 % 3],
        lengths=PACKED if cycle % 2 else None,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("open_tile", [1, 5, 16])
@pytest.mark.parametrize("top_k", [1, 7, 16, 64])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_groups_and_numbers_of_blocks(group: int, top_k: int, open_tile: int) -> None:
    route = {"window": 64, "block": 32, "top_k": top_k, "stretch": 4 if group % 2 else 1}
    check(
        (2 if group == 1 else 1, 2525, group, 1, 64), torch.bfloat16, route, open_tile=open_tile,
        lengths=[2401, 124] if top_k == 64 else PACKED,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("rotated", [False, True])
def test_a_real_choice_differs_from_dense_only_between_nearly_equal_scores(rotated: bool) -> None:
    q = normal((1, 4099, 8, 128), 1).bfloat16()
    k = normal((1, 4099, 2, 128), 2).bfloat16()
    rotary = in_dtype(table(4099, 128), torch.bfloat16) if rotated else None
    options: dict[str, Any] = {"window": 128, "block": 32, "top_k": 16, "rotary": rotary}
    ours, plain = (choice_of(q, k, backend=name, **options) for name in ("triton", "dense"))
    missing = (plain[..., None] != ours[..., None, :]).all(-1)
    assert missing.float().mean() < 1e-3  # a mean or a sum that is rounded the other way
    assert torch.equal(ours[..., 0], plain[..., 0])


@pytest.mark.gpu
def test_nothing_waits_for_the_host() -> None:
    q, k, v = (normal((1, 1500, n, 64), n).bfloat16().requires_grad_() for n in (4, 1, 1))
    doc_start, rotary = documents(1500, PACKED), in_dtype(table(1500, 64), torch.bfloat16)
    cotangent = cotangent_like_on(q)

    def step() -> None:
        out = routed_attention(
            q, k, v, window=128, block=64, top_k=4, open_tile=5, doc_start=doc_start,
            rotary=rotary, backend="triton",
        )  # fmt: skip
        torch.autograd.grad(out, (q, k, v), cotangent)

    step()  # kernels are compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def extra_memory(num_tokens: int) -> int:
    """Bytes that forward and backward take beside their inputs."""
    q, k, v = (
        torch.randn(1, num_tokens, n, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for n in (8, 2, 2)
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = routed_attention(q, k, v, window=256, block=64, top_k=16, backend="triton")
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
def test_extra_memory_grows_with_tokens_not_with_their_square() -> None:
    extra_memory(1024)
    assert extra_memory(131072) < 2.05 * extra_memory(65536)


def last_tokens(
    q: Tensor, k: Tensor, v: Tensor, choice: Tensor, count: int, window: int, block: int
) -> Tensor:
    """Outputs [1, count, 1, E] of the last tokens of one document and head, by the definition."""
    num_tokens, work = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    token = torch.arange(num_tokens - count, num_tokens, device=q.device)[:, None]
    near = token - torch.arange(window, device=q.device)
    far = choice[0, -count:, 0, :, None].long() * block + torch.arange(block, device=q.device)
    keys = torch.cat((near, far.flatten(1)), dim=1)
    beyond = torch.arange(keys.shape[1], device=q.device) >= window
    hidden = beyond & ((keys > token - window) | (keys < 0))
    score = torch.einsum("td,tud->tu", q[0, -count:, 0].to(work), k[0, keys, 0].to(work))
    score = (score * q.shape[3] ** -0.5).masked_fill(hidden, float("-inf"))
    out = torch.einsum("tu,tue->te", score.softmax(-1), v[0, keys, 0].to(work))
    return out[None, :, None].to(v.dtype)


def check_last_tokens(
    num_tokens: int, dim: int, dtype: torch.dtype, window: int, block: int, top_k: int
) -> None:
    """Choice, outputs and gradients of the last 64 tokens of a row; gradients reach all of it."""
    count = 64
    tensors = {n: quarters((1, num_tokens, 1, dim), i).to(dtype) for i, n in enumerate("qkv")}
    tensors["v"] = normal((1, num_tokens, 1, dim), 3).to(dtype)
    route: dict[str, Any] = {"window": window, "block": block, "top_k": top_k}
    choice = choice_of(tensors["q"], tensors["k"], backend="triton", **route)
    doc_start = torch.zeros(1, num_tokens, dtype=torch.int32, device=DEVICE)
    starts = block_starts(doc_start, block)
    keys = pooled_keys(tensors["k"], starts, block, POOL).float()
    scores = block_scores(tensors["q"][:, -count:].float().transpose(1, 2), keys)
    first = num_tokens - count
    expected = best_blocks(scores, starts, doc_start, first, window, block, top_k)
    assert torch.equal(choice[:, -count:], expected)

    def attend(which: str) -> Results:
        x = {n: t.double() if which == "exact" else t.clone() for n, t in tensors.items()}
        leaves = {n: (t / 4 if n == "q" else t).requires_grad_() for n, t in x.items()}
        q, k, v = leaves.values()
        if which == "ours":
            out = routed_attention(q, k, v, **route, backend="triton")[:, -count:]
        else:
            out = last_tokens(q, k, v, choice, count, window, block)
        gradients = torch.autograd.grad(out, list(leaves.values()), cotangent_like_on(out))
        return {"out": out.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}

    results = [attend(which) for which in ("ours", "plain", "exact")]
    assert_as_good_as_plain(*results)


def test_last_tokens_of_a_row() -> None:
    check_last_tokens(117, 16, torch.float32, window=24, block=16, top_k=2)


@pytest.mark.gpu
def test_last_tokens_of_a_row_of_a_million() -> None:
    check_last_tokens(2**20 + 37, 64, torch.bfloat16, window=64, block=32, top_k=7)
