"""Rows of tokens on which the sharded operator is compared with the whole one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fold_parallel import Grid, sharded_tensor_attention
from tensor_attention import Rotary, tensor_attention
from tests.fold_parallel.backends import result


@dataclass(frozen=True)
class Case:
    """One row: its fold, the lengths of its documents, and its heads."""

    fold: tuple[int, ...]
    documents: tuple[int, ...]
    heads: int = 4
    key_heads: int = 1
    batch: int = 1
    rotary: bool = True
    bias: bool = True
    scale: float | None = None
    dtype: torch.dtype = torch.float64

    @property
    def seq_len(self) -> int:
        return sum(self.documents)

    def __str__(self) -> str:
        parts = [f"fold {list(self.fold)}", f"{len(self.documents)} documents of {self.seq_len}"]
        parts += [f"{self.heads}/{self.key_heads} heads", str(self.dtype).removeprefix("torch.")]
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """The tensors of a whole row."""

    q: Tensor
    k: Tensor
    v: Tensor
    hop_bias: Tensor
    doc_start: Tensor
    rotary: Rotary | None
    cotangent: Tensor


def make_row(case: Case, head_dim: int = 4) -> Row:
    """Random tensors, the same on every rank. Batch row i has its documents rotated by i."""
    generator = torch.Generator().manual_seed(case.seq_len + len(case.documents))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    q, cotangent = random(2, case.batch, case.seq_len, case.heads, head_dim)
    k, v = random(2, case.batch, case.seq_len, case.key_heads, head_dim)
    starts = []
    for i in range(case.batch):
        lengths = case.documents[i:] + case.documents[:i]
        starts.append([sum(lengths[:j]) for j, n in enumerate(lengths) for _ in range(n)])
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = (torch.arange(case.seq_len)[:, None] * frequencies).to(case.dtype)
    return Row(
        q, k, v,
        hop_bias=random(len(case.fold), case.heads),
        doc_start=torch.tensor(starts, dtype=torch.int32),
        rotary=Rotary(angles.cos(), angles.sin()) if case.rotary else None,
        cotangent=cotangent,
    )  # fmt: skip


Results = dict[str, Tensor]


def whole(case: Case, row: Row) -> Results:
    """Output and gradients of the operator on one device."""
    return run(case, row, Grid(), torch.device("cpu"))


def run(case: Case, row: Row, grid: Grid, on: torch.device) -> Results:
    """Output and gradients of this rank's tokens of `row`."""
    tokens = grid.tokens(case.seq_len)
    q, k, v = (x[:, tokens].to(on).requires_grad_() for x in (row.q, row.k, row.v))
    hop_bias = row.hop_bias.to(on).requires_grad_() if case.bias and case.fold else None
    rotary = None if row.rotary is None else Rotary(*(x.to(on) for x in row.rotary))
    doc_start = row.doc_start[:, tokens].to(on)
    if grid.sp > 1:
        out = sharded_tensor_attention(
            q, k, v, case.fold, grid=grid, doc_start=doc_start, hop_bias=hop_bias, rotary=rotary,
            scale=case.scale,
        )  # fmt: skip
    else:
        out = tensor_attention(
            q, k, v, case.fold, doc_start=doc_start, hop_bias=hop_bias, rotary=rotary,
            scale=case.scale,
        )  # fmt: skip
    leaves = {"q": q, "k": k, "v": v} | ({} if hop_bias is None else {"hop_bias": hop_bias})
    gradients = torch.autograd.grad(out, tuple(leaves.values()), row.cotangent[:, tokens].to(on))
    named = zip(leaves, gradients, strict=True)
    return {"out": result(out)} | {f"d{name}": result(x) for name, x in named}


def joined(parts: list[Results]) -> Results:
    """The whole row's results from those of its ranks: tokens joined, the bias's parts added."""
    return {
        name: sum((p[name] for p in parts), torch.zeros(()))
        if name == "dhop_bias"
        else torch.cat([p[name] for p in parts], dim=1)
        for name in parts[0]
    }
