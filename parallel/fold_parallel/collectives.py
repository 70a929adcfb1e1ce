"""Exchanges between ranks, as autograd pairs that can be under way while others compute.

`start_all_to_all` and `start_halo` launch an exchange and return an `InFlight`; its `wait` gives
the received tensors. What was forward a send is backward a receive, and the backward exchange too
is launched where the gradient appears and waited for where it is needed.

Tensors travel as bytes. Small ones (log-sum-exps, positions) share a message, whatever their
dtypes; a large one has its own, and is not packed or unpacked where its layout is a message's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import CHUNKS, Copies, Layout, contiguous, copy

# Sections of a message start at multiples of this, so that every dtype can view them in place.
ALIGNMENT = 16
# Bytes for one rank from which on another message costs less than copying them.
OWN_MESSAGE = 1 << 20


@dataclass(frozen=True)
class _Route:
    """Who sends to whom: each to each (`shift` 0), or each to the rank `shift` places on."""

    group: dist.ProcessGroup
    shift: int = 0

    def reversed(self) -> "_Route":
        return _Route(self.group, -self.shift)

    def launch(self, message: Tensor) -> tuple[Tensor, dist.Work]:
        """Send the rows of `message` [N, bytes]; the answer is valid after the work's wait."""
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
        """Bytes per rank: the message for the rank `shift` places on, if there is one."""
        other = dist.get_rank(self.group) + shift
        return [message.numel() * (r == other) for r in range(dist.get_world_size(self.group))]


@dataclass(frozen=True)
class _GatherRoute:
    """Each sends one row of bytes to all; the gradients of all come back, a row from each."""

    group: dist.ProcessGroup

    def reversed(self) -> _Route:
        return _Route(self.group)

    def launch(self, message: Tensor) -> tuple[Tensor, dist.Work]:
        """Send `message` [1, bytes]; the answer [P, bytes] is valid after the work's wait."""
        received = message.new_empty(dist.get_world_size(self.group), message.shape[1])
        work = dist.all_gather_into_tensor(received, message, group=self.group, async_op=True)
        # Gloo copies into `received` at its end: not a change in place of what autograd sees.
        return received.data, work


class _Flight:
    """The works under way, forward or backward, shared by the two ends of one exchange.

    On CUDA, landing makes the current stream wait, not the host. NCCL sends on a stream of its own;
    until the wait the work itself holds the message, so the allocator cannot give it away. It may
    be the tensor itself that is sent: nobody changes that, or a gradient, before the wait.
    """

    def __init__(
        self, route: _Route | _GatherRoute, sent: Layout | Copies, received: Layout
    ) -> None:
        self.route = route
        self.sent, self.received = sent, received
        self.works: list[dist.Work] | None = None

    def launch(self, route: _Route | _GatherRoute, chunks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Send chunks [N, ...] of tensors; what arrives is shaped as they are."""
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
        # Not views of what was received, to autograd: whoever gets them may change them in place.
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
    """An exchange under way. Every rank waits for it, once, before using what it received.

    What is sent may travel as it lies in memory: leave it as it is until then.
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
        """The received tensors."""
        received, self._received = self._received, ()  # whoever keeps this keeps no tensors
        outputs: tuple[Tensor, ...] = _Wait.apply(self._flight, *received)
        return outputs


def start_all_to_all(
    tensors: Sequence[Tensor],
    group: dist.ProcessGroup,
    sent: Layout = CHUNKS,
    received: Layout = CHUNKS,
) -> InFlight:
    """Send chunk r of each tensor to rank r; chunk s of what arrives is from rank s.

    Layouts say how chunks are cut from what is sent and joined to what arrives; by default both
    are [P, ...].
    """
    return InFlight(_Route(group), tensors, sent, received)


def start_gather(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> InFlight:
    """Send each tensor [B, T/P, ...] to all ranks; `wait` gives the whole row [B, T, ...] of each.

    Backward, each rank gets the gradients that all ranks have for its tokens, and adds them up
    in the order of the ranks, in float32 or wider: a reduce-scatter with the same bits every time.
    """
    row = Layout(axis=1, sizes=(dist.get_world_size(group), -1), place=1)
    return InFlight(_GatherRoute(group), tensors, Copies(), row)


class Halo:
    """The tokens before this rank's, under way from as many ranks as hold them."""

    def __init__(self, flights: Sequence[InFlight]) -> None:
        self._flights = flights

    def wait(self) -> tuple[Tensor, ...]:
        """The tokens [B, halo, ...] just before this rank's, zeros where the row has not begun."""
        parts = [flight.wait() for flight in self._flights]  # the nearest tokens first
        return tuple(
            torch.cat([x[0] for x in reversed(of_one)], dim=1) if len(of_one) > 1 else of_one[0][0]
            for of_one in zip(*parts, strict=True)
        )


def start_halo(tensors: Sequence[Tensor], halo: int, group: dist.ProcessGroup) -> Halo:
    """Send the last `halo` tokens of each tensor [B, T/P, ...] to the next rank.

    A halo longer than a rank's tokens comes from several ranks, in one exchange each; none is
    longer than the tokens of all other ranks. Backward, the gradients travel to the ranks that sent
    the tokens and are added to their own.
    """
    shard, flights = tensors[0].shape[1], []
    for shift in range(1, dist.get_world_size(group)):
        count = min(shard, halo - (shift - 1) * shard)
        if count > 0:
            sent = [x[None, :, shard - count :] for x in tensors]
            flights.append(InFlight(_Route(group, shift), sent))
    return Halo(flights)


def _messages(chunks: Sequence[Tensor]) -> list[list[int]]:
    """Which of the tensors [N, ...] travel together."""
    alone = [[i] for i, x in enumerate(chunks) if _chunk_bytes(x) >= OWN_MESSAGE]
    rest = [i for i, x in enumerate(chunks) if _chunk_bytes(x) < OWN_MESSAGE]
    return [*alone, rest] if rest else alone


def _chunk_bytes(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _padded_bytes(x: Tensor) -> int:
    return -(-_chunk_bytes(x) // ALIGNMENT) * ALIGNMENT


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """One message [N, bytes] from tensors [N, ...] of any strides, each copied once at most."""
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
