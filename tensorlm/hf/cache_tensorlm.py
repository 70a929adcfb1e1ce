"""The cache of a generating model. This file is part of exported folders.

Shape letters: B batch, Q new tokens, T all tokens, K key/value heads, H query heads, D head size,
N slots (`routing.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_tensorlm import Route, TensorLMConfig
from .documents_tensorlm import LastDocument

# Spare room in a buffer, so that appending a token rarely copies the whole buffer.
_SPARE_FRACTION = 4
_SPARE_MINIMUM = 64


class GrowingBuffer:
    """The rows of successive tokens [B, T, ...], appended in place; keeps only the last `keep`.

    The buffer grows by a quarter when it is full; it has room for `expected` rows from the start.
    If a gradient flows through the rows, each append copies them instead. If there are more new
    rows than `keep`, only the last ones are stored in the buffer.
    """

    def __init__(self, keep: int | None = None, expected: int = 0) -> None:
        self.keep, self.expected = keep, expected
        self.buffer: Tensor | None = None
        self.start = self.stop = 0

    def rows(self) -> Tensor | None:
        """A view of the rows in the buffer; None before the first call."""
        return None if self.buffer is None else self.buffer[:, self.start : self.stop]

    def append(self, new: Tensor) -> Tensor:
        """Add [B, Q, ...]; returns a view of the kept and the new rows."""
        if new.requires_grad or self.requires_grad:
            self._forget()
            parts = [new] if self.buffer is None else [self.buffer[:, self.start : self.stop], new]
            self.buffer, self.start = torch.cat(parts, dim=1), 0
            self.stop = self.buffer.shape[1]
            return self.buffer
        if self.keep is not None and new.shape[1] > max(self.keep, _SPARE_MINIMUM):
            self._forget()
            return self._append_many(new, self.keep)
        rows = self.reserve(new.shape, new.dtype, new.device)
        rows[:, rows.shape[1] - new.shape[1] :] = new
        return rows

    def reserve(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make room for [B, Q, ...]; returns a view of the kept rows and of this room.

        Only if no gradient flows through the rows.
        """
        self._forget()
        size = self.stop - self.start + shape[1]
        if self.buffer is None or self.start + size > self.buffer.shape[1] or self._is_frozen():
            room = size + max(_SPARE_MINIMUM, size // _SPARE_FRACTION)
            room = self.expected if self.expected >= size else room
            buffer = torch.empty(shape[0], room, *shape[2:], dtype=dtype, device=device)
            if self.buffer is not None:
                buffer[:, : size - shape[1]] = self.buffer[:, self.start : self.stop]
            self.buffer, self.start = buffer, 0
        self.stop = self.start + size
        return self.buffer[:, self.start : self.stop]

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows through the rows."""
        return self.buffer is not None and self.buffer.requires_grad

    def _forget(self) -> None:
        """Drop all rows but the last `keep`."""
        if self.keep is not None:
            self.start = max(self.start, self.stop - self.keep)

    def _append_many(self, new: Tensor, keep: int) -> Tensor:
        """`append` for more rows than `keep`, such as those of a prompt: stores only the last."""
        kept = self.rows()
        rows = new if kept is None or not kept.shape[1] else torch.cat((kept, new), dim=1)
        room = keep + max(_SPARE_MINIMUM, keep // _SPARE_FRACTION)
        self.buffer = new.new_empty(new.shape[0], room, *new.shape[2:])
        self.buffer[:, :keep] = new[:, new.shape[1] - keep :]
        self.start, self.stop = 0, keep
        return rows

    def _is_frozen(self) -> bool:
        """Whether the buffer is from `torch.inference_mode`, and cannot be changed outside it."""
        assert self.buffer is not None
        return (
            not torch.compiler.is_compiling()
            and self.buffer.is_inference()
            and not torch.is_inference_mode_enabled()
        )


class FoldLayer(CacheLayerMixin):
    """The cache of one layer: keys, values and the state of each hop.

    In a strided layer, keys [B, T, K, D] are not rotated, since each axis rotates them differently.
    Of values [B, n_1, K, D], only the last n_1 are read again. `states[i]` [B, T, H, D] is z after
    hop i + 1, which are the values of hop i + 2. A window layer (`window` > 0) keeps the last
    `window` rotated keys and values, a full-attention layer keeps all.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, fold: list[int], expected: int = 0, window: int = 0) -> None:
        super().__init__()
        self.fold, self.expected, self.window = fold, expected, window
        self.reset()

    def reset(self) -> None:
        """Remove all tokens."""
        self.key_rows = self._rows(self.window)
        self.value_rows = self._rows(self.fold[0] if self.fold else self.window)
        self.states = [self._rows(0) for _ in self.fold]
        self.num_tokens = 0
        self.is_initialized = False

    def _rows(self, keep: int) -> GrowingBuffer:
        """An empty `GrowingBuffer` for the last `keep` tokens (0: all tokens)."""
        return GrowingBuffer(keep) if keep else GrowingBuffer(expected=self.expected)

    def all_rows(self) -> list[GrowingBuffer]:
        """All rows of this layer."""
        return [self.key_rows, self.value_rows, *self.states]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate nothing: buffers are created with the first rows."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, Q, K, D]; returns those that the new tokens can reach."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.num_tokens += key_states.shape[1]
        return self.key_rows.append(key_states), self.value_rows.append(value_states)

    def reserve(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Like `update`, but a kernel writes the last Q rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.num_tokens += key_states.shape[1]
        return (
            self.key_rows.reserve(key_states.shape, key_states.dtype, key_states.device),
            self.value_rows.reserve(value_states.shape, value_states.dtype, value_states.device),
        )

    def update_state(self, index: int, z: Tensor) -> Tensor:
        """Add the new tokens' z [B, Q, H, D] after hop `index` + 1; returns z of all tokens."""
        return self.states[index].append(z)

    def get_seq_length(self) -> int:
        """Number of tokens seen."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1, like `get_max_length`; the name in transformers 4."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset) for masks, which this model does not use."""
        return self.num_tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError: values that have left the window cannot be restored."""
        raise ValueError("assisted generation is not supported: this cache cannot be cropped")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences like the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        self._map_batch(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the sequences of the batch by a selection, made by `change`."""
        for rows in self.all_rows():
            if rows.buffer is not None:
                rows.buffer = change(rows.buffer)


class RoutedLayer(FoldLayer):
    """The cache of a routed layer.

    `key_rows` [B, T, K, D] are rotated to position floor((t - d(t)) / stretch), `near_rows` (the
    last `window` tokens) to position t. `pooled_rows` [B, N, P, K, D] are the mean keys of the
    parts of blocks that are complete wherever their document begins; `recent_rows` are the keys of
    tokens whose blocks may not be complete, not rotated. `choice_rows` are the choices of the last
    open_tile - 1 + `choices` tokens.
    """

    def __init__(self, route: Route, expected: int = 0, choices: int = 0) -> None:
        self.route, self.choices = route, choices
        super().__init__([], expected)

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self.near_rows = GrowingBuffer(self.route.window)
        self.pooled_rows = GrowingBuffer(expected=self.expected // self.route.block)
        self.recent_rows = GrowingBuffer(2 * self.route.block)
        self.choice_rows = GrowingBuffer(self.route.open_tile - 1 + self.choices)

    def all_rows(self) -> list[GrowingBuffer]:
        """All rows of this layer."""
        rows = (self.near_rows, self.pooled_rows, self.recent_rows, self.choice_rows)
        return [*super().all_rows(), *rows]

    def has_dtype(self, dtype: torch.dtype) -> bool:
        """Whether all keys, values and mean keys that were added have this dtype."""
        rows = (self.key_rows, self.value_rows, self.near_rows, self.pooled_rows)
        return all(row.buffer is None or row.buffer.dtype == dtype for row in rows)

    def num_settled(self, num_tokens: int) -> int:
        """Number of slots whose block `num_tokens` tokens complete, wherever its document begins.

        The block of slot j ends at token (j + 2) * block - 2 at the latest.
        """
        return max(0, (num_tokens + 1) // self.route.block - 1)


class FoldCache(Cache):
    """One FoldLayer per decoder layer, and the last document of each sequence.

    Buffers are allocated for exactly `expected` tokens at first. Decoding needs the choices of the
    last open_tile - 1 tokens; routed layers keep those of `choices` more, for evaluation.
    """

    last_document: LastDocument | None = None

    def __init__(self, config: TensorLMConfig, expected: int = 0, choices: int = 0) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(layers=[_layer(config, i, expected, choices) for i in layers])

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self.last_document = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences like the beams."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        super().batch_select_indices(indices)
        self._map_last_document(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        super().batch_repeat_interleave(repeats)
        self._map_last_document(lambda x: x.repeat_interleave(repeats, dim=0))

    def _map_last_document(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.last_document is not None:
            self.last_document = LastDocument(*map(change, self.last_document))


def _layer(config: TensorLMConfig, index: int, expected: int, choices: int) -> FoldLayer:
    """An empty cache for the layer `index`."""
    kind = config.layer_kind(index)
    if kind == "routed":
        return RoutedLayer(config.route_numbers, expected, choices)
    window = config.window_size if kind == "window" else 0
    return FoldLayer(config.layer_fold(index), expected, window)
