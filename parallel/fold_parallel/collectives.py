"""Differentiable exchanges between ranks that can overlap with computation.

`start_all_to_all` and `start_halo` launch an exchange and return an `InFlight`; its `wait` returns
the received tensors. A send in forward is a receive in backward. The backward exchange is launched
when the gradient is ready, and awaited where it is needed.

Tensors are sent as bytes. Small tensors (log-sum-exps, positions) of any dtype share a message. A
large tensor has a separate message, and is not packed or unpacked if it has the message's layout.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import CHUNKS, Copies, Layout, contiguous, copy

# Sections of a message start at multiples of this, so that every dtype can view them in place.
ALIGNMENT = 16
# Bytes per rank from which a separate message costs less than a copy.
OWN_MESSAGE = 1 << 20


class _Route(NamedTuple):
    """Each rank sends to all ranks (`shift` 0), or to the rank `shift` places further."""

    group: dist.ProcessGroup
    shift: int = 0

    def reversed(self) -> "_Route":
        return _Route(self.group, -self.shift)

    def launch(self, message: Tensor) -> tuple[Tensor, dist.Work]:
        """Send the rows of `message` [N, bytes]; the result is valid after the work's wait."""
        if self.shift == 0:
            received = torch.empty_like(message)
            return received, dist.all_to_all_single(
                received, message, group=self.group, async_op=True
            )
        received = torch.zeros_like(message)
        sent_to = self._split(message, self.shift)
        got_from = self._split(message, -self.shift)
        work = dist.all_to_all_single(
            received[0, : sum(got_from)], message[0, : sum(sent_to)],
            output_split_sizes=got_from, input_split_sizes=sent_to,
            group=self.group, async_op=True,
        )  # fmt: skip
        return received, work

    def _split(self, message: Tensor, shift: int) -> list[int]:
        """Bytes per rank: the whole message for the rank `shift` places further, if it exists."""
        other = dist.get_rank(self.group) + shift
        return [message.numel() * (r == other) for r in range(dist.get_world_size(self.group))]


class _GatherRoute(NamedTuple):
    """Each rank sends one row of bytes to all ranks, and gets back gradients, one row from each."""

    group: dist.ProcessGroup

    def reversed(self) -> _Route:
        return _Route(self.group)

    def launch(self, message: Tensor) -> tuple[Tensor, dist.Work]:
        """Send `message` [1, bytes]; the result [P, bytes] is valid after the work's wait."""
        received = message.new_empty(dist.get_world_size(self.group), message.shape[1])
        work = dist.all_gather_into_tensor(received, message, group=self.group, async_op=True)
        # Gloo copies into `received` when it finishes; autograd must not see an in-place change.
        return received.data, work


class _Flight:
    """The pending works of one exchange, forward or backward, shared by its two ends.

    On CUDA, `land` makes the current stream wait, not the host. NCCL sends on a separate stream.
    Until the wait, the work holds a reference to the message, so the allocator cannot reuse it. The
    message may be the tensor itself, which must not be changed before the wait.
    """

    def __init__(
        self, route: _Route | _GatherRoute, sent: Layout | Copies, received: Layout
    ) -> None:
        self.route = route
        self.sent, self.received = sent, received
        self.works: list[dist.Work] | None = None

    def launch(self, route: _Route | _GatherRoute, chunks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Send chunks [N, ...] of tensors; returns tensors of the same shapes."""
        arriving = dict[int, Tensor]()
        self.works = []
        for members in _messages(chunks):
            parts = [chunks[i] for i in members]
            received, work = route.launch(_pack(parts))
            self.works.append(work)
            arriving.update(zip(members, _sections(received, parts), strict=True))
        return tuple(arriving[i] for i in range(len(chunks)))

    def land(self) -> None:
        assert self.works is not None, "waited for an exchange that was not launched"
        for work in self.works:
            work.wait()
        self.works = None


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: _Flight, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        received = flight.launch(flight.route, [flight.sent.cut(x) for x in tensors])
        ctx.mark_non_differentiable(*(x for x in received if not x.is_floating_point()))
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.flight.land()
        needed = zip(gradients, ctx.needs_input_grad[1:], strict=True)
        return (None, *(ctx.flight.sent.join(g) if need else None for g, need in needed))


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: _Flight, *received: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        ctx.floating = [x.is_floating_point() for x in received]
        flight.land()
        # Hide from autograd that these are views, so that callers may change them in place.
        outputs = tuple(flight.received.join(x).data for x in received)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flight = ctx.flight
        floating = [
            flight.received.cut(g) for g, keep in zip(gradients, ctx.floating, strict=True) if keep
        ]
        returned = iter(flight.launch(flight.route.reversed(), floating))
        return (None, *(next(returned) if keep else None for keep in ctx.floating))


class InFlight:
    """A pending exchange. Every rank must call `wait` once before it uses the received tensors.

    Tensors may be sent without a copy, so do not change them before `wait`.
    """

    def __init__(
        self,
        route: _Route | _GatherRoute,
        tensors: Sequence[Tensor],
        sent: Layout | Copies = CHUNKS,
        received: Layout = CHUNKS,
    ) -> None:
        self._flight = _Flight(route, sent, received)
        self._received: tuple[Tensor, ...] = _Start.apply(self._flight, *tensors)

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the exchange and return the received tensors."""
        received, self._received = self._received, ()  # do not keep tensors alive
        outputs: tuple[Tensor, ...] = _Wait.apply(self._flight, *received)
        return outputs


def start_all_to_all(
    tensors: Sequence[Tensor],
    group: dist.ProcessGroup,
    sent: Layout = CHUNKS,
    received: Layout = CHUNKS,
) -> InFlight:
    """Send chunk r of each tensor to rank r; chunk s of each received tensor is from rank s.

    The layouts define how chunks are cut from sent tensors and joined to received ones. By default,
    both are [P, ...].
    """
    return InFlight(_Route(group), tensors, sent, received)


def start_gather(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> InFlight:
    """Send each tensor [B, T/P, ...] to all ranks; `wait` returns the whole row [B, T, ...].

    In backward, each rank receives the gradients of all ranks for its tokens, and adds them in rank
    order, in float32 or wider: a deterministic reduce-scatter.
    """
    row = Layout(axis=1, sizes=(dist.get_world_size(group), -1), place=1)
    return InFlight(_GatherRoute(group), tensors, Copies(), row)


class Halo:
    """Pending exchanges of the tokens before this rank's, from all ranks that hold them."""

    def __init__(self, flights: Sequence[InFlight]) -> None:
        self._flights = flights

    def wait(self) -> tuple[Tensor, ...]:
        """The tokens [B, halo, ...] just before this rank's, with zeros before the row's start."""
        parts = [flight.wait() for flight in self._flights]  # the nearest tokens first
        return tuple(
            torch.cat([x[0] for x in reversed(of_one)], dim=1) if len(of_one) > 1 else of_one[0][0]
            for of_one in zip(*parts, strict=True)
        )


def start_halo(tensors: Sequence[Tensor], halo: int, group: dist.ProcessGroup) -> Halo:
    """Send the last `halo` tokens of each tensor [B, T/P, ...] to the next rank.

    A halo longer than a slice comes from several ranks, in one exchange each. It is at most as long
    as the slices of all other ranks. In backward, the gradients are sent back and added to those of
    the sender.
    """
    shard, flights = tensors[0].shape[1], []
    for shift in range(1, dist.get_world_size(group)):
        count = min(shard, halo - (shift - 1) * shard)
        if count > 0:
            sent = [x[None, :, shard - count :] for x in tensors]
            flights.append(InFlight(_Route(group, shift), sent))
    return Halo(flights)


def _messages(chunks: Sequence[Tensor]) -> list[list[int]]:
    """Group the tensors [N, ...] into messages; returns their indices."""
    alone = [[i] for i, x in enumerate(chunks) if _chunk_bytes(x) >= OWN_MESSAGE]
    rest = [i for i, x in enumerate(chunks) if _chunk_bytes(x) < OWN_MESSAGE]
    return [*alone, rest] if rest else alone


def _chunk_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _padded_bytes(x: Tensor) -> int:
    return -(-_chunk_bytes(x) // ALIGNMENT) * ALIGNMENT


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """One message [N, bytes] from tensors [N, ...] of any strides; copies each at most once."""
    rows = tensors[0].shape[0]
    if len(tensors) == 1:
        return contiguous(tensors[0]).reshape(-1).view(torch.uint8).view(rows, -1)
    size = sum(_padded_bytes(x) for x in tensors)
    message = torch.empty(rows, size, dtype=torch.uint8, device=tensors[0].device)
    for section, x in zip(_sections(message, tensors), tensors, strict=True):
        copy(section, x)
    return message


def _sections(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of `message` [N, bytes], in place, with the shapes and dtypes of `like`."""
    sections, offset = [], 0
    for x in like:
        section = message[:, offset : offset + _chunk_bytes(x)].view(x.dtype)
        sections.append(section.unflatten(1, x.shape[1:]))
        offset += _padded_bytes(x)
    return sections
