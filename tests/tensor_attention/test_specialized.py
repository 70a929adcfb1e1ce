"""The warp-specialized kernels of Hopper against the general ones: the same bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tensor_attention.gpu import launch, tiles
from tensor_attention.gpu.backward_query import QueryGradients, backward_queries
from tensor_attention.gpu.forward import hop_forward
from tensor_attention.gpu.launch import Hop, Tiles
from tensor_attention.gpu.routed_backward import query_gradients
from tensor_attention.gpu.routed_choice import (
    choose,
    mean_keys,
    rotate_stretched,
    summed_queries,
    write_choice,
)
from tensor_attention.gpu.routed_forward import routed_forward
from tensor_attention.gpu.routed_launch import Routed, starts_of
from tensor_attention.gpu.routed_lists import TileLists, tile_lists
from tensor_attention.gpu.routed_tiles import (
    backward_query_launch,
    backward_query_stages,
    forward_launch,
    forward_stages,
    has_choice_ring,
)
from tensor_attention.gpu.tiles import (
    backward_query_ring,
    backward_query_tiles,
    forward_ring,
    forward_tiles,
)
from tensor_attention.routing import num_parts
from tests.tensor_attention.cases import poisoned_memory, rotary_table

pytest.importorskip("triton")

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def window_hop(
    batch: int, num_tokens: int, heads: int, key_heads: int, window: int, mean: int = 0
) -> Hop:  # fmt: skip
    """A random window hop of heads of 128; `mean` tokens a document (0: one document)."""
    device = "cuda" if HOPPER else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, num_tokens, n, 128, generator=generator).to(device, torch.bfloat16)
        for n in (heads, key_heads, key_heads)
    )
    begins = torch.rand(batch, num_tokens, generator=generator) * mean < 1 if mean else None
    token = torch.arange(num_tokens).expand(batch, -1)
    starts = torch.zeros_like(token) if begins is None else token * begins
    reach = (token - starts.cummax(1).values).to(torch.int32)
    reach[:, 7::50] = -1  # a few tokens see nothing
    cos, sin = (x.float().to(device) for x in rotary_table(num_tokens, 128))
    reach = reach.to(device)
    return Hop(q, k, v, reach, None, None, None, cos, sin, 1, window, 128**-0.5)


def results(hop: Hop) -> tuple[Tensor, Tensor]:
    batch, num_tokens, heads, _ = hop.q.shape
    return torch.empty_like(hop.q), hop.q.new_empty(batch, heads, num_tokens, dtype=torch.float32)


CASES = {
    "one document": {"batch": 1, "num_tokens": 3001, "heads": 8, "key_heads": 2, "window": 1024},
    "two rows": {"batch": 2, "num_tokens": 1024, "heads": 8, "key_heads": 2, "window": 300},
    "documents": {
        "batch": 1, "num_tokens": 2500, "heads": 8, "key_heads": 2, "window": 500, "mean": 90,
    },
    "eight query heads": {"batch": 1, "num_tokens": 700, "heads": 8, "key_heads": 1, "window": 512},
    "open window": {"batch": 1, "num_tokens": 4100, "heads": 4, "key_heads": 1, "window": 4100},
    "few tokens": {"batch": 1, "num_tokens": 257, "heads": 4, "key_heads": 1, "window": 257},
}  # fmt: skip


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_has_the_bits_of_the_general_kernel(case: dict[str, int]) -> None:
    hop = window_hop(**case)
    assert forward_ring(hop) is not None
    with poisoned_memory():
        general, specialized = results(hop), results(hop)
        hop_forward(hop, *general, forward_tiles(hop))
        hop_forward(hop, *specialized)
        again = results(hop)
        hop_forward(hop, *again)
    assert all(torch.equal(x, y) for x, y in zip(general, specialized, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(again, specialized, strict=True))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "accumulate"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_query_gradient_has_the_bits_of_the_general_kernel(
    case: dict[str, int], accumulate: bool
) -> None:
    hop = window_hop(**case)
    assert backward_query_ring(hop) is not None
    z, lse = results(hop)
    hop_forward(hop, z, lse)
    generator = torch.Generator("cuda").manual_seed(1)
    dz = torch.randn(z.shape, generator=generator, device="cuda").to(z.dtype)
    dlse = torch.randn(lse.shape, generator=generator, device="cuda") if accumulate else None
    keys = hop.rotated(hop.k, True)

    def gradients(tiles: Tiles | None, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """dq and delta; with `delta`, the kernel reads it instead of z."""
        dq = torch.ones_like(z) if accumulate else torch.full_like(z, float("nan"))
        given = torch.full_like(lse, float("nan")) if delta is None else delta.clone()
        backward_queries(
            hop, z if delta is None else None, lse, dz, dlse, dq,
            QueryGradients(given, None, None), keys=keys, accumulate=accumulate, dz_before=None,
            tiles=tiles,
        )  # fmt: skip
        return dq, given

    with poisoned_memory():
        dq, delta = gradients(backward_query_tiles(hop))
        for found in (gradients(None), gradients(None), gradients(None, delta)):
            assert torch.equal(found[0], dq)
            assert torch.equal(found[1], delta)


@pytest.mark.parametrize(
    "change",
    [
        {"length": 200},  # so few keys that they are rotated on load
        {"bias": torch.zeros(8)},
        {"cos": None, "sin": None},
        {"q": torch.zeros(1, 600, 6, 128, dtype=torch.bfloat16)},  # three query heads a key head
        {"lse_before": torch.zeros(1, 8, 600)},
        {"stride": 2},
    ],
    ids=lambda change: ",".join(change),
)
def test_other_hops_take_the_general_kernels(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "is_interpreted", lambda: False)
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    hop = window_hop(1, 600, 8, 2, 512)
    assert forward_ring(hop) == (64, 5, 4)
    assert backward_query_ring(hop) == (64, 5, 4)
    assert forward_ring(hop._replace(**change)) is None
    assert backward_query_ring(hop._replace(**change)) is None
    assert forward_ring(hop._replace(q=hop.q.half())) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert forward_ring(hop) is None  # its instructions are Hopper's alone


def test_the_interpreter_runs_the_general_kernels() -> None:
    if not HOPPER:
        assert forward_ring(window_hop(1, 600, 8, 2, 512)) is None


def choice_inputs(
    batch: int, num_tokens: int, heads: int, key_heads: int, size: int, mean: int, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and document starts; `quarters` have many equal scores, `ones` only such."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Tensor:
        shape = (batch, num_tokens, n, size)
        if kind == "quarters":
            return torch.randint(-8, 9, shape, generator=generator) / 4
        return torch.ones(shape) if kind == "ones" else torch.randn(shape, generator=generator)

    q, k = (draw(n).to("cuda", torch.bfloat16) for n in (heads, key_heads))
    begins = torch.rand(batch, num_tokens, generator=generator) * mean < 1
    token = torch.arange(num_tokens).expand(batch, -1)
    starts = (token * begins).cummax(1).values if mean else torch.zeros_like(token)
    return q, k, starts.to("cuda", torch.int32)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("sample", [16, 1], ids=["all", "one tile bounds"])
@pytest.mark.parametrize("kind", ["normal", "quarters", "ones"])
@pytest.mark.parametrize(
    ("shape", "route"),
    [
        ((1, 9001, 8, 2, 128, 0), (256, 64, 16, 16, 0)),
        ((2, 5000, 4, 1, 128, 900), (64, 64, 5, 16, 0)),
        ((1, 9001, 3, 3, 64, 0), (128, 32, 32, 8, 4096)),
        ((1, 6000, 8, 2, 128, 0), (128, 32, 1, 32, 1000)),
        ((1, 7001, 8, 2, 128, 3000), (128, 128, 3, 32, 0)),
        ((1, 70, 4, 1, 64, 0), (32, 32, 2, 16, 0)),
        ((1, 1, 4, 1, 128, 0), (64, 64, 16, 16, 0)),
    ],
)
def test_choice_equals_that_of_the_general_kernel(
    shape: tuple[int, int, int, int, int, int], route: tuple[int, int, int, int, int], kind: str,
    sample: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from tensor_attention.gpu import specialized_choice as module

    q, k, starts = choice_inputs(*shape, kind)
    window, block, top_k, pool, first = route
    q = summed_queries(q[:, first:].contiguous(), k.shape[2])
    means = mean_keys(k, starts, block, num_parts(block, pool))
    starts = starts_of(starts, first, q.shape[1])
    general, ours, again = (
        torch.full((*q.shape[:3], top_k + 1), -7, dtype=torch.int32, device="cuda")
        for _ in range(3)
    )
    write_choice(q, means, starts, general, window, block, first)
    assert has_choice_ring(q, top_k, means.shape[2])
    monkeypatch.setattr(module, "SAMPLED_TILES", sample)
    for out in (ours, again):
        with poisoned_memory():
            module.specialized_choice(q, means, starts, out, window, block, first)
    assert torch.equal(ours, again)
    assert torch.equal(ours.sort(-1).values, general.sort(-1).values)


ROUTES = [
    ((1, 5001, 8, 2, 128, 0), 16, 0),
    ((2, 3000, 8, 2, 128, 700), 5, 0),
    ((1, 4100, 4, 1, 128, 0), 32, 2048),
    ((1, 90, 4, 1, 128, 40), 3, 0),
]  # shape of `choice_inputs`, top_k, first


def routed_case(
    shape: tuple[int, int, int, int, int, int], top_k: int, first: int, open_tile: int
) -> tuple[Routed, TileLists, tuple[Tensor, Tensor]]:
    """A random routed hop with its lists, and the state before it."""
    q, k, starts = choice_inputs(*shape, "normal")
    choice = choose(q, k, starts, 256, 64, top_k, 16, 0)[:, max(0, first - open_tile + 1) :]
    q = q[:, first:].contiguous()
    cos, sin = (x.float().to(q.device) for x in rotary_table(shape[1], 128))
    routed = Routed(
        q, k, torch.randn_like(k), choice.contiguous(), starts, cos, sin, 256, 64, 16, open_tile,
        128**-0.5, first,
    )  # fmt: skip
    lse = torch.randn(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    return routed, tile_lists(routed), (torch.randn_like(q), lse)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("open_tile", [1, 16])
@pytest.mark.parametrize(("shape", "top_k", "first"), ROUTES)
def test_routed_forward_has_the_bits_of_the_general_kernel(
    shape: tuple[int, int, int, int, int, int], top_k: int, first: int, open_tile: int
) -> None:
    routed, lists, state = routed_case(shape, top_k, first, open_tile)
    assert forward_stages(routed) is not None
    runs = []
    with poisoned_memory():
        for launch_of in (forward_launch, lambda _: None, lambda _: None):
            z, lse = torch.empty_like(state[0]), torch.empty_like(state[1])
            routed_forward(routed, lists, *state, z, lse, launch_of(routed))
            runs.append((z, lse))
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("open_tile", [1, 16])
@pytest.mark.parametrize(("shape", "top_k", "first"), ROUTES)
def test_routed_query_gradient_has_the_bits_of_the_general_kernel(
    shape: tuple[int, int, int, int, int, int], top_k: int, first: int, open_tile: int
) -> None:
    routed, lists, (z, lse) = routed_case(shape, top_k, first, open_tile)
    assert backward_query_stages(routed) is not None
    state = (torch.empty_like(z), torch.empty_like(lse), z, lse)
    routed_forward(routed, lists, z, lse, *state[:2])
    k = rotate_stretched(routed.k, routed.cos, routed.sin, routed.doc_start, routed.stretch)
    dz, dlse = torch.randn_like(z), torch.randn_like(lse) if open_tile == 1 else None
    runs = []
    with poisoned_memory():
        for launch_of in (backward_query_launch, lambda _: None, lambda _: None):
            outputs = (
                torch.empty_like(z), torch.empty_like(lse), torch.empty_like(z),
                torch.empty_like(lse),
            )  # fmt: skip
            query_gradients(routed, lists, k, state, dz, dlse, outputs, launch_of(routed))
            runs.append(outputs)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))
