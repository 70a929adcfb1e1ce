"""Hidden states that activation checkpointing keeps, in host memory until backward needs them.

A checkpointed block saves one large tensor, its input. Each is copied to pinned memory during its
block's forward pass and leaves the GPU when the next block begins; in backward, the input of block
i - 1 comes back while block i computes. Copies have a stream of their own, which orders them: a
buffer that one of them still reads is not written by the next.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _HiddenState:
    """One saved tensor: in host memory, and on its device while somebody needs it there."""

    def __init__(self, tensor: Tensor, host: Tensor, before: "_HiddenState | None") -> None:
        self.on_device: Tensor | None = tensor.detach()
        self.device = tensor.device
        self.host = host
        self.before = before  # the input of the block before, which backward needs next
        self.copied: torch.cuda.Event | None = None  # the end of the last copy, on a GPU


class HostOffload:
    """Keeps what blocks save for backward in buffers of host memory, the same ones in every step.

    On a CPU the copies are plain ones, and nothing overlaps.
    """

    def __init__(self) -> None:
        self.free_buffers: list[Tensor] = []  # of states whose backward is over
        self._last: _HiddenState | None = None
        self._stream: torch.cuda.Stream | None = None

    def saving(self) -> saved_tensors_hooks:
        """A context for the blocks of one forward pass, each under `torch.utils.checkpoint`."""
        self._last = None
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _HiddenState:
        if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
            return tensor  # weights, document starts
        state = _HiddenState(tensor, self._buffer_for(tensor), self._last)
        weakref.finalize(state, self.free_buffers.append, state.host)
        with self._copying(state):
            state.host.copy_(tensor.detach(), non_blocking=True)
        if self._last is not None:
            self._wait_for(self._last)  # it had the time of a whole block
            self._last.on_device = None
        self._last = state
        return state

    def _unpack(self, saved: Tensor | _HiddenState) -> Tensor:
        self._last = None
        if isinstance(saved, Tensor):
            return saved
        self._fetch(saved)
        if saved.before is not None:
            self._fetch(saved.before)
        self._wait_for(saved)
        tensor, saved.on_device = saved.on_device, None
        assert tensor is not None
        return tensor

    def _fetch(self, state: _HiddenState) -> None:
        """Start the copy to the device, unless it is there, as after the last block."""
        if state.on_device is not None:
            return
        tensor = torch.empty_like(state.host, device=state.device)
        with self._copying(state):
            tensor.copy_(state.host, non_blocking=True)
        state.on_device = tensor

    def _buffer_for(self, tensor: Tensor) -> Tensor:
        """A free buffer of that shape; those of other shapes (an earlier stage's) are given up."""
        while self.free_buffers:
            buffer = self.free_buffers.pop()
            if buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
                return buffer
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    @contextmanager
    def _copying(self, state: _HiddenState) -> Iterator[None]:
        """Copies inside run after all that is enqueued so far, beside all that follows."""
        if state.device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(state.device)
        self._stream.wait_stream(torch.cuda.current_stream(state.device))
        with torch.cuda.stream(self._stream):
            yield
            state.copied = self._stream.record_event()

    def _wait_for(self, state: _HiddenState) -> None:
        """What is enqueued from here on runs after the state's last copy."""
        if state.copied is not None:
            torch.cuda.current_stream(state.device).wait_event(state.copied)
