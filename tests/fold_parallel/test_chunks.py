"""Chunks are cut and joined without loss, and without copies where a layout allows that."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fold_parallel.layout import CHUNKS, Layout, contiguous, copy

# [B, 12, 6, 4], on 3 ranks.
LAYOUTS = {
    "rows": Layout(axis=1, sizes=(-1, 3, 2), place=2),
    "columns": Layout(axis=1, sizes=(3, -1, 2), place=1),
    "tokens": Layout(axis=2, sizes=(3, -1), place=2),
    "heads": Layout(axis=1, sizes=(3, -1), place=1),
}
DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int32]


def bits(*shape: int, dtype: torch.dtype) -> Tensor:
    """Any bits, so NaNs of every kind too."""
    generator = torch.Generator().manual_seed(0)
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(256, size, dtype=torch.uint8, generator=generator).view(dtype)


def equal_bits(x: Tensor, y: Tensor) -> bool:
    x, y = (torch.empty(z.shape, dtype=z.dtype).copy_(z).view(torch.uint8) for z in (x, y))
    return torch.equal(x, y)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_joining_what_was_cut_gives_the_tensor(layout: Layout, batch: int) -> None:
    x = bits(batch, 12, 6, 4, dtype=torch.bfloat16)
    chunks = layout.cut(x)
    assert chunks.shape[0] == 3
    assert chunks.data_ptr() == x.data_ptr()
    assert equal_bits(layout.join(chunks.contiguous()), x)
    assert CHUNKS.join(CHUNKS.cut(x)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_left_out_is_in_no_chunk_and_zero_when_joined(layout: Layout) -> None:
    layout = replace(layout, left_out=6)
    x = bits(2, 18, 12, 4, dtype=torch.float32)
    joined = layout.join(layout.cut(x))
    assert joined.shape == x.shape
    assert (joined.narrow(layout.axis, 0, 6) == 0).all()
    used = (z.narrow(layout.axis, 6, z.shape[layout.axis] - 6) for z in (joined, x))
    assert equal_bits(*used)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_row_in_columns_or_by_heads_is_a_message_as_it_lies(name: str) -> None:
    layout, x = LAYOUTS[name], bits(1, 12, 6, 4, dtype=torch.float32)
    chunks = layout.cut(x)
    message = contiguous(chunks)
    as_it_lies = name in ("columns", "heads")
    assert (message.data_ptr() == x.data_ptr()) == as_it_lies
    assert (layout.join(message).data_ptr() == message.data_ptr()) == as_it_lies


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    random=st.randoms(use_true_random=False),
    offset=st.integers(0, 9),
    shift=st.integers(0, 9),
    strided=st.booleans(),
)
def test_copies_have_the_bits_of_any_tensor(
    dtype: torch.dtype, shape: list[int], random: Random, offset: int, shift: int, strided: bool
) -> None:
    axes = list(range(len(shape)))
    random.shuffle(axes)
    shape[-1] *= 1 if strided else 8
    size = torch.Size(shape).numel()
    # Storage at any address, and the tensor anywhere in it.
    storage = np.empty((shift + offset + size) * dtype.itemsize, np.uint8)[shift * dtype.itemsize :]
    memory = torch.from_numpy(storage).view(dtype)[offset:]
    x = memory.copy_(bits(size, dtype=dtype)).view(shape).permute(axes)
    x = x[..., ::2] if strided else x
    assert equal_bits(contiguous(x), x)
    to = bits(*x.shape[:-1], x.shape[-1] + 8, dtype=dtype)[..., 8:]
    copy(to, x)
    assert equal_bits(to, x)
