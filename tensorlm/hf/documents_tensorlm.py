"""The beginnings of documents in a packed or padded batch. Part of exported folders.

Shape letters: B batch, Q new tokens, T all tokens (those in the cache and the new ones).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_NUMBERS = (
    "attention_mask must have padding only outside documents (pad on the left), and document "
    "numbers that increase (number the documents of a row 1, 2, 3, ...)"
)
_POSITIONS = (
    "position_ids must count up by one inside each document of a packed row; documents that begin "
    "after position 1 and end within 2 tokens look like scaled or repeated positions, which are "
    "not supported"
)
_LENGTHS = (
    "cu_seq_lens_q must begin at 0, increase, and end within the row; cu_seq_lens_k must equal it"
)


class Signals(NamedTuple):
    """The caller's arguments about documents of the Q new tokens; None if not given.

    attention_mask [B, T]: 0 for padding, else 1 or the document's number. position_ids [B or 1, Q].
    seq_idx [B or 1, Q]: the document's number. cu_seq_lens_q and _k [documents + 1]: beginnings of
    the documents of a single row, and the end of the last one.
    """

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None


class LastDocument(NamedTuple):
    """The document of each sequence's last cached token: [B] int64 each."""

    start: Tensor  # index of its first token in the sequence; -1: the last token is padding
    next_position: Tensor  # the position of its next token


class Documents(NamedTuple):
    """Beginnings of the documents of new tokens, and for routed layers of all tokens."""

    starts: Tensor | None  # [B, Q]; None: every document begins at 0
    row: Tensor | None = None  # [B, T] int32 (`row_starts`)
    blocks: Tensor | None = None  # [B, N]: first token of each slot's block (`routing.py`)
    step: Any = None  # `routed_decode.Step` of a single new token


def row_starts(
    starts: Tensor | None, batch: int, num_new: int, num_seen: int, device: torch.device
) -> Tensor:
    """[B, T] int32: document starts of all tokens, as needed for the new tokens.

    A cached token is in the document of the first new token, or in an earlier document. New tokens
    cannot read the latter, so the result is 0 there.
    """
    if starts is None:
        return torch.zeros(batch, num_seen + num_new, dtype=torch.int32, device=device)
    starts = starts.to(torch.int32)
    index = torch.arange(num_seen, dtype=torch.int32, device=starts.device)
    seen = torch.where(index >= starts[:, :1], starts[:, :1], 0)
    return torch.cat([seen, starts], dim=1)


def document_starts(
    signals: Signals, batch: int, num_new: int, num_seen: int, last: LastDocument | None,
    device: torch.device,
) -> tuple[Tensor | None, LastDocument | None]:  # fmt: skip
    """For each new token, the index in the sequence at which its document begins.

    A new document begins where a position is not the previous one plus 1, where a document number
    changes, and at each entry of `cu_seq_lens_q`. The first new token continues the last document
    in the cache unless an argument says otherwise. Each padding token is its own document.

    Args:
        signals: the caller's arguments about packing and padding.
        batch, num_new, num_seen: B, Q and T - Q.
        last: last document of the cached tokens; None: a single document that begins at 0.
        device: device of the result.

    Returns:
        (starts [B, Q] int64, the last document for the next call), or (None, None) if all documents
        begin at 0, without reading a tensor.

    Raises:
        ValueError: an argument has a wrong shape or type, or on the CPU invalid values. On a GPU,
            invalid values fail a device-side assertion, so that the host need not wait.
    """
    _check_shapes(signals, batch, num_new, num_seen)
    if last is None and all(signal is None for signal in signals):
        return None, None
    index = torch.arange(num_seen, num_seen + num_new, device=device)
    begins = torch.zeros(batch, num_new, dtype=torch.bool, device=device)
    carried = torch.zeros(batch, dtype=torch.int64, device=device)
    if last is not None:
        carried = last.start.clamp(min=0)
    is_token = torch.ones_like(begins)
    if signals.attention_mask is not None:
        changes, is_token = _number_changes(signals.attention_mask.to(device).long())
        seen, begins = changes[:, :num_seen], changes[:, num_seen:]
        is_token = is_token[:, num_seen:]
        if num_seen:
            seen_index = torch.arange(num_seen, device=device)
            carried = carried.maximum(torch.where(seen, seen_index, 0).amax(1))
    if signals.seq_idx is not None:
        numbers = signals.seq_idx.to(device)
        begins = begins | (numbers.diff(dim=1, prepend=numbers[:, :1]) != 0)
    if signals.cu_seq_lens_q is not None:
        begins = begins | _listed(signals, num_new, device)
    if signals.position_ids is not None:
        positions = signals.position_ids.to(device).long().expand(batch, -1)
        begins = begins | _jumps(positions, num_seen, last, is_token)
    if last is not None:
        refuse_if((last.start < 0) & is_token[:, 0] & ~begins[:, 0], _NUMBERS)
    starts = torch.where(begins, index, carried[:, None]).cummax(1).values
    return starts, _last_document(starts, num_seen, last, signals, is_token)


def refuse_if(wrong: Tensor, message: str) -> None:
    """Raise ValueError if any of `wrong` is true, without blocking the host.

    On a GPU, and in a compiled or exported graph, this is an assertion on the device.
    """
    if torch.compiler.is_compiling() or wrong.is_cuda:
        torch._assert_async(~wrong.any(), message)
    elif not wrong.is_meta and bool(wrong.any()):
        raise ValueError(message)


def _check_shapes(signals: Signals, batch: int, num_new: int, num_seen: int) -> None:
    mask, lengths = signals.attention_mask, signals.cu_seq_lens_q
    if mask is not None:
        wanted = [batch, num_seen + num_new]
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        if shape != wanted:
            raise ValueError(
                f"attention_mask must have shape {wanted} (0 for padding, 1 or the document's "
                f"number for tokens), got {shape}"
            )
    for name in ("position_ids", "seq_idx"):
        signal = getattr(signals, name)
        if signal is None:
            continue
        if signal.is_floating_point() or list(signal.shape) not in ([batch, num_new], [1, num_new]):
            raise ValueError(
                f"{name} must be integers of shape {[batch, num_new]}, got {signal.dtype} "
                f"{list(signal.shape)}"
            )
    if lengths is None and signals.cu_seq_lens_k is not None:
        raise ValueError("cu_seq_lens_q must be given with cu_seq_lens_k")
    if lengths is not None and (batch > 1 or num_seen or lengths.ndim != 1 or len(lengths) < 2):
        raise ValueError(
            f"cu_seq_lens_q must be one list for a single row without a cache, got "
            f"{list(lengths.shape)} for {batch} rows and {num_seen} cached tokens"
        )
    keys = signals.cu_seq_lens_k
    if lengths is not None and keys is not None and keys.shape != lengths.shape:
        raise ValueError(f"{_LENGTHS}, got {list(keys.shape)} and {list(lengths.shape)}")


def _number_changes(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Beginnings of documents according to numbers [B, T] (0: padding), and a mask of tokens."""
    is_token = numbers != 0
    changes = numbers.diff(dim=1, prepend=numbers[:, :1]) != 0
    largest = numbers.cummax(1).values
    returns = changes[:, 1:] & is_token[:, 1:] & (numbers[:, 1:] <= largest[:, :-1])
    refuse_if(returns, _NUMBERS)
    refuse_if(numbers < 0, _NUMBERS)
    return changes | ~is_token, is_token


def _listed(signals: Signals, num_new: int, device: torch.device) -> Tensor:
    """[Q] bool: the tokens listed in `cu_seq_lens_q`."""
    assert signals.cu_seq_lens_q is not None
    starts = signals.cu_seq_lens_q.to(device).long()
    wrong = (starts[:1] != 0) | (starts[-1:] > num_new) | (starts.diff() < 0).any()
    if signals.cu_seq_lens_k is not None:
        wrong = wrong | (signals.cu_seq_lens_k.to(device) != starts).any()
    refuse_if(wrong, _LENGTHS)
    marks = torch.zeros(num_new + 1, dtype=torch.bool, device=device)
    return marks.index_fill(0, starts.clamp(0, num_new), True)[:-1]


def _jumps(positions: Tensor, num_seen: int, last: LastDocument | None, is_token: Tensor) -> Tensor:
    """[B, Q] bool: positions that are not the previous one plus 1.

    The first position also continues the cache if it is the index in the sequence, from which
    `generate` counts.
    """
    first = torch.zeros_like(positions[:, 0], dtype=torch.bool)
    if num_seen:
        first = positions[:, 0] != num_seen
        if last is not None:
            first = first & (positions[:, 0] != last.next_position)
    jumps = torch.cat([first[:, None], positions.diff(dim=1) != 1], dim=1)
    ends_soon = jumps[:, 1:-1] | jumps[:, 2:]  # the second or the third token is a jump again
    refuse_if((jumps & is_token & (positions > 1))[:, :-2] & ends_soon, _POSITIONS)
    return jumps


def _last_document(
    starts: Tensor, num_seen: int, last: LastDocument | None, signals: Signals, is_token: Tensor
) -> LastDocument:
    start, num_tokens = starts[:, -1], num_seen + starts.shape[1]
    if signals.position_ids is not None:
        position = signals.position_ids[:, -1].to(start.device).long() + 1
        next_position = position.expand_as(start)
    else:
        next_position = num_tokens - start
        if last is not None:
            continued = last.next_position + starts.shape[1]
            next_position = torch.where(start == last.start, continued, next_position)
    return LastDocument(torch.where(is_token[:, -1], start, -1), next_position)
