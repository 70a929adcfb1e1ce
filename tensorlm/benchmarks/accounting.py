"""Peak memory of a computation on the CPU, by counting tensors as they are created and freed."""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class PeakMemory(TorchDispatchMode):
    """Peak number of bytes in tensors created under this mode.

    Counts tensors of this thread, without temporary memory inside PyTorch's operations. Tensors may
    be freed by other threads, such as gloo's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        # Sizes, since `_live -= size` in one thread could be lost to `_live += size` in another.
        self._freed: deque[int] = deque()
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    @property
    def live(self) -> int:
        """Number of bytes in live tensors."""
        while self._freed:
            self._live -= self._freed.popleft()
        return self._live

    def restart(self) -> None:
        """Reset the peak to the current number of bytes."""
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        assert isinstance(func, torch._ops.OpOverload)
        if func.namespace == "tensor_attention":  # also count tensors inside a custom operator
            with self:
                out = func.redispatch(_CPU, *args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            # DeepSpeed keeps shapes as tensors without memory (device meta).
            if isinstance(x, Tensor) and x.device.type != "meta":
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        weakref.finalize(storage, self._freed.append, storage.nbytes())
        self._live += storage.nbytes()
        self.peak = max(self.peak, self.live)
