"""Activation offload: checkpointed hidden states in host memory until backward needs them.

A checkpointed block, or group of blocks (`recompute.run_group`), saves one large tensor, its input.
It is copied to pinned memory during the forward pass of the group and freed on the GPU when the
next group begins. In backward, the input of group i - 1 is copied back while the first block of
group i computes, when the inputs of its other blocks have been freed. All copies run in one
separate stream, in order: none writes a buffer that another still reads.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# PyTorch's pinned memory comes in powers of two: of a larger tensor up to half would be wasted.
# Smaller ones may share a page with others, which cannot be pinned twice.
EXACT_FROM = 64 << 20  # bytes


def host_buffer(tensor: Tensor) -> Tensor:
    """An empty tensor like `tensor` in host memory; pinned, so that copies run beside kernels."""
    if not tensor.is_cuda or tensor.nbytes < EXACT_FROM:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    registered = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
    torch.cuda.check_error(registered)
    release = weakref.finalize(buffer, _unpin, buffer.data_ptr(), tensor.device)
    release.atexit = False
    return buffer


def _unpin(address: int, device: torch.device) -> None:
    """Release a buffer that is about to be freed, once no copy uses it."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)


class _HiddenState:
    """One saved tensor: in host memory, and on its device while it is needed there."""

    def __init__(self, tensor: Tensor, host: Tensor, before: "_HiddenState | None") -> None:
        self.on_device: Tensor | None = tensor.detach()
        self.device = tensor.device
        self.host = host
        self.before = before  # the input of the previous group, which backward needs next
        self.copied: torch.cuda.Event | None = None  # the end of the last copy (GPU only)


class HostOffload:
    """Keeps what blocks save for backward in host memory, in buffers that every step reuses.

    On a CPU the copies are synchronous.
    """

    def __init__(self) -> None:
        self.free_buffers: list[Tensor] = []  # of states whose backward pass is done
        self._last: _HiddenState | None = None
        self._stream: torch.cuda.Stream | None = None

    def saving(self) -> saved_tensors_hooks:
        """Context for the blocks of one forward pass, each under `torch.utils.checkpoint`."""
        self._last = None
        return saved_tensors_hooks(self._pack, self._unpack)

    def fetch_earlier(self, output: Tensor) -> None:
        """Let backward fetch the last but one state once it has the gradient of `output`.

        Args:
            output: of the first block after the last state; a repeated forward pass has no states.
        """
        if self._last is None or self._last.before is None:
            return
        # A hook lives as long as the whole graph, which must not keep a buffer from being reused.
        before = weakref.ref(self._last.before)

        def fetch(_: Tensor) -> None:
            if state := before():
                self._fetch(state)

        output.register_hook(fetch)

    def _pack(self, tensor: Tensor) -> Tensor | _HiddenState:
        if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point() or not tensor.numel():
            return tensor  # weights, document starts
        state = _HiddenState(tensor, self._buffer_for(tensor), self._last)
        weakref.finalize(state, self.free_buffers.append, state.host)
        with self._copying(state):
            state.host.copy_(tensor.detach(), non_blocking=True)
        if self._last is not None:
            self._wait_for(self._last)  # its copy had the time of a whole group
            self._last.on_device = None
        self._last = state
        return state

    def _unpack(self, saved: Tensor | _HiddenState) -> Tensor:
        self._last = None
        if isinstance(saved, Tensor):
            return saved
        self._fetch(saved)
        self._wait_for(saved)
        tensor, saved.on_device = saved.on_device, None
        assert tensor is not None
        return tensor

    def _fetch(self, state: _HiddenState) -> None:
        """Start the copy to the device, unless the tensor is still there (the last block's)."""
        if state.on_device is not None:
            return
        tensor = torch.empty_like(state.host, device=state.device)
        with self._copying(state):
            tensor.copy_(state.host, non_blocking=True)
        state.on_device = tensor

    def _buffer_for(self, tensor: Tensor) -> Tensor:
        """A free buffer of the same shape; buffers of other shapes (earlier phases) are freed."""
        while self.free_buffers:
            buffer = self.free_buffers.pop()
            if buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
                return buffer
        return host_buffer(tensor)

    @contextmanager
    def _copying(self, state: _HiddenState) -> Iterator[None]:
        """Context for copies that run after all work enqueued so far, beside all later work."""
        if state.device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(state.device)
        self._stream.wait_stream(torch.cuda.current_stream(state.device))
        with torch.cuda.stream(self._stream):
            yield
            state.copied = self._stream.record_event()

    def _wait_for(self, state: _HiddenState) -> None:
        """Make all work enqueued from now on wait for the state's last copy."""
        if state.copied is not None:
            torch.cuda.current_stream(state.device).wait_event(state.copied)
