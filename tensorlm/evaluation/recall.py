"""Recall of the choice: the share of full attention that lies in the chosen blocks.

Each window of held-out text passes through the model once. Hooks on the projections of each routed
layer capture its queries and keys, and the last queries of the window are measured.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fold_parallel import Grid
from fold_parallel.collectives import start_gather
from tensorlm.model import Llama
from tensorlm.model.layers import rotary_table

from .choice_mass import COLUMNS, choice_masses
from .model import EvaluatedModel
from .ranks import compute_and_sum, progress
from .results import Recall, RecallAt
from .text import Spans


def measure_recall(
    model: EvaluatedModel, spans: Spans, length: int, num_queries: int
) -> list[Recall]:
    """Recall of every routed layer, in windows of the last `length` tokens of each span.

    Args:
        model: a model with at least one routed layer.
        spans: the spans; N must be at least `length`, so that all lengths have the same queries.
        length: tokens in a window.
        num_queries: number of last tokens in each window whose choice is measured.

    Raises:
        DoesNotFitError: memory ran out.
    """
    layers, edges = model.routed_layers, distance_edges(model.shape.window_size, length)
    windows = torch.from_numpy(spans.tokens[:, spans.length - length :])
    queries = range(max(0, length - num_queries), length)
    mine = windows[model.grid.dp_rank :: model.grid.dp]
    # All ranks make the same number of passes, as in `perplexity.window_losses`.
    num_idle = -(-len(windows) // model.grid.dp) - len(mine)

    def measure() -> NDArray[np.float64]:
        sums = np.zeros((len(layers), len(edges) * len(COLUMNS) + 1))
        title = f"    recall {length:>7,}"
        with progress(len(mine) * length, "tok", title, model.grid) as bar:
            for window in mine:
                sums += _window_sums(model, window[None], layers, queries, edges)
                bar.update(length)
            for _ in range(num_idle):
                model.losses(windows[:1])
        return sums

    sums = compute_and_sum(measure, model.device, model.partners)
    count = len(windows) * len(queries)
    return [
        _recall(layer, length, edges, found, count, model)
        for layer, found in zip(layers, sums, strict=True)
    ]


def distance_edges(window: int, length: int) -> list[int]:
    """Edges of distance bins from the window to the whole length; each edge doubles the last."""
    edges = [min(window, length)]
    while edges[-1] < length:
        edges.append(min(length, 2 * edges[-1]))
    return edges


def _recall(
    layer: int,
    length: int,
    edges: list[int],
    sums: NDArray[np.float64],
    num_queries: int,
    model: EvaluatedModel,
) -> Recall:
    """Recall of one layer, from its sums over all windows."""
    table = sums[:-1].reshape(len(edges), len(COLUMNS)) / (num_queries * model.shape.num_heads)
    whole = table.sum(axis=0)
    bins = [
        RecallAt(start=start, stop=stop, mass=float(line[0]), **_shares(line))
        for (start, stop), line in zip(pairwise(edges), table[1:], strict=True)
    ]
    return Recall(
        length=length,
        layer=layer,
        num_queries=num_queries,
        beyond=float(whole[0]),
        first=float(table[0, 0] / whole[0]) if whole[0] else 0.0,
        opened=float(sums[-1] / (num_queries * model.shape.num_kv_heads)),
        distances=bins,
        **_shares(whole),
    )


def _shares(line: NDArray[np.float64]) -> dict[str, float]:
    """The share of the mass in each choice; 1 if there is no mass."""
    return {
        name: float(held / line[0]) if line[0] else 1.0
        for name, held in zip(COLUMNS[1:], line[1:], strict=True)
    }


def _window_sums(
    model: EvaluatedModel, window: Tensor, layers: list[int], queries: range, edges: list[int]
) -> NDArray[np.float64]:
    """[layers, sums] over this rank's queries of one window [1, L + 1]."""
    shape, grid, length = model.shape, model.grid, window.shape[1] - 1
    assert shape.route is not None
    rotary = rotary_table(shape, length, model.device)
    doc_start = torch.zeros(1, length, dtype=torch.int32, device=model.device)
    part, route = _part(queries, grid), shape.route
    sums: dict[int, Tensor] = {}

    def measure(layer: int, q: Tensor, k: Tensor) -> None:
        q, k = (x.unflatten(-1, (-1, shape.head_size)) for x in (q, k))
        if grid.sp_group is not None:
            q, k = start_gather((q, k), grid.sp_group).wait()
        found = choice_masses(
            q, k, window=shape.window_size, route=route, queries=part, edges=edges,
            doc_start=doc_start, rotary=rotary,
        )  # fmt: skip
        sums[layer] = torch.cat((found.table.flatten(), found.opened[None]))

    with watching_projections(model.network, layers, measure):
        model.losses(window)
    return torch.stack([sums[layer] for layer in layers]).cpu().numpy()


def _part(queries: range, grid: Grid) -> range:
    """The queries that this rank of a sequence group measures."""
    bounds = [len(queries) * rank // grid.sp for rank in (grid.sp_rank, grid.sp_rank + 1)]
    return range(queries.start + bounds[0], queries.start + bounds[1])


@contextmanager
def watching_projections(
    network: Any, layers: list[int], seen: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Context that calls `seen(layer, queries, keys)` after these layers' projections.

    Queries and keys are [B, T, heads x D], of this rank's tokens, not rotated.
    """
    blocks: Any = (network if isinstance(network, Llama) else network.model).layers
    with ExitStack() as hooks:
        for layer in layers:
            pair, attention = _Pair(layer, seen), blocks[layer].self_attn
            for projection in (attention.q_proj, attention.k_proj):
                hooks.callback(projection.register_forward_hook(pair.add).remove)
        yield


class _Pair:
    """Collects the outputs of a layer's projections of queries and keys, in this order."""

    def __init__(self, layer: int, seen: Callable[[int, Tensor, Tensor], None]) -> None:
        self._layer, self._seen = layer, seen
        self._outputs: list[Tensor] = []

    def add(self, projection: nn.Module, inputs: Any, output: Tensor) -> None:
        """Forward hook; it does not change the output."""
        self._outputs.append(output)
        if len(self._outputs) == 2:
            q, k = self._outputs
            self._outputs = []
            self._seen(self._layer, q, k)
