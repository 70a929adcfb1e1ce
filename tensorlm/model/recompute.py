"""Recomputation in the backward pass: what a block keeps from its forward pass.

* "none": everything that its backward needs.
* "block": its input, and the choice of a routed layer.
* "selective": also the results of its attention operator and of its matrix products. Backward
  recomputes the rest: norms, SiLU(gate) * up, and for shared rows the exchanges. The products of a
  tiled SwiGLU are recomputed, as they always are.
* "attention": also the results of its attention operator, but of no matrix product. A routed layer
  keeps those of its blocks, and recomputes its window, which takes less time for each byte.

"selective" and "attention" also keep the scales of tensors that are cast to float8.

With "block", only every n-th block may keep its input (`run_group`).

All give the same bits: recomputation repeats the same operations on the same inputs.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint as recomputation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tensor_attention import Rotary
from tensorlm.config import LayerKind, Recompute

from .attention import KeptChoice

# Operators of `kernels/tensor_attention/gpu`; attention in plain PyTorch is recomputed.
ATTENTION = frozenset(f"tensor_attention::{name}" for name in ("chain", "hop", "routed_hop"))
BLOCKS = frozenset(["tensor_attention::routed_hop"])
PRODUCT = "aten::mm"
FLOAT8 = "tensorlm::float8_products"  # several products at once
SCALES = "tensorlm::float8_scales"

Results = deque[Any]  # tensors, or tuples of them, in the order of their operators


def run_group(
    blocks: Sequence[Callable[[Tensor], Tensor]], x: Tensor, reached: Callable[[Tensor], None]
) -> Tensor:
    """Apply consecutive blocks to x [B, T, C]; only the first one's input is kept for backward.

    Backward first runs all but the last block again, to find the inputs of the others. Then it
    recomputes and differentiates one block at a time.

    Args:
        blocks: `run_block` of each block.
        x: input of the first block.
        reached: called with the output of the first block.
    """

    def run(x: Tensor) -> Tensor:
        for index, block in enumerate(blocks):
            x = block(x)
            if index == 0:
                reached(x)
        return x

    if len(blocks) == 1:
        return run(x)
    # Run again, this stops at the last tensor that it has saved: the input of the last block.
    return recomputation.checkpoint(run, x, use_reentrant=False)


def run_block(
    block: nn.Module, recompute: Recompute, kept_products: int, kind: LayerKind,
    x: Tensor, doc_start: Tensor, rotary: Rotary, kept: KeptChoice | None,
) -> Tensor:  # fmt: skip
    """Apply a `Block` to x [B, T, C], so that its backward recomputes what `recompute` says.

    Args:
        block: the block.
        recompute: see the top of this file; "auto" must have been resolved.
        kept_products: number of first products whose results "selective" keeps.
        kind: kind of its attention.
        x, doc_start, rotary: inputs of the block.
        kept: where a routed layer keeps its choice.
    """
    match recompute:
        case "none":
            return block(x, doc_start, rotary, kept)
        case "block":
            contexts = recomputation.noop_context_fn
        case "selective":
            contexts = partial(_keeping_results, ATTENTION, kept_products)
        case "attention":
            operators = BLOCKS if kind == "routed" else ATTENTION
            contexts = partial(_keeping_results, operators, 0)
        case "auto":
            raise AssertionError("train.recompute = auto must be resolved before training")
    return recomputation.checkpoint(
        block, x, doc_start, rotary, kept, use_reentrant=False, context_fn=contexts
    )


def _keeping_results(
    operators: frozenset[str], kept_products: int
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts of a forward pass and its recomputation."""
    results: Results = deque()
    return (
        _Keeping(results, operators, kept_products),
        _Reusing(results, operators, kept_products),
    )


class _Selection(TorchDispatchMode):
    """Sees every operator, and selects those whose results are kept.

    PyTorch's own selective checkpointing cannot be used: since version 2.13 it rejects operators
    that only the recomputation runs, such as those by which ZeRO stage 3 gathers weights.
    """

    def __init__(self, results: Results, operators: frozenset[str], kept_products: int) -> None:
        super().__init__()
        self.results = results
        self.operators = operators
        self._left = kept_products

    def selects(self, operator: Any, args: tuple[Any, ...]) -> bool:
        name = operator.name() if isinstance(operator, torch._ops.OpOverload) else ""
        if name in (PRODUCT, FLOAT8):
            self._left -= len(args[1]) if name == FLOAT8 else 1
            return self._left >= 0
        return name == SCALES or name in self.operators


class _Keeping(_Selection):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.selects(func, args):
            # Aliases: autograd is about to attach the graph, which leads back here, to `out`.
            self.results.append(tree_map_only(Tensor, Tensor.detach, out))
        return out


class _Reusing(_Selection):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.results.popleft() if self.selects(func, args) else func(*args, **(kwargs or {}))
