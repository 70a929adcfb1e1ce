"""What ranks send and compute, counted as it happens."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fold_parallel.collectives import _Flight


class Log(TorchDispatchMode):
    """Collectives, waits for them and matrix products of this thread, in order.

    `messages` and `group_sizes` are the bytes and the ranks of each collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.messages: list[int] = []
        self.group_sizes: list[int] = []
        land = _Flight.land

        def logged_land(flight: _Flight) -> None:
            self.events.append("wait")
            land(flight)

        self._waits = patch.object(_Flight, "land", logged_land)

    def __enter__(self) -> "Log":
        self._waits.start()
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._waits.stop()

    @property
    def sent(self) -> list[str]:
        """The collectives alone."""
        return [event for event in self.events if event not in ("multiply", "wait")]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            message, event = args[1], name.split(".")[1]
            ranks = dist.ProcessGroup.unbox(args[2]).size()
            if event == "_allgather_base_":  # a copy to each other rank
                self.events.append(event)
                sent = (ranks - 1) * message.numel()
            else:
                # In an all-to-all, what a rank sends to itself is not sent; to a neighbour, all is.
                self.events.append("neighbour" if args[4] else event)
                sent = message.numel() - (0 if args[4] else message.numel() // ranks)
            self.messages.append(sent * message.element_size())
            self.group_sizes.append(ranks)
        elif name.startswith("aten.bmm"):
            self.events.append("multiply")
        return func(*args, **(kwargs or {}))
