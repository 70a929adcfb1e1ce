"""What a folded model remembers while it generates. This file travels inside exported folders.

Shape letters: B batch, Q new tokens, T all tokens, K key/value heads, H query heads, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_tensorlm import TensorLMConfig

# Spare room of a buffer, so that appending a token copies few entries on average, not all.
_SPARE_FRACTION = 4
_SPARE_MINIMUM = 64


class Rows:
    """The rows of successive tokens [B, T, ...], appended in place; only the last `keep` stay.

    The buffer grows by a quarter when it is full; it has room for `expected` rows from the start.
    """

    def __init__(self, keep: int | None = None, expected: int = 0) -> None:
        self.keep, self.expected = keep, expected
        self.buffer: Tensor | None = None
        self.start = self.stop = 0

    def append(self, new: Tensor) -> Tensor:
        """Add [B, Q, ...]; returns a view of the rows that stayed and the new ones."""
        if self.keep is not None:
            self.start = max(self.start, self.stop - self.keep)
        size = self.stop - self.start + new.shape[1]
        if self.buffer is None or self.start + size > self.buffer.shape[1]:
            room = size + max(_SPARE_MINIMUM, size // _SPARE_FRACTION)
            room = self.expected if self.expected >= size else room
            buffer = new.new_empty(new.shape[0], room, *new.shape[2:])
            if self.buffer is not None:
                buffer[:, : size - new.shape[1]] = self.buffer[:, self.start : self.stop]
            self.buffer, self.start = buffer, 0
        self.stop = self.start + size
        self.buffer[:, self.stop - new.shape[1] : self.stop] = new
        return self.buffer[:, self.start : self.stop]

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the sequences of the batch by a selection of them."""
        if self.buffer is not None:
            self.buffer = change(self.buffer)


class FoldLayer(CacheLayerMixin):
    """One layer's memory: keys of all tokens, recent values, and the state of each hop.

    Keys [B, T, K, D] of a folded layer are not rotated, since each axis rotates them differently;
    of values [B, n_1, K, D] only the last n_1 are ever read again; `states[i]` [B, T, H, D] is z
    after hop i + 1, the values of hop i + 2. A full-attention layer (`fold` empty) keeps rotated
    keys and all values.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, fold: list[int], expected: int = 0) -> None:
        super().__init__()
        self.fold, self.expected = fold, expected
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.key_rows = Rows(expected=self.expected)
        self.value_rows = Rows(self.fold[0]) if self.fold else Rows(expected=self.expected)
        self.states = [Rows(expected=self.expected) for _ in self.fold]
        self.num_tokens = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: buffers start with the first rows."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Add [B, Q, K, D] twice; returns keys [B, T, K, D] and the values that Q can reach."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.num_tokens += key_states.shape[1]
        return self.key_rows.append(key_states), self.value_rows.append(value_states)

    def update_state(self, index: int, z: Tensor) -> Tensor:
        """Add the new tokens' z [B, Q, H, D] after hop `index` + 1; returns that of all tokens."""
        return self.states[index].append(z)

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`, by its name in transformers 4."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset) for masks, which this model does not build."""
        return self.num_tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: values that left the window do not come back."""
        raise ValueError("assisted generation needs a cache that can be cut back: this one cannot")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        self._map_batch(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for rows in (self.key_rows, self.value_rows, *self.states):
            rows.map_batch(change)


class FoldCache(Cache):
    """One FoldLayer per decoder layer; `expected` tokens fit without a copy, and without spare."""

    def __init__(self, config: TensorLMConfig, expected: int = 0) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(layers=[FoldLayer(config.layer_fold(i), expected) for i in layers])


def new_document_starts(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    batch: int,
    num_seen: int,
    num_new: int,
    device: torch.device,
) -> Tensor | None:
    """Where the document of each new token begins, as an index into the sequence.

    Padding tokens are documents of their own, so that left padding changes nothing; padding on the
    right is behind everything that could see it. Positions that start over (packed rows) begin a
    document each.

    Args:
        attention_mask: [B, T], 0 where padding; None: no padding.
        position_ids: [B or 1, Q], counted inside each document; None: one document.
        batch, num_seen, num_new: B, T - Q and Q.
        device: of the result.

    Returns:
        [B, Q] int64; None where all begin at 0.

    Raises:
        ValueError: the mask has another shape, or padding inside a sequence.
    """
    positions = torch.arange(num_seen, num_seen + num_new, device=device)
    start = torch.zeros(batch, num_new, dtype=torch.int64, device=device)
    if position_ids is not None:
        start = start + (positions - position_ids.to(device)).clamp(min=0)
    if attention_mask is not None:
        if attention_mask.shape != (batch, num_seen + num_new):
            raise ValueError(
                f"attention_mask {list(attention_mask.shape)} must be "
                f"{[batch, num_seen + num_new]}: 1 for tokens, 0 for padding"
            )
        mask = attention_mask.to(device).bool()
        if ((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] > 1).any():
            raise ValueError("attention_mask: padding inside a sequence (pad on the left)")
        first = mask.long().argmax(1, keepdim=True)
        start = torch.where(positions < first, positions, start.maximum(first))
    return start if bool(start.any()) else None
