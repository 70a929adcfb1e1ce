"""Axes, reach, digits and rotary positions of a folded sequence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensor_attention import Axis, Rotary, apply_rotary, document_reach, fold_axes, validate_fold
from tensor_attention.fold import document_ahead, line_digit, rotate_along

folds = st.lists(st.integers(2, 7), max_size=4)
document_lengths = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def doc_start_of(lengths: list[int]) -> Tensor:
    """[1, sum(lengths)] int32: the start of the document of each token."""
    starts = [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor([starts], dtype=torch.int32)


@given(folds, st.integers(1, 2000))
def test_axes_are_inner_lengths_with_running_strides(fold: list[int], num_tokens: int) -> None:
    axes = fold_axes(fold, num_tokens)
    assert [axis.length for axis in axes[:-1]] == fold
    assert [axis.stride for axis in axes] == [math.prod(fold[:i]) for i in range(len(fold) + 1)]


@given(folds, st.integers(1, 2000))
def test_outermost_axis_covers_the_row_and_no_more(fold: list[int], num_tokens: int) -> None:
    outer = fold_axes(fold, num_tokens)[-1]
    assert outer.length == max(1, math.ceil(num_tokens / outer.stride))


@given(folds, st.integers(1, 2000), st.data())
def test_digits_of_a_distance_give_it_back_in_exactly_one_way(
    fold: list[int], num_tokens: int, data: st.DataObject
) -> None:
    axes = fold_axes(fold, num_tokens)
    distance = data.draw(st.integers(0, num_tokens - 1))
    digits = [distance // axis.stride % axis.length for axis in axes]
    assert sum(j * axis.stride for j, axis in zip(digits, axes, strict=True)) == distance
    # Every tuple of digits is one number below the product of lengths: the map is one to one.
    assert math.prod(axis.length for axis in axes) >= num_tokens
    assert all(0 <= j < axis.length for j, axis in zip(digits, axes, strict=True))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12))
def test_line_digit_is_the_digit_of_the_token_index(num: int, stride: int, length: int) -> None:
    digit = line_digit(num, Axis(stride, length), torch.device("cpu"))
    assert digit.tolist() == [t // stride % length for t in range(num)]
    assert digit.dtype == torch.int32


@given(document_lengths, st.integers(1, 15))
def test_reach_is_the_last_step_back_inside_the_document(lengths: list[int], stride: int) -> None:
    doc_start = doc_start_of(lengths)
    reach = document_reach(doc_start, stride)
    assert reach.dtype == torch.int32
    for t, start in enumerate(doc_start[0].tolist()):
        furthest = t - int(reach[0, t]) * stride
        assert furthest >= start > furthest - stride


@given(document_lengths, st.integers(1, 15))
def test_ahead_is_the_last_step_forward_inside_the_document(
    lengths: list[int], stride: int
) -> None:
    doc_start = doc_start_of(lengths)
    ahead = document_ahead(doc_start, stride)
    assert ahead.dtype == torch.int32
    starts = doc_start[0].tolist()
    for t, start in enumerate(starts):
        last = max(u for u, other in enumerate(starts) if other == start)
        furthest = t + int(ahead[0, t]) * stride
        assert furthest <= last < furthest + stride


@given(document_lengths, st.integers(1, 9))
def test_ahead_mirrors_reach_when_the_row_is_reversed(lengths: list[int], stride: int) -> None:
    ahead = document_ahead(doc_start_of(lengths), stride)
    reach = document_reach(doc_start_of(lengths[::-1]), stride)
    assert torch.equal(ahead.flip(1), reach)


@pytest.mark.parametrize("fold", [[1], [0], [-3], [8, 1], [1, 8]])
def test_an_axis_shorter_than_two_steps_is_an_error_that_shows_the_fold(fold: list[int]) -> None:
    with pytest.raises(ValueError, match="at least 2") as error:
        validate_fold(fold)
    assert str(fold) in str(error.value)
    with pytest.raises(ValueError, match="at least 2"):
        fold_axes(fold, 64)


def rotary_table(positions: int, head_dim: int) -> Rotary:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return Rotary(angles.cos(), angles.sin())


@settings(max_examples=30)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.integers(1, 6))
def test_rotated_scores_depend_on_relative_positions_alone(
    p: int, u: int, shift: int, half: int
) -> None:
    torch.manual_seed(p * 41 + u)
    q, k = torch.randn(2, 1, 1, 2 * half, dtype=torch.float64).unbind(0)
    table = rotary_table(81, 2 * half)

    def score(a: int, b: int) -> Tensor:
        rotated_q = apply_rotary(q[None], table, torch.tensor([[a]]))
        return (rotated_q * apply_rotary(k[None], table, torch.tensor([[b]]))).sum()

    torch.testing.assert_close(score(p, u), score(p + shift, u + shift), rtol=0, atol=1e-12)


def test_rotation_is_the_complex_product_of_the_two_halves() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    table = rotary_table(5, 8)
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(*table)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(rotate_along(x, table, 1), expected, rtol=0, atol=1e-14)


def test_rotate_along_uses_the_floor_of_token_over_stride() -> None:
    x = torch.randn(1, 12, 1, 4, dtype=torch.float64)
    table = rotary_table(12, 4)
    positions = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    assert torch.equal(rotate_along(x, table, 5), apply_rotary(x, table, positions))
    assert torch.equal(rotate_along(x, table, 5)[:, :5], x[:, :5])


def test_bf16_is_rotated_in_the_precision_of_the_table_and_rounded_once() -> None:
    x = torch.randn(1, 9, 2, 8).bfloat16()
    table = rotary_table(9, 8)
    exact = rotate_along(x.double(), table, 1)
    assert torch.equal(rotate_along(x, table, 1), exact.bfloat16())
