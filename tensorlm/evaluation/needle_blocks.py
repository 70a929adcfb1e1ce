"""Whether the needle's blocks were open to the tokens that had to copy it, per routed layer."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tensor_attention.routed_dense import opened_blocks

from .model import EvaluatedModel
from .results import NeedleBlocks


class Needle(NamedTuple):
    """Indices of a prompt's tokens that contain the hidden answer, and its number of tokens."""

    tokens: list[int]
    size: int


def find_needle(model: EvaluatedModel, text: str, answer: str) -> Needle:
    """The tokens of `model.encode(text)` that contain `answer`, at each of its occurrences."""
    encoded = model.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, verbose=False,
        return_offsets_mapping=True,
    )  # fmt: skip
    places, at = [], text.find(answer)
    while at >= 0:
        stop = at + len(answer)
        spans = enumerate(encoded["offset_mapping"], start=1)  # BOS comes first
        places.append([i for i, (start, end) in spans if start < stop and end > at])
        at = text.find(answer, stop)
    return Needle([i for place in places for i in place], max(map(len, places), default=0))


@torch.no_grad()
def open_shares(cache: Any, needle: Needle, prompt_length: int) -> NDArray[np.float64]:
    """How much of the needle each routed layer could read while the answer was generated.

    Args:
        cache: a `FoldCache` after generation, which has kept the choices of the answer's tokens.
        needle: the needle in the prompt.
        prompt_length: tokens of the prompt. The queries are its last token and those after it, as
            many as the needle has tokens.

    Returns:
        [layers]: fraction of the needle's tokens that are in the window or in an open block, the
        mean over queries and key heads.
    """
    from tensorlm.hf.cache_tensorlm import RoutedLayer  # slow to import, as in decoding.py

    first, shares = prompt_length - 1, []
    for memory in (layer for layer in cache.layers if isinstance(layer, RoutedLayer)):
        route, total = memory.route, memory.get_seq_length()
        choice = memory.choice_rows.rows()
        assert choice is not None
        queries = range(first, min(first + needle.size, total))
        before = min(first, route.open_tile - 1)
        known = total - choice.shape[1]  # first token whose choice was kept
        part = choice[:, first - before - known : queries.stop - known]
        starts = torch.zeros(1, queries.stop, dtype=torch.int32, device=choice.device)
        (opened,) = opened_blocks(part, starts, route.block, route.open_tile, first, len(queries))
        token = torch.tensor(needle.tokens, device=choice.device)
        query = torch.arange(queries.start, queries.stop, device=choice.device)
        near = token > query[:, None] - route.window  # [Q, tokens]
        near = near | opened[..., token // route.block]  # [K, Q, tokens]
        shares.append(float(near.double().mean()))
    return np.array(shares)


def needle_blocks(
    task: str,
    length: int,
    layers: list[int],
    opened: NDArray[np.float64],
    answered: NDArray[np.bool_],
    failed: NDArray[np.bool_],
) -> list[NeedleBlocks]:
    """For each routed layer, means over the prompts that were answered and those that failed.

    Args:
        task: name of the task.
        length: length of the prompts.
        layers: indices of the routed layers.
        opened: [layers, tasks, prompts] from `open_shares`.
        answered: [tasks, prompts] bool, whether the answer was correct.
        failed: [tasks, prompts] bool, whether it was wrong.
    """

    def mean(shares: NDArray[np.float64], prompts: NDArray[np.bool_]) -> float | None:
        return float(shares[prompts].mean()) if prompts.any() else None

    return [
        NeedleBlocks(
            task=task,
            length=length,
            layer=layer,
            answered=mean(shares, answered),
            failed=mean(shares, failed),
            num_answered=int(answered.sum()),
            num_failed=int(failed.sum()),
        )
        for layer, shares in zip(layers, opened, strict=True)
    ]
