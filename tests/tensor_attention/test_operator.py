"""The properties that define the operator, its cost, and what it says to wrong arguments."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tensor_attention import fold_axes, tensor_attention
from tensor_attention.api import Backend
from tests.tensor_attention.cases import (
    BACKENDS,
    LargestTensor,
    doc_start_of,
    document_mask,
    effective_matrix,
    inputs,
    relative_error,
    rotary_table,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)


@both_backends
@pytest.mark.parametrize("fold", [[], [4], [3, 2]])
@pytest.mark.parametrize("token", [0, 9, 10, 20, 29])
def test_changing_a_token_changes_only_itself_and_later_tokens_of_its_document(
    backend: Backend, fold: list[int], token: int
) -> None:
    lengths = [10, 15, 5]
    doc_start = doc_start_of(lengths)
    q, k, v = inputs(30)
    bias = torch.full((len(fold), 2), -0.3, dtype=torch.float64)
    options: dict[str, Any] = {"doc_start": doc_start, "hop_bias": bias, "backend": backend}
    before = tensor_attention(q, k, v, fold, **options)
    for x in (q, k, v):
        x[:, token] += 1.7
    after = tensor_attention(q, k, v, fold, **options)
    may_change = document_mask(doc_start)[0, :, token]
    assert torch.equal(before[:, ~may_change], after[:, ~may_change])
    assert (before - after)[:, may_change].abs().amax(dim=(0, 2, 3)).min() > 1e-6


@both_backends
@settings(max_examples=25)
@given(
    fold=st.lists(st.integers(2, 6), max_size=3),
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=3),
)
def test_rows_of_the_effective_matrix_sum_to_one(
    backend: Backend, fold: list[int], lengths: list[int]
) -> None:
    q, k, _ = inputs(sum(lengths), seed=len(fold))
    matrix = effective_matrix(q, k, fold, doc_start=doc_start_of(lengths), backend=backend)
    sums = matrix.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-13)


@both_backends
@settings(max_examples=25)
@given(
    fold=st.lists(st.integers(2, 6), max_size=3),
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=3),
)
def test_support_is_exactly_the_causal_document_mask(
    backend: Backend, fold: list[int], lengths: list[int]
) -> None:
    q, k, _ = inputs(sum(lengths), seed=len(lengths))
    doc_start = doc_start_of(lengths)
    matrix = effective_matrix(q, k, fold, doc_start=doc_start, backend=backend)
    expected = document_mask(doc_start)[:, None].expand_as(matrix)
    assert torch.equal(matrix > 0, expected)
    assert torch.equal(matrix[~expected], torch.zeros_like(matrix[~expected]))


def path_weight(
    t: int, u: int, fold: list[int], start: Tensor, score: Tensor, bias: list[float]
) -> float:
    """The weight of the one path t -> u given by the digits of t - u, from scalar formulas."""

    def lse(i: int, token: int) -> float:  # log-sum-exp after hop i (0: before the first hop)
        total = math.exp(lse(i - 1, token)) if i > 0 else 0.0
        axis, depth = axes[i], token - int(start[token])
        for j in range(1 if i > 0 else 0, axis.length):
            if j * axis.stride <= depth:
                total += math.exp(float(score[token, token - j * axis.stride]) + bias[i])
        return math.log(total)

    axes = fold_axes(fold, len(start))
    weight, token = 1.0, t
    for i in reversed(range(len(axes))):
        step = (t - u) // axes[i].stride % axes[i].length * axes[i].stride
        if i == 0 or step > 0:
            log_weight = float(score[token, token - step]) + bias[i]
        else:
            log_weight = lse(i - 1, token)
        weight *= math.exp(log_weight - lse(i, token))
        token -= step
    assert token == u
    return weight


@both_backends
@pytest.mark.parametrize(("fold", "lengths"), [([], [9]), ([3], [14]), ([2, 3], [5, 17])])
def test_each_past_token_is_reached_by_the_one_path_of_the_digits_of_its_distance(
    backend: Backend, fold: list[int], lengths: list[int]
) -> None:
    num_tokens, start = sum(lengths), doc_start_of(lengths)
    q, k, _ = inputs(num_tokens, heads=1)
    hop_bias = torch.tensor([[0.4], [-0.7]], dtype=torch.float64)[: len(fold)]
    matrix = effective_matrix(q, k, fold, doc_start=start, hop_bias=hop_bias, backend=backend)[0, 0]
    score = q[0, :, 0] @ k[0, :, 0].T / 2
    bias = [0.0, *hop_bias[:, 0].tolist()]
    expected = torch.zeros_like(matrix)
    for t, u in document_mask(start)[0].nonzero().tolist():
        expected[t, u] = path_weight(t, u, fold, start[0], score, bias)
    torch.testing.assert_close(matrix, expected, rtol=1e-11, atol=0)


def document_sdpa(q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor) -> Tensor:
    """torch's softmax attention under the causal document mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = document_mask(doc_start)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


@both_backends
@pytest.mark.parametrize(
    ("fold", "lengths"), [([], [40]), ([], [7, 20, 1, 12]), ([8], [8, 1, 7, 8]), ([8, 2], [5, 8])]
)
def test_without_a_fold_or_in_short_documents_it_is_softmax_attention(
    backend: Backend, fold: list[int], lengths: list[int]
) -> None:
    q, k, v = inputs(sum(lengths), heads=4, key_heads=2)
    doc_start = doc_start_of(lengths)
    bias = torch.randn(len(fold), 4, dtype=torch.float64)
    out = tensor_attention(q, k, v, fold, doc_start=doc_start, hop_bias=bias, backend=backend)
    expected = document_sdpa(q, k, v, doc_start)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


@both_backends
def test_in_longer_documents_it_is_softmax_attention_for_the_first_tokens_only(
    backend: Backend,
) -> None:
    q, k, v = inputs(30)
    out = tensor_attention(q, k, v, [8], backend=backend)
    plain = document_sdpa(q, k, v, doc_start_of([30]))
    torch.testing.assert_close(out[:, :8], plain[:, :8], rtol=1e-12, atol=1e-13)
    assert relative_error(out[:, 8:], plain[:, 8:]) > 1e-2


@both_backends
@pytest.mark.parametrize("fold", [[], [4], [4, 3]])
@pytest.mark.parametrize("shift", [1, 4, 7, 30])
def test_moving_a_document_inside_its_row_does_not_change_its_outputs(
    backend: Backend, fold: list[int], shift: int
) -> None:
    length, num_tokens = 37, 70
    q, k, v = inputs(num_tokens)
    rotary = rotary_table(num_tokens, 4)
    outputs = []
    for offset in (0, shift):
        moved_q, moved_k, moved_v = (x.roll(offset, dims=1) for x in (q, k, v))
        lengths = [n for n in (offset, length, num_tokens - length - offset) if n]
        out = tensor_attention(
            moved_q, moved_k, moved_v, fold,
            doc_start=doc_start_of(lengths), rotary=rotary, backend=backend,
        )  # fmt: skip
        outputs.append(out[:, offset : offset + length])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("fold", "num_tokens"),
    [([], 512), ([], 1024), ([16], 512), ([16], 2048), ([32], 1024), ([8, 8], 512), ([8, 8], 2048)],
)
def test_cost_per_token_is_the_sum_of_the_axis_lengths(fold: list[int], num_tokens: int) -> None:
    heads, dim = 2, 4
    q, k, v = inputs(num_tokens, heads=heads, dim=dim)
    with FlopCounterMode(display=False) as counter:
        tensor_attention(q, k, v, fold, backend="blocked")
    # Two products of D multiply-adds per key and head. The window of a block of queries is wider
    # than each of theirs, up to twice.
    keys = counter.get_total_flops() / (4 * heads * dim * num_tokens)
    axes = fold_axes(fold, num_tokens)
    lengths = sum(axis.length for axis in axes)
    assert lengths <= keys <= 2 * lengths - axes[-1].length


@pytest.mark.parametrize("num_tokens", [512, 1024, 2048])
@pytest.mark.parametrize("fold", [[16], [32], [8, 8]])
def test_no_tensor_is_larger_than_tokens_times_the_longest_window(
    num_tokens: int, fold: list[int]
) -> None:
    heads, dim = 2, 4
    q, k, v = (x.requires_grad_() for x in inputs(num_tokens, heads=heads, dim=dim))
    with LargestTensor() as largest:
        tensor_attention(q, k, v, fold, backend="blocked").sum().backward()
    window = max(max(fold) * 5 // 4, num_tokens // math.prod(fold))
    # The scores, or the keys, each of which stands in the windows of five blocks.
    assert largest.numel <= heads * num_tokens * max(window, 5 * dim)


# The paper-literal mode (section "fold").


@both_backends
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[6], [4, 5], [2, 3, 4]])
def test_fold_mode_is_a_kronecker_product_when_scores_depend_on_digits(
    backend: Backend, causal: bool, lengths: list[int]
) -> None:
    # q and k are one-hot blocks of per-axis vectors, so that <q(t), k(u)> is a sum over axes of
    # terms in that axis's digits; along a line the other axes' terms are constant and cancel.
    torch.manual_seed(0)
    num_tokens, per_axis = math.prod(lengths), 3
    q_parts, k_parts, factors = [], [], []
    stride = 1
    for n in lengths:
        a, b = torch.randn(2, n, per_axis, dtype=torch.float64)
        digit = torch.arange(num_tokens) // stride % n
        q_parts.append(a[digit])
        k_parts.append(b[digit])
        mask = torch.ones(n, n).tril() if causal else torch.ones(n, n)
        factors.append((a @ b.T).masked_fill(mask == 0, float("-inf")).softmax(-1))
        stride *= n
    q, k = (torch.cat(parts, -1)[None, :, None] for parts in (q_parts, k_parts))
    matrix = effective_matrix(
        q, k, lengths[:-1], mode="fold", causal=causal, scale=1.0, backend=backend
    )
    expected = factors[0]
    for factor in factors[1:]:
        expected = torch.kron(factor, expected)
    torch.testing.assert_close(matrix[0, 0], expected, rtol=1e-11, atol=1e-15)


@both_backends
@pytest.mark.parametrize("causal", [True, False])
def test_fold_mode_stays_inside_documents(backend: Backend, causal: bool) -> None:
    q, k, _ = inputs(30)
    doc_start = doc_start_of([11, 1, 18])
    matrix = effective_matrix(
        q, k, [4, 3], doc_start=doc_start, mode="fold", causal=causal, backend=backend
    )
    same_document = doc_start[0][:, None] == doc_start[0][None]
    assert (matrix[..., ~same_document] == 0).all()
    after = torch.ones(30, 30).triu(1) == 1
    assert bool((matrix[..., after & same_document] > 0).any()) is not causal
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, 2, 30).double(), rtol=0, atol=1e-13)


# What users get wrong.


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((4, 2), (3, 2), (3, 2)), {}, "H % K must be 0"),
        (((4, 2), (2, 4), (2, 4)), {}, r"k must match q \[1, 6, 4, 2\] .*got \[1, 6, 2, 4\]"),
        (((4, 2), (2, 2), (1, 2)), {}, r"v must match k .*got \[1, 6, 1, 2\]"),
        (((2, 2), (2, 2), (2, 2)), {"causal": False}, 'causal must be True in mode = "distance"'),
        (((2, 2), (2, 2), (2, 2)), {"hop_bias": torch.zeros(2, 2)}, r"must be \[1, 2\]"),
        (
            ((2, 2), (2, 2), (2, 2)),
            {"hop_bias": torch.zeros(1, 3)},
            r"hop_bias must be .*got \[1, 3\]",
        ),
        (
            ((2, 2), (2, 2), (2, 2)),
            {"hop_bias": torch.zeros(1, 2), "mode": "fold"},
            "hop_bias must be None",
        ),
        (((2, 2), (2, 2), (2, 2)), {"rotary": rotary_table(5, 2)}, "at least 6 positions, got 5"),
    ],
)
def test_a_bad_argument_is_a_value_error_that_names_it(
    shapes: tuple[tuple[int, int], ...], options: dict[str, Any], message: str
) -> None:
    q, k, v = (torch.zeros(1, 6, *shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        tensor_attention(q, k, v, [3], **options)


def test_keys_of_another_length_are_a_value_error() -> None:
    q, k = torch.zeros(1, 6, 2, 2), torch.zeros(1, 5, 2, 2)
    with pytest.raises(ValueError, match="k must match q"):
        tensor_attention(q, k, k, [3])


def test_an_axis_of_one_step_is_a_value_error() -> None:
    q, k, v = torch.zeros(3, 1, 6, 2, 2)
    with pytest.raises(ValueError, match="lengths of at least 2"):
        tensor_attention(q, k, v, [1])
