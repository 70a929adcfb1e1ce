"""Every backend gives the same answer to the same arguments, or refuses them with the same line."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_attention import Rotary, document_reach, hop, tensor_attention
from tests.tensor_attention.cases import cotangent_like, doc_start_of, rotary_table

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Any] = ["dense", "blocked", "triton"]
BATCH, TOKENS, HEADS, KEY_HEADS, DIM = 2, 10, 2, 1, 8
Changes = dict[str, Any]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)


def on_device(x: Any) -> Any:
    if isinstance(x, tuple):
        return type(x)(*map(on_device, x)) if isinstance(x, Rotary) else tuple(map(on_device, x))
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def operator_arguments(changes: Changes) -> Changes:
    """Arguments of `tensor_attention`, some of them replaced."""
    q = random(BATCH, TOKENS, HEADS, DIM)
    k, v = (random(BATCH, TOKENS, KEY_HEADS, DIM + i) for i in (0, 2))
    rotary = Rotary(*(x.float() for x in rotary_table(TOKENS, DIM)))
    arguments: Changes = {
        "q": q, "k": k, "v": v, "fold": [3], "hop_bias": random(1, HEADS), "rotary": rotary,
        "doc_start": doc_start_of([4, 6]).expand(BATCH, -1),
    }  # fmt: skip
    return {name: on_device(x) for name, x in (arguments | changes).items()}


def hop_arguments(changes: Changes) -> Changes:
    """Arguments of a later `hop`, some of them replaced."""
    q, z = (random(BATCH, TOKENS, HEADS, DIM + i) for i in (0, 2))
    arguments: Changes = {
        "q": q, "k": random(BATCH, TOKENS, KEY_HEADS, DIM), "values": z, "stride": 3, "length": 4,
        "reach": document_reach(doc_start_of([4, 6]), 3).expand(BATCH, -1),
        "bias": random(HEADS), "state": (z, random(BATCH, TOKENS, HEADS)),
        "rotary": Rotary(*(x.float() for x in rotary_table(TOKENS, DIM))),
    }  # fmt: skip
    return {name: on_device(x) for name, x in (arguments | changes).items()}


def first_hop(changes: Changes) -> Changes:
    """As `hop_arguments`, but of a first hop."""
    return hop_arguments({"state": None, "stride": 1} | changes)


def outputs(function: Callable[..., Any], arguments: Changes) -> list[Tensor]:
    """What `function` returns."""
    result = function(**arguments)
    return list(result) if isinstance(result, tuple) else [result]


def outputs_and_gradients(function: Callable[..., Any], arguments: Changes) -> list[Tensor]:
    """What `function` returns, and the gradients of its inputs."""
    inputs = {name: x for name, x in arguments.items() if name in ("q", "k", "v", "values")}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    for name in ("bias", "hop_bias"):
        if arguments.get(name) is not None:
            leaves[name] = arguments[name].detach().requires_grad_()
    if arguments.get("state") is not None:
        z, lse = arguments["state"]
        z = leaves["values"] if z is arguments["values"] else z
        leaves["lse"] = lse.detach().requires_grad_()
        arguments = arguments | {"state": (z, leaves["lse"])}
    results = outputs(function, arguments | {n: x for n, x in leaves.items() if n != "lse"})
    cotangents = []
    for x in results:
        weights = cotangent_like(torch.empty(x.shape, dtype=x.dtype)).to(x.device)
        cotangents.append(weights.masked_fill(x.isneginf(), 0))
    gradients = torch.autograd.grad(results, list(leaves.values()), cotangents)
    return [*(x.detach() for x in results), *gradients]


def assert_same_answer(
    function: Callable[..., Any], arguments: Changes, gradients: bool = True
) -> list[Tensor]:
    """All backends agree, and return numbers; the answer of the definition."""
    run = outputs_and_gradients if gradients else outputs
    expected, *others = (run(function, arguments | {"backend": name}) for name in BACKENDS)
    assert not any(x.isnan().any() for x in expected)
    for name, answer in zip(BACKENDS[1:], others, strict=True):
        for i, (x, y) in enumerate(zip(answer, expected, strict=True)):
            assert x.dtype == y.dtype
            where = partial("{}, result {}: {}".format, name, i)
            torch.testing.assert_close(x, y, rtol=3e-5, atol=3e-5, msg=where)
    return expected


def assert_same_refusal(function: Callable[..., Any], arguments: Changes, rule: str) -> None:
    """All backends, and the automatic choice, refuse with the same line."""
    lines = set()
    for name in [*BACKENDS, "auto"]:
        with pytest.raises(ValueError, match=rule) as error:
            function(**({"backend": name} | arguments))
        lines.add(str(error.value))
    assert len(lines) == 1, lines
    assert "\n" not in lines.pop()


LATE = torch.arange(TOKENS, dtype=torch.int32).expand(BATCH, -1)
WIDE = random(BATCH, TOKENS, 3 * HEADS, DIM)
TABLE = rotary_table(2 * TOKENS, DIM)

ACCEPTED_BY_THE_OPERATOR: dict[str, Changes] = {
    "document starts of one row for all": {"doc_start": doc_start_of([4, 6])},
    "no document starts": {"doc_start": None},
    "starts in int64": {"doc_start": doc_start_of([4, 6]).expand(BATCH, -1).long()},
    "starts in uint8": {"doc_start": doc_start_of([4, 6]).expand(BATCH, -1).byte()},
    "starts that are not contiguous": {"doc_start": doc_start_of([4, 6]).T.expand(-1, BATCH).T},
    "starts beyond their tokens": {"doc_start": LATE + 3},
    "some starts beyond their tokens": {"doc_start": (LATE + 3) % 7},
    "starts before the row": {"doc_start": LATE * 0 - 5},
    "starts far before the row": {"doc_start": LATE.long() * 0 - 2**40},
    "starts far beyond the row": {"doc_start": LATE.long() * 0 + 2**40},
    "a bias that is not contiguous": {"hop_bias": random(HEADS, 3).T[1:2]},
    "a bias in float64": {"hop_bias": random(1, HEADS, dtype=torch.float64)},
    "a bias in bf16": {"hop_bias": random(1, HEADS).bfloat16()},
    "a table in float64": {"rotary": rotary_table(TOKENS, DIM)},
    "a table in bf16": {"rotary": Rotary(*(x.bfloat16() for x in TABLE))},
    "a table that is longer and not contiguous": {
        "rotary": Rotary(*(x[::2].float() for x in TABLE))
    },
    "inputs that are not contiguous": {"q": WIDE[:, :, ::3], "k": WIDE[:, :, 1::6]},
    "one row expanded": {"q": random(1, TOKENS, HEADS, DIM).expand(BATCH, -1, -1, -1)},
    "an axis longer than the row": {"fold": [16]},
    "axes far longer than the row": {"fold": [1 << 40, 1 << 40], "hop_bias": None},
    "fold mode": {"mode": "fold", "hop_bias": None},
    "fold mode, starts beyond their tokens": {
        "mode": "fold",
        "hop_bias": None,
        "doc_start": (LATE + 3) % 7,
    },
}


@pytest.mark.parametrize("name", ACCEPTED_BY_THE_OPERATOR)
def test_every_backend_gives_the_same_answer(name: str) -> None:
    arguments = operator_arguments(ACCEPTED_BY_THE_OPERATOR[name])
    assert_same_answer(tensor_attention, arguments, gradients="contiguous" in name)


REACH = document_reach(doc_start_of([4, 6]), 3)
MINUS = torch.tensor([0, -1, 2, -7, 5] * 2, dtype=torch.int32).expand(BATCH, -1)
NOTHING = torch.where(torch.arange(TOKENS * HEADS) % 3 == 0, float("-inf"), 0.0)
LSE = random(BATCH, TOKENS, HEADS) + NOTHING.view(TOKENS, HEADS).to(DEVICE)
Z = random(BATCH, TOKENS, HEADS, DIM + 2)
ACCEPTED_BY_A_HOP: dict[str, Changes] = {
    "reach of one row for all": {"reach": REACH},
    "reach in int64": {"reach": REACH.long()},
    "reach far beyond the row": {"reach": REACH.long() + 2**40},
    "reach a little beyond the row": {"reach": LATE // 3 + 2},
    "reach below zero": {"reach": MINUS},
    "the lowest reach": {"reach": MINUS * 0 - 2**31},
    "a bias that is not contiguous": {"bias": random(HEADS, 3)[:, 1]},
    "a bias in float64": {"bias": random(HEADS, dtype=torch.float64)},
    "a state that is not contiguous": {
        "values": Z.transpose(1, 2).contiguous().transpose(1, 2),
        "state": (random(BATCH, TOKENS, 2 * HEADS, DIM + 2)[:, :, ::2],
                  random(BATCH, HEADS, TOKENS).transpose(1, 2)),
    },
    "a state in which some tokens have seen nothing": {"reach": MINUS, "state": (Z, LSE)},
    "log-sum-exps in float64": {"state": (Z, random(BATCH, TOKENS, HEADS).double())},
    "values of the key heads": {"values": random(BATCH, TOKENS, KEY_HEADS, DIM + 2)},
    "an axis without end": {"length": 2**40},
    "an axis of one step": {"length": 1},
    "a stride longer than the row": {"stride": 16},
    "a stride far longer than the row": {"stride": 2**40},
    "a table of as many positions as there are steps": {
        "rotary": Rotary(*(x[:4].float() for x in TABLE))
    },
}  # fmt: skip


@pytest.mark.parametrize("arguments", [hop_arguments, first_hop])
@pytest.mark.parametrize("name", ACCEPTED_BY_A_HOP)
def test_every_backend_gives_the_same_answer_for_one_hop(
    name: str, arguments: Callable[[Changes], Changes]
) -> None:
    changes = ACCEPTED_BY_A_HOP[name]
    if arguments is first_hop:
        changes = {n: x for n, x in changes.items() if n != "state"}
        changes = {n: x for n, x in changes.items() if n != "rotary"}
    assert_same_answer(hop, arguments(changes), gradients="contiguous" in name)


@pytest.mark.parametrize("arguments", [hop_arguments, first_hop])
def test_a_token_that_sees_nothing_yields_zero_and_minus_infinity(
    arguments: Callable[[Changes], Changes],
) -> None:
    changes: Changes = {"reach": MINUS, "state": (Z, torch.full_like(LSE, float("-inf")))}
    if arguments is first_hop:
        del changes["state"]
    z, lse, *gradients = assert_same_answer(hop, arguments(changes))
    sees_nothing = (MINUS < 0).to(DEVICE) if arguments is first_hop else lse[..., 0].isneginf()
    assert sees_nothing.any()
    assert (z[sees_nothing] == 0).all()
    assert lse[sees_nothing].isneginf().all()
    assert (gradients[0][sees_nothing] == 0).all()


def test_a_start_beyond_its_token_counts_as_the_token_itself() -> None:
    late, own = (operator_arguments({"doc_start": LATE + n}) for n in (5, 0))
    assert torch.equal(tensor_attention(**late), tensor_attention(**own))


def test_a_start_before_the_row_counts_as_its_first_token() -> None:
    early, first = (operator_arguments({"doc_start": LATE * 0 - n}) for n in (5, 0))
    assert torch.equal(tensor_attention(**early), tensor_attention(**first))


EMPTY = {"no tokens": (BATCH, 0), "no rows": (0, TOKENS), "neither": (0, 0)}


@pytest.mark.parametrize("fold", [[], [3]])
@pytest.mark.parametrize("kind", EMPTY)
def test_empty_inputs_give_empty_results_with_gradients(kind: str, fold: list[int]) -> None:
    batch, tokens = EMPTY[kind]
    q, k, v = (random(batch, tokens, heads, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    doc_start = torch.zeros(batch, tokens, dtype=torch.int32, device=DEVICE)
    bias = random(len(fold), HEADS) if fold else None
    changes: Changes = {"fold": fold, "hop_bias": bias, "doc_start": doc_start}
    arguments = operator_arguments({"q": q, "k": k, "v": v} | changes)
    out, *gradients = assert_same_answer(tensor_attention, arguments)
    assert out.shape == (batch, tokens, HEADS, DIM)
    assert [x.shape for x in gradients[:3]] == [x.shape for x in (q, k, v)]
    z, lse = random(batch, tokens, HEADS, DIM), random(batch, tokens, HEADS)
    for state in (None, (z, lse)):
        changes = {"q": q, "k": k, "values": z, "reach": doc_start, "state": state}
        results = assert_same_answer(hop, hop_arguments(changes))
        assert [x.shape for x in results[:2]] == [z.shape, lse.shape]


HALF = [x[:, : DIM // 4].float() for x in TABLE]
ONE = [x[:, :1].float() for x in TABLE]
GOOD = [x.float() for x in TABLE]
REFUSED_BY_THE_OPERATOR: dict[str, tuple[Changes, str]] = {
    "starts of another batch": (
        {"doc_start": LATE[:1].expand(3, -1)},
        r"doc_start must be .*\[2, 10\]",
    ),
    "starts of fewer tokens": ({"doc_start": LATE[:, 1:]}, r"doc_start must be .*got \[2, 9\]"),
    "starts without a batch": ({"doc_start": LATE[0]}, r"doc_start must be .*got \[10\]"),
    "starts as floats": (
        {"doc_start": LATE.float()},
        "doc_start must be integers, got torch.float32",
    ),
    "starts as truth values": (
        {"doc_start": LATE > 3},
        "doc_start must be integers, got torch.bool",
    ),
    "a table of half the width": (
        {"rotary": Rotary(*HALF)},
        r"rotary.cos must be .*4\], got \[20, 2\]",
    ),
    "a table of one column": ({"rotary": Rotary(*ONE)}, r"rotary.cos must be .*got \[20, 1\]"),
    "a table of whole heads": (
        {"rotary": Rotary(*(torch.cat((x, x), 1) for x in GOOD))},
        r"rotary.cos must be .*got \[20, 8\]",
    ),
    "sines of another width": (
        {"rotary": Rotary(GOOD[0], ONE[1])},
        r"rotary.sin must be .*\[20, 1\]",
    ),
    "fewer sines": (
        {"rotary": Rotary(GOOD[0], GOOD[1][:9])},
        "rotary.sin must have at least 10 positions, got 9",
    ),
    "too few positions": (
        {"rotary": Rotary(*(x[:9] for x in GOOD))},
        "at least 10 positions, got 9",
    ),
    "a table of integers": (
        {"rotary": Rotary(*(x.int() for x in GOOD))},
        "rotary.cos must be float",
    ),
    "an unknown mode": ({"mode": "distnace"}, 'mode must be "distance" or "fold", got "distnace"'),
    "an unknown backend": ({"backend": "tritn"}, 'backend must be .*"triton", got "tritn"'),
    "looking ahead in distance mode": (
        {"causal": False},
        'causal must be True in mode = "distance"',
    ),
    "a scale of zero": ({"scale": 0.0}, "scale must be a positive number, got 0.0"),
    "a scale below zero": ({"scale": -1.0}, "scale must be a positive number, got -1.0"),
    "a scale that is not a number": ({"scale": float("nan")}, "scale must be a positive number"),
    "a scale without end": ({"scale": float("inf")}, "scale must be a positive number, got inf"),
    "heads that are not a multiple": (
        {n: random(BATCH, TOKENS, 2, DIM) for n in "kv"} | {"q": random(BATCH, TOKENS, 3, DIM)},
        "H % K must be 0",
    ),
    "no heads": (
        {"q": random(BATCH, TOKENS, 0, DIM)},
        r"q must be \[B, T, H, D\].*got \[2, 10, 0, 8\]",
    ),
    "no key heads": (
        {n: random(BATCH, TOKENS, 0, DIM) for n in "kv"},
        r"k must match q .*got \[2, 10, 0, 8\]",
    ),
    "heads of no size": (
        {n: random(BATCH, TOKENS, 1, 0) for n in "qkv"},
        r"q must be \[B, T, H, D\]",
    ),
    "queries without a batch": ({"q": random(TOKENS, HEADS, DIM)}, r"q must be \[B, T, H, D\]"),
    "keys without a batch": (
        {"k": random(TOKENS, KEY_HEADS, DIM)},
        r"k must match q .*got \[10, 1, 8\]",
    ),
    "keys of fewer tokens": ({"k": random(BATCH, TOKENS - 1, KEY_HEADS, DIM)}, "k must match q"),
    "values of other heads": ({"v": random(BATCH, TOKENS, HEADS, DIM)}, "v must match k"),
    "values of no size": ({"v": random(BATCH, TOKENS, KEY_HEADS, 0)}, "v must match k"),
    "keys in another dtype": (
        {"k": random(BATCH, TOKENS, KEY_HEADS, DIM).half()},
        "one floating-point dtype",
    ),
    "values in another dtype": (
        {"v": random(BATCH, TOKENS, KEY_HEADS, DIM).double()},
        "one floating-point dtype",
    ),
    "integers": (
        {n: random(BATCH, TOKENS, 2, DIM).int() for n in "qkv"},
        "one floating-point dtype.*got torch.int32",
    ),
    "a bias of another shape": (
        {"hop_bias": random(2, HEADS)},
        r"hop_bias must be \[1, 2\], got \[2, 2\]",
    ),
    "a bias of one number": (
        {"hop_bias": random(1, 1)},
        r"hop_bias must be \[1, 2\], got \[1, 1\]",
    ),
    "a bias of integers": ({"hop_bias": random(1, HEADS).int()}, "hop_bias must be float"),
    "an axis of one step": ({"fold": [1]}, "lengths of at least 2"),
}


@pytest.mark.parametrize("name", REFUSED_BY_THE_OPERATOR)
def test_every_backend_refuses_with_the_same_line(name: str) -> None:
    changes, rule = REFUSED_BY_THE_OPERATOR[name]
    assert_same_refusal(tensor_attention, operator_arguments(changes), rule)


STATE = (Z, random(BATCH, TOKENS, HEADS))
REFUSED_BY_A_HOP: dict[str, tuple[Changes, str]] = {
    "reach of another batch": ({"reach": REACH.expand(3, -1)}, r"reach must be .*got \[3, 10\]"),
    "reach of one token": ({"reach": REACH[:, :1]}, r"reach must be .*got \[1, 1\]"),
    "reach as floats": ({"reach": REACH.float()}, "reach must be integers, got torch.float32"),
    "a bias of one number": ({"bias": random(1)}, r"bias must be \[2\], got \[1\]"),
    "a bias of more heads": ({"bias": random(HEADS + 1)}, r"bias must be \[2\], got \[3\]"),
    "a bias of two hops": ({"bias": random(1, HEADS)}, r"bias must be \[2\], got \[1, 2\]"),
    "a stride of 0": ({"stride": 0}, "stride must be at least 1, got 0"),
    "a stride below 0": ({"stride": -3}, "stride must be at least 1, got -3"),
    "a length of 0": ({"length": 0}, "length must be at least 1, got 0"),
    "a table of half the width": ({"rotary": Rotary(*HALF)}, r"rotary.cos must be .*got \[20, 2\]"),
    "too few positions": (
        {"rotary": Rotary(*(x[:3] for x in GOOD))},
        "at least 4 positions, got 3",
    ),
    "values of other heads": (
        {"values": random(BATCH, TOKENS, 3, DIM)},
        "values must match k",
    ),
    "values of one row": ({"values": Z[:1]}, "values must match k"),
    "a state of fewer tokens": (
        {"state": (Z[:, 1:], STATE[1][:, 1:])},
        r"state.*z .*\[2, 9, 2, 10\]",
    ),
    "a state of one row": ({"state": (Z[:1], STATE[1][:1])}, r"state.*z .*\[1, 10, 2, 10\]"),
    "a state of another size": ({"state": (Z[..., :8], STATE[1])}, r"state.*z .*\[2, 10, 2, 8\]"),
    "a state of the key heads": (
        {"state": (Z[:, :, :1], STATE[1][..., :1])},
        r"state.*z .*got .*1, 10\]",
    ),
    "log-sum-exps of another shape": (
        {"state": (Z, STATE[1].mT)},
        r"state.*lse .*got \[2, 2, 10\]",
    ),
    "log-sum-exps of one row": ({"state": (Z, STATE[1][:1])}, r"state.*lse .*got \[1, 10, 2\]"),
    "a state in another dtype": ({"state": (Z.double(), STATE[1])}, "state.*z .*torch.float64"),
    "log-sum-exps in bf16": ({"state": (Z, STATE[1].bfloat16())}, "state.*lse .*torch.bfloat16"),
    "an unknown backend": ({"backend": "cuda"}, 'backend must be .*"triton", got "cuda"'),
    "a scale of zero": ({"scale": 0.0}, "scale must be a positive number, got 0.0"),
}


@pytest.mark.parametrize("name", REFUSED_BY_A_HOP)
def test_every_backend_refuses_one_hop_with_the_same_line(name: str) -> None:
    changes, rule = REFUSED_BY_A_HOP[name]
    assert_same_refusal(hop, hop_arguments(changes), rule)


@pytest.mark.parametrize("name", ["k", "v", "doc_start", "hop_bias", "rotary"])
def test_tensors_of_another_device_are_refused(name: str) -> None:
    arguments = operator_arguments({})
    if name == "rotary":
        arguments[name] = Rotary(*(x.to("meta") for x in arguments[name]))
    else:
        arguments[name] = arguments[name].to("meta")
    assert_same_refusal(tensor_attention, arguments, f"{name}.* must be on {DEVICE}.*got meta")


@pytest.mark.parametrize("backend", BACKENDS)
def test_checks_break_no_graph(backend: Any) -> None:
    changes: Changes = {"doc_start": (LATE + 3) % 7, "hop_bias": random(HEADS, 3).T[1:2]}
    arguments = operator_arguments(changes) | {"backend": backend}
    compiled = torch.compile(tensor_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**arguments), tensor_attention(**arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_looking_ahead_beyond_the_row_ends_with_it(backend: Any) -> None:
    if backend == "triton":
        pytest.skip("causal only")
    far, near = (
        hop(**first_hop({"ahead": ahead, "backend": backend}))
        for ahead in (LATE * 0 + 1000, TOKENS - 1 - LATE)
    )
    for x, y in zip(far, near, strict=True):
        torch.testing.assert_close(x, y)
