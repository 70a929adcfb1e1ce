"""Checks of memory: replicas must be equal on all ranks, state must not change between steps."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from tensorlm.runtime.errors import MachineError
from tensorlm.runtime.ranks import gather_json


def check_replicas(replicas: dict[str, Tensor], step: int) -> None:
    """Check that all ranks hold the same bits; costs one pass over them and one small gather.

    Raises:
        MachineError: they differ; raised on all ranks, names those that differ from the majority.
    """
    if not replicas or dist.get_world_size() == 1:
        return
    sums = _bit_sums(replicas)
    gathered = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, sums)
    table = torch.stack(gathered).cpu()
    is_odd = table != table.mode(dim=0).values
    if not is_odd.any():
        return
    name = list(replicas)[int(is_odd.any(dim=0).nonzero()[0])]
    odd = is_odd.any(dim=1).nonzero().flatten().tolist()
    if len(odd) * 2 >= len(table):  # without a majority, any of them may be wrong
        odd = list(range(len(table)))
    raise MachineError(
        f"rank {', '.join(map(str, odd))}: step {step}: weights differ between ranks, first in "
        f"{name} (suspect that device)"
    )


class ParameterChecksums:
    """Checks that the weights and state of this rank do not change between two steps.

    At ZeRO stages 1 to 3 no other rank holds the same state to compare it with.
    """

    def __init__(self, every: int) -> None:
        """`every`: number of steps between two checks (0: no checks)."""
        self._every = every
        self._sums: Tensor | None = None

    def remember(self, step: int, kept: Callable[[], dict[str, Tensor]]) -> None:
        """Record checksums after step `step` if the next one checks; one pass over `kept`."""
        is_next_guarded = self._every and (step + 1) % self._every == 0
        self._sums = _bit_sums(kept()) if is_next_guarded else None

    def check(self, step: int, kept: Callable[[], dict[str, Tensor]]) -> None:
        """Check, just before step `step` is applied, that nothing has changed; collective.

        Raises:
            MachineError: something has changed; raised on all ranks, names the ranks concerned.
        """
        if self._sums is None:
            return
        tensors = kept()
        changed = (_bit_sums(tensors) != self._sums).nonzero().flatten().tolist()
        found = gather_json([list(tensors)[index] for index in changed[:1]])
        odd = [rank for rank, names in enumerate(found) if names]
        if odd:
            raise MachineError(
                f"rank {', '.join(map(str, odd))}: step {step}: {found[odd[0]][0]} changed in "
                f"memory since step {step - 1} (suspect that device; a checkpoint of step "
                f"{step - 1} may contain the change)"
            )


def _bit_sums(tensors: dict[str, Tensor]) -> Tensor:
    """[N] int64 on the first tensor's device: for each tensor, the sum of its bits as integers.

    Any single flipped bit changes it.
    """
    sums = []
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1)
        words = 8 // flat.element_size()
        if flat.numel() % words or flat.storage_offset() % words:
            bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[flat.element_size()])
        else:
            bits = flat.view(torch.int64)  # many times faster on a CPU
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack([total.to(sums[0].device) for total in sums])
