"""Inputs and measures that the tests of the operator share.

Shape letters: B batch, T tokens, H query heads, K key heads, D head size, E value size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tensor_attention import Rotary, choose_blocks, tensor_attention
from tensor_attention.api import Backend

Results = dict[str, Tensor]
BACKENDS: list[Backend] = ["dense", "blocked"]


def doc_start_of(lengths: list[int]) -> Tensor:
    """[1, sum(lengths)] int32: the start of the document of each token."""
    starts = [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]
    return torch.tensor([starts], dtype=torch.int32)


def inputs(
    num_tokens: int, heads: int = 2, key_heads: int = 1, dim: int = 4, batch: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random float64 q [B,T,H,D], k [B,T,K,D], v [B,T,K,D]."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, num_tokens, h, dim, generator=generator, dtype=torch.float64)
        for h in (heads, key_heads, key_heads)
    )
    return q, k, v


def rotary_table(positions: int, head_dim: int) -> Rotary:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return Rotary(angles.cos(), angles.sin())


def effective_matrix(q: Tensor, k: Tensor, fold: list[int], **options: Any) -> Tensor:
    """[B, H, T, T]: how much of each token's value reaches each output (values = identity)."""
    batch, num_tokens = q.shape[:2]
    identity = torch.eye(num_tokens, dtype=q.dtype)[None, :, None]
    v = identity.expand(batch, num_tokens, k.shape[2], num_tokens)
    return tensor_attention(q, k, v, fold, **options).transpose(1, 2)


def document_mask(doc_start: Tensor) -> Tensor:
    """[B, T, T] bool: u is in t's document and not after t."""
    positions = torch.arange(doc_start.shape[1])
    return (positions[None, None] >= doc_start[..., None]) & (positions[None] <= positions[:, None])


def naive_choice(
    q: Tensor, k: Tensor, doc_start: Tensor, window: int, block: int, top_k: int, pool: int
) -> list[list[list[set[int]]]]:
    """[B][T][K] sets of blocks that the rule chooses, one by one."""
    group = q.shape[2] // k.shape[2]
    summed = q.unflatten(2, (-1, group)).sum(3)
    score = torch.einsum("btkd,bukd->btku", summed, k)  # of each key: a part's is their mean

    def choice(batch: int, token: int, head: int) -> set[int]:
        start = int(doc_start[batch, token])
        count = (token - window - start) // block + 1  # of blocks that begin before the window
        keys = score[batch, token, head, start:].tolist()
        scores = []
        for first in range(0, max(count, 0) * block, block):
            parts = [
                keys[at : min(at + pool, first + block)] for at in range(first, first + block, pool)
            ]
            scores.append(max(sum(part) / len(part) for part in parts))
        best = sorted(range(1, len(scores)), key=lambda b: (-scores[b], b))[:top_k]
        return set(best) | ({0} if scores else set())

    batches, tokens, heads = (range(n) for n in (q.shape[0], q.shape[1], k.shape[2]))
    return [[[choice(b, t, h) for h in heads] for t in tokens] for b in batches]


def choice_of(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """`choose_blocks` with those of the options of `routed_attention` that it has."""
    others = ("open_tile", "rotary", "stretch")
    return choose_blocks(q, k, **{n: x for n, x in options.items() if n not in others})


def sets_of(choice: Tensor) -> list[list[list[set[int]]]]:
    """[B][T][K] sets of the blocks in `choice` [B, T, K, C]; none of them twice."""
    sets = []
    for row in choice.tolist():
        sets.append([[{b for b in blocks if b >= 0} for blocks in heads] for heads in row])
        for heads in row:
            assert all(len({b for b in x if b >= 0}) == sum(b >= 0 for b in x) for x in heads)
    return sets


def read_beyond_window(
    choice: Tensor, doc_start: Tensor, window: int, block: int, open_tile: int = 1
) -> Tensor:
    """[B, K, T, T] bool: the keys u <= t - window in what t or its tile's earlier tokens chose."""
    batch, num_tokens, key_heads, _ = choice.shape
    sets, starts = sets_of(choice), doc_start.tolist()
    read = torch.zeros(batch, key_heads, num_tokens, num_tokens, dtype=torch.bool)
    for b, (row, start) in enumerate(zip(sets, starts, strict=True)):
        for t, first in enumerate(start):
            tile = first + (t - first) // open_tile * open_tile
            for h in range(key_heads):
                for index in set().union(*(row[s][h] for s in range(tile, t + 1))):
                    begin = first + index * block
                    read[b, h, t, begin : max(begin, min(begin + block, t - window + 1))] = True
    return read


def relative_error(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).abs().max() / reference.abs().max().clamp_min(1e-300))


def cotangent_like(out: Tensor) -> Tensor:
    """Fixed random quarters between -2 and 2: exact in every dtype, so that no rounding differs."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-8, 9, out.shape, generator=generator).to(out.dtype) / 4


def cotangent_like_on(out: Tensor) -> Tensor:
    return cotangent_like(torch.empty(out.shape, dtype=out.dtype)).to(out.device)


def run_with_gradients(
    tensors: list[Tensor], fold: list[int], **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of q, k, v (and hop_bias) for the cotangent of `cotangent_like`."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    q, k, v, *rest = leaves
    bias = rest[0] if rest else None
    out = tensor_attention(q, k, v, fold, hop_bias=bias, **options)
    return out.detach(), list(torch.autograd.grad(out, leaves, cotangent_like(out)))


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN: an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_as_good_as_plain(ours: Results, plain: Results, exact: Results) -> None:
    """The floor: one rounding of the result, and that of float32 sums of D products that cancel.

    (Where the exact gradient is zero, as that of q in a document of one token, all terms cancel.)
    """
    largest = max(float(x.norm()) for x in exact.values())
    terms = exact["dq"].shape[-1]
    for name, reference in exact.items():
        assert ours[name].dtype == plain[name].dtype
        floor = torch.finfo(ours[name].dtype).eps * float(reference.norm())
        floor += torch.finfo(torch.float32).eps * terms**0.5 * largest
        allowed = 2 * float((plain[name].double() - reference).norm()) + floor
        assert float((ours[name].double() - reference).norm()) <= allowed, name


class LargestTensor(TorchDispatchMode):
    """Records the largest storage, in elements, of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, storage)
        return out
