"""The properties that define the routed axis: what a token chooses, reads, and never sees."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensor_attention import routed_attention, tensor_attention
from tensor_attention.api import Backend
from tests.tensor_attention.cases import (
    BACKENDS,
    choice_of,
    cotangent_like,
    doc_start_of,
    document_mask,
    inputs,
    naive_choice,
    read_beyond_window,
    relative_error,
    rotary_table,
    sets_of,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
# Choices that differ in every number; documents begin at no multiple of the block.
ROUTE: dict[str, Any] = {"window": 5, "block": 3, "top_k": 2, "pool": 2, "stretch": 2}
LENGTHS = [22, 1, 41, 6]
routes = st.fixed_dictionaries(
    {
        "block": st.integers(1, 6),
        "window": st.integers(6, 9),
        "top_k": st.integers(1, 4),
        "stretch": st.integers(1, 5),
        "pool": st.integers(1, 7),
    }
)
documents = st.lists(st.integers(1, 40), min_size=1, max_size=3)


def routed_matrix(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """[B, H, T, T]: how much of each token's value reaches each output (values = identity)."""
    batch, num_tokens = q.shape[:2]
    identity = torch.eye(num_tokens, dtype=q.dtype)[None, :, None]
    v = identity.expand(batch, num_tokens, k.shape[2], num_tokens)
    return routed_attention(q, k, v, **options).transpose(1, 2)


# What a token may depend on.


@both_backends
@pytest.mark.parametrize("open_tile", [1, 7])
@pytest.mark.parametrize("token", [0, 21, 22, 23, 40, 52, 69])
def test_changing_all_later_tokens_changes_nothing(
    backend: Backend, token: int, open_tile: int
) -> None:
    num_tokens = sum(LENGTHS)
    options: dict[str, Any] = {
        "doc_start": doc_start_of(LENGTHS), "rotary": rotary_table(num_tokens, 4),
        "open_tile": open_tile, "backend": backend, **ROUTE,
    }  # fmt: skip
    tensors = inputs(num_tokens, 4, 2)
    changed = [x.clone() for x in tensors]
    for x, other in zip(changed, inputs(num_tokens, 4, 2, seed=9), strict=True):
        x[:, token + 1 :] = 3 * other[:, token + 1 :]
    choices = [choice_of(q, k, **options)[:, : token + 1] for q, k, _ in (tensors, changed)]
    assert torch.equal(*choices)
    before, after = (routed_attention(*x, **options)[:, : token + 1] for x in (tensors, changed))
    if backend == "dense":
        assert torch.equal(before, after)
    else:  # a tile's products have as many columns as its tokens chose blocks: other roundings
        torch.testing.assert_close(before, after, rtol=0, atol=1e-14)


@both_backends
def test_changing_one_token_changes_all_that_read_it_and_no_other_document(
    backend: Backend,
) -> None:
    doc_start = doc_start_of(LENGTHS)
    q, k, v = inputs(sum(LENGTHS))
    options: dict[str, Any] = {"doc_start": doc_start, "backend": backend, **ROUTE}
    before, choice = routed_attention(q, k, v, **options), choice_of(q, k, **options)
    token = 30  # in the third document
    v[:, token] += 1.7
    changed = (routed_attention(q, k, v, **options) - before).abs().amax((0, 2, 3))
    reads = read_beyond_window(choice, doc_start, 5, 3)[0, 0, :, token]
    reads[token : token + 5] = True
    assert torch.equal(changed > 1e-9, reads)
    q[:, token], k[:, token] = 5.0, -5.0
    after = choice_of(q, k, **options)
    may_change = document_mask(doc_start)[0, :, token]
    assert torch.equal(after[:, ~may_change], choice[:, ~may_change])
    assert not torch.equal(after, choice)


@both_backends
@pytest.mark.parametrize("open_tile", [1, 5])
def test_a_prefix_chooses_and_yields_what_the_whole_row_does(
    backend: Backend, open_tile: int
) -> None:
    num_tokens = sum(LENGTHS)
    q, k, v = inputs(num_tokens, 4, 2)
    doc_start, rotary = doc_start_of(LENGTHS), rotary_table(num_tokens, 4)
    options: dict[str, Any] = {"open_tile": open_tile, "backend": backend, **ROUTE}
    whole = choice_of(q, k, doc_start=doc_start, rotary=rotary, **options)
    out = routed_attention(q, k, v, doc_start=doc_start, rotary=rotary, **options)
    for cut in range(1, num_tokens + 1, 1 if open_tile == 1 else 4):
        part = [x[:, :cut] for x in (q, k, v)]
        row: dict[str, Any] = {"doc_start": doc_start[:, :cut], "rotary": rotary, **options}
        assert torch.equal(choice_of(part[0], part[1], **row)[:, -1], whole[:, cut - 1])
        last = routed_attention(part[0], part[1], part[2], **row)[:, -1]
        torch.testing.assert_close(last, out[:, cut - 1], rtol=0, atol=1e-13)


@both_backends
@pytest.mark.parametrize("stretch", [1, 3])
@pytest.mark.parametrize("open_tile", [1, 5])
@pytest.mark.parametrize("shift", [1, 4, 7, 33])
def test_moving_a_document_inside_its_row_changes_neither_choice_nor_outputs(
    backend: Backend, shift: int, open_tile: int, stretch: int
) -> None:
    length, num_tokens = 37, 70
    tensors = inputs(num_tokens, 4, 2)
    options: dict[str, Any] = {
        **ROUTE, "block": 4, "stretch": stretch, "open_tile": open_tile,
        "rotary": rotary_table(num_tokens, 4), "backend": backend,
    }  # fmt: skip
    outputs, choices = [], []
    for offset in (0, shift):
        q, k, v = (x.roll(offset, dims=1) for x in tensors)
        lengths = [n for n in (offset, length, num_tokens - length - offset) if n]
        row = {"doc_start": doc_start_of(lengths), **options}
        inside = slice(offset, offset + length)
        choices.append(choice_of(q, k, **row)[:, inside])
        outputs.append(routed_attention(q, k, v, **row)[:, inside])
    assert torch.equal(*choices)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-13)


# The choice.


@both_backends
@settings(max_examples=25)
@given(route=routes, lengths=documents, groups=st.sampled_from([(1, 1), (4, 2), (3, 1)]))
def test_the_choice_is_the_rule_computed_one_by_one(
    backend: Backend, route: dict[str, Any], lengths: list[int], groups: tuple[int, int]
) -> None:
    num_tokens, (heads, key_heads) = sum(lengths), groups
    q, k, _ = inputs(num_tokens, heads, key_heads, batch=2, seed=num_tokens)
    doc_start = torch.cat((doc_start_of(lengths), doc_start_of([num_tokens])))
    choice = choice_of(q, k, doc_start=doc_start, backend=backend, **route)
    assert choice.shape == (2, num_tokens, key_heads, route["top_k"] + 1)
    assert choice.dtype == torch.int32
    # Ascending, and -1 only at the end.
    order = torch.where(choice < 0, 2**31 - 1, choice)
    assert torch.equal(order, order.sort(-1).values)
    del route["stretch"]  # positions play no role
    assert sets_of(choice) == naive_choice(q, k, doc_start, **route)


@both_backends
def test_long_rows_choose_the_same_wherever_the_implementation_cuts_them(
    backend: Backend,
) -> None:
    lengths = [300, 517, 200]  # the row is longer than a tile of the blocked choice
    q, k, _ = inputs(sum(lengths))
    doc_start = doc_start_of(lengths)
    options: dict[str, Any] = {"window": 40, "block": 16, "top_k": 3, "backend": backend}
    choice = choice_of(q, k, doc_start=doc_start, **options)
    for first, length in zip((0, 300, 817), lengths, strict=True):
        part = slice(first, first + length)
        assert torch.equal(choice[:, part], choice_of(q[:, part], k[:, part], **options))


@both_backends
def test_ties_go_to_the_earlier_block(backend: Backend) -> None:
    q, k = torch.ones(1, 60, 2, 4), torch.ones(1, 60, 1, 4)
    choice = choice_of(q, k, window=5, block=3, top_k=4, backend=backend)
    for token, blocks in enumerate(choice[0, :, 0].tolist()):
        far = range((token - 5) // 3 + 1)
        assert blocks == [*far[:5], *[-1] * (5 - len(far))]


@both_backends
def test_later_blocks_win_by_score_and_the_first_is_chosen_beside_them(backend: Backend) -> None:
    q, k = torch.ones(1, 60, 2, 4), torch.ones(1, 60, 1, 4)
    k *= torch.arange(60)[:, None, None] // 3  # the first block has the lowest score
    choice = choice_of(q, k, window=5, block=3, top_k=2, backend=backend)
    for token, blocks in enumerate(choice[0, :, 0].tolist()):
        last = (token - 5) // 3
        expected = [b for b in sorted({0, last - 1, last}) if b >= 0 and token >= 5]
        assert blocks == [*expected, *[-1] * (3 - len(expected))]


@both_backends
def test_every_key_head_chooses_by_the_queries_of_its_group(backend: Backend) -> None:
    q, k, _ = inputs(50, 6, 3)
    options: dict[str, Any] = {"backend": backend, **ROUTE}
    together = choice_of(q, k, **options)
    for head in range(3):
        group = q[:, :, 2 * head : 2 * head + 2]
        alone = choice_of(group, k[:, :, head : head + 1], **options)
        assert torch.equal(together[:, :, head : head + 1], alone)
    assert not torch.equal(together[:, :, 0], together[:, :, 1])


@both_backends
def test_the_choice_has_no_gradient(backend: Backend) -> None:
    q, k, _ = (x.requires_grad_() for x in inputs(20))
    assert not choice_of(q, k, backend=backend, **ROUTE).requires_grad


# What a token reads, and with which weights.


@both_backends
@settings(max_examples=25)
@given(route=routes, lengths=documents, open_tile=st.sampled_from([1, 2, 5, 16]))
def test_weights_sum_to_one_on_exactly_the_window_and_the_open_blocks(
    backend: Backend, route: dict[str, int], lengths: list[int], open_tile: int
) -> None:
    num_tokens = sum(lengths)
    q, k, _ = inputs(num_tokens, 4, 2, seed=num_tokens)
    doc_start = doc_start_of(lengths)
    options: dict[str, Any] = {
        "doc_start": doc_start, "rotary": rotary_table(num_tokens, 4),
        "open_tile": open_tile, "backend": backend, **route,
    }  # fmt: skip
    matrix = routed_matrix(q, k, **options)
    sums = matrix.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-13)
    choice = choice_of(q, k, **options)
    far = read_beyond_window(choice, doc_start, route["window"], route["block"], open_tile)
    near = torch.ones(num_tokens, num_tokens).triu(1 - route["window"]) > 0
    expected = far | (document_mask(doc_start) & near)[:, None]
    assert torch.equal(matrix > 0, expected.repeat_interleave(2, dim=1))


def run(attend: Any, tensors: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Output, and gradients of q, k, v for the cotangent of `cotangent_like`."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = attend(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent_like(out))]


@both_backends
@pytest.mark.parametrize("open_tile", [1, 5])
@pytest.mark.parametrize(
    ("lengths", "route"),
    [
        ([50], {"window": 6, "block": 4, "top_k": 10}),
        ([23, 1, 46], {"window": 5, "block": 3, "top_k": 13}),
        # No document is longer than the window: whatever the route is.
        ([16, 3, 16, 1], {"window": 16, "block": 2, "top_k": 1, "stretch": 4}),
        # The token behind the window reads one key of the only far block.
        ([17], {"window": 16, "block": 16, "top_k": 1}),
    ],
)
def test_with_all_blocks_chosen_or_short_documents_it_is_softmax_attention(
    backend: Backend, lengths: list[int], route: dict[str, int], open_tile: int
) -> None:
    num_tokens = sum(lengths)
    shared: dict[str, Any] = {
        "doc_start": doc_start_of(lengths), "rotary": rotary_table(num_tokens, 4),
    }  # fmt: skip
    tensors = inputs(num_tokens, 4, 2)
    options = {**shared, **route, "open_tile": open_tile, "backend": backend}
    ours = run(routed_attention, tensors, **options)
    expected = run(tensor_attention, tensors, fold=[], backend="dense", **shared)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@both_backends
@pytest.mark.parametrize("change", [{"top_k": 9}, {"stretch": 2}])
def test_one_block_less_or_other_positions_are_not_softmax_attention(
    backend: Backend, change: dict[str, int]
) -> None:
    q, k, v = inputs(50, 4, 2)
    rotary = rotary_table(50, 4)
    route: dict[str, Any] = {"window": 6, "block": 4, "top_k": 10} | change
    out = routed_attention(q, k, v, rotary=rotary, backend=backend, **route)
    plain = tensor_attention(q, k, v, [], rotary=rotary, backend="dense")
    assert relative_error(out, plain) > 1e-4


# What users get wrong.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "block must be between 1 and the window of 5 tokens, got 0"),
        ({"block": 6}, "block must be between 1 and the window of 5 tokens, got 6"),
        ({"window": 0}, "the window of 0 tokens"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"stretch": 0}, "stretch must be at least 1, got 0"),
        ({"open_tile": 0}, "open_tile must be at least 1, got 0"),
        ({"pool": 0}, "pool must be at least 1, got 0"),
    ],
)
def test_a_bad_number_is_a_value_error_that_names_it(change: dict[str, int], message: str) -> None:
    q, k, v = inputs(8)
    with pytest.raises(ValueError, match=message):
        routed_attention(q, k, v, **(ROUTE | change))
    if not {"open_tile", "stretch"} & set(change):
        with pytest.raises(ValueError, match=message):
            choice_of(q, k, **(ROUTE | change))
