"""The Triton kernels run on shards: on a CPU in Triton's interpreter, on GPUs compiled."""

import os

import pytest
import torch

from fold_parallel import Grid, create_grid, sharded_tensor_attention
from tests.fold_parallel.backends import device, ranks_and_backends, result
from tests.fold_parallel.cases import Case, Results, joined, make_row, run
from tests.fold_parallel.test_sharded_routed import routed
from tests.fold_parallel.test_sharded_routed import run as run_routed
from tests.support.distributed import run_distributed

pytest.importorskip("triton")

# One document crosses the border of two shards.
CASE = Case((4, 2), (5, 11), heads=2, key_heads=1, dtype=torch.float32)


def kernels_on_shards(sp: int) -> Results:
    grid, row = create_grid(sp), make_row(CASE)
    tokens = grid.tokens(CASE.seq_len)
    leaves = {"q": row.q[:, tokens], "k": row.k[:, tokens], "v": row.v[:, tokens]}
    leaves["hop_bias"] = row.hop_bias
    leaves = {name: x.to(device()).requires_grad_() for name, x in leaves.items()}
    assert row.rotary is not None
    out = sharded_tensor_attention(
        leaves["q"], leaves["k"], leaves["v"], CASE.fold, grid=grid, hop_bias=leaves["hop_bias"],
        doc_start=row.doc_start[:, tokens].to(device()),
        rotary=type(row.rotary)(*(x.to(device()) for x in row.rotary)), backend="triton",
    )  # fmt: skip
    cotangent = row.cotangent[:, tokens].to(device())
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    named = zip(leaves, gradients, strict=True)
    return {"out": result(out)} | {f"d{name}": result(x) for name, x in named}


@ranks_and_backends(2)
def test_kernels_on_shards_equal_the_whole_row(world_size: int, backend: str) -> None:
    if backend == "gloo" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("compiled kernels take no CPU tensors (interpreted ones do)")
    ours = joined(run_distributed(kernels_on_shards, world_size, world_size, backend=backend))
    check(ours, run(CASE, make_row(CASE), Grid(), torch.device("cpu")))


# A tile of open blocks, and a block, cross the border of two shards.
ROUTED = routed(
    Case((), (5, 43), heads=2, key_heads=1, dtype=torch.float32), 16, 16, 1, 2, 8
)  # fmt: skip


def routed_kernels_on_shards(sp: int) -> Results:
    return run_routed(ROUTED, create_grid(sp), device(), backend="triton")


@ranks_and_backends(2)
def test_routed_kernels_on_shards_equal_the_whole_row(world_size: int, backend: str) -> None:
    if backend == "gloo" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("compiled kernels take no CPU tensors (interpreted ones do)")
    parts = run_distributed(routed_kernels_on_shards, world_size, world_size, backend=backend)
    check(joined(parts), run_routed(ROUTED, None, torch.device("cpu")))


def check(ours: Results, whole: Results) -> None:
    """The same results, to rounding."""
    assert ours.keys() == whole.keys()
    for name, x in whole.items():
        error = (ours[name] - x).abs().max() / x.abs().max()
        # A few roundings of float32 on each side.
        assert error <= 16 * torch.finfo(torch.float32).eps, f"{name}: relative error {error:.1e}"
