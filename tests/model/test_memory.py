"""What saves memory: the same losses and gradients, and less of it."""

import sys
import threading
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorlm.benchmarks.accounting import PeakMemory
from tensorlm.config import ModelConfig
from tensorlm.model import Llama
from tensorlm.model.layers import SwiGLU
from tensorlm.model.offload import EXACT_FROM, host_buffer
from tensorlm.model.output_head import OutputHead

LAYERS = 4


def small(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 160, "num_layers": LAYERS,
        "num_heads": 4, "num_kv_heads": 2, "fold": (8,),
    }  # fmt: skip
    return ModelConfig.model_validate({**shape, **changes})


def build(config: ModelConfig, **options: Any) -> Llama:
    model = Llama(config, **options).double()
    model.init_weights(seed=3)
    return model


def batch(length: int = 64) -> tuple[Tensor, None, Tensor]:
    tokens, labels = torch.randint(97, (2, 2, length), generator=torch.Generator().manual_seed(1))
    return tokens, None, labels


def train_twice(model: Llama) -> tuple[float, list[Tensor | None]]:
    """Loss and gradients of two micro-batches, after a pass without gradients."""
    with torch.no_grad():
        model(*batch())
    for length in (64, 32):
        loss = model(*batch(length))
        (loss * 0.3).backward()
    return loss.item(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "block"},
        {"recompute": "block", "activation_offload": True},
        {"mlp_chunk": 24},
        {"recompute": "selective"},
        {"recompute": "selective", "activation_offload": True, "mlp_chunk": 24},
        {"recompute": "block", "mlp_chunk": 24, "loss_chunk": 40},
        {"recompute": "block", "activation_offload": True, "mlp_chunk": 1},
        {"recompute": "block", "recompute_interval": 2},
        {"recompute": "block", "recompute_interval": 3, "activation_offload": True},
        {"recompute": "block", "recompute_interval": 9, "mlp_chunk": 24},
    ],
    ids=lambda options: " ".join(options),
)
def test_saving_memory_changes_no_gradient(options: dict[str, Any], tied: bool) -> None:
    config = small(tie_embeddings=tied)
    expected, gradients = train_twice(build(config))
    loss, found = train_twice(build(config, **options))
    assert loss == pytest.approx(expected, rel=1e-13)
    for ours, plain in zip(found, gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_hidden_states_leave_the_device_until_backward(offload: bool, interval: int) -> None:
    model = build(
        small(), recompute="block", recompute_interval=interval, activation_offload=offload
    )
    inputs: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    for block in model.layers:
        block.register_forward_pre_hook(lambda _, args: inputs.add(args[0].untyped_storage()))
    loss = model(*batch())
    groups = -(-LAYERS // interval)
    assert len(inputs) == (1 if offload else groups)  # backward begins with the last one
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, len(inputs))

    for module in model.modules():
        if isinstance(module, SwiGLU):
            module.register_forward_pre_hook(count)
    loss.backward()
    # While a block is recomputed: what groups have kept, and what has been found again.
    kept = [1 if offload else index // interval + 1 for index in range(LAYERS)]
    assert most == max(kept[index] + index % interval for index in range(LAYERS))
    assert not inputs


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_an_interval_runs_all_but_the_last_block_of_a_group_again(interval: int) -> None:
    gradients, runs = [], [0] * LAYERS

    def count(index: int, *_: Any) -> None:
        runs[index] += 1

    for every in (1, interval):
        model = Llama(small(), recompute="block", recompute_interval=every)
        model.init_weights(seed=3)
        for index, block in enumerate(model.layers):
            block.register_forward_pre_hook(partial(count, index))
        loss = model(*batch())
        runs[:] = [0] * LAYERS
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    last = [index for index in range(LAYERS) if (index + 1) % interval == 0 or index == LAYERS - 1]
    assert runs == [1 if index in last else 2 for index in range(LAYERS)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("interval", [1, 3])
def test_host_buffers_are_used_again(interval: int) -> None:
    groups = -(-LAYERS // interval)
    model = build(small(), recompute="block", recompute_interval=interval, activation_offload=True)
    assert model.offload is not None
    free = model.offload.free_buffers
    loss = model(*batch())
    loss.backward()  # a loss that is still there holds no buffer
    first = {buffer.data_ptr() for buffer in free}
    assert len(first) == groups
    model(*batch())  # its backward never comes
    model(*batch()).backward()
    assert {buffer.data_ptr() for buffer in free} == first
    model(*batch(32)).backward()  # rows of another phase
    assert [buffer.shape for buffer in free] == [(2, 32, 48)] * groups


def peak_of(module: torch.nn.Module, *inputs: Any) -> int:
    with PeakMemory() as memory:
        module(*inputs).sum().backward()
    return memory.peak


def test_no_tensor_that_another_thread_frees_is_missed() -> None:
    memory, interval = PeakMemory(), sys.getswitchinterval()
    with memory:
        given = [torch.empty(25) for _ in range(20_000)]
    own = [torch.empty(25).untyped_storage() for _ in range(20_000)]

    def free() -> None:
        while given:
            given.pop()

    other = threading.Thread(target=free)
    sys.setswitchinterval(1e-6)
    try:
        other.start()
        for storage in own:
            memory._count(storage)
        other.join()
    finally:
        sys.setswitchinterval(interval)
    assert memory.live == 100 * len(own)


def test_tiles_of_the_mlp_take_the_memory_of_one_tile() -> None:
    config = small(intermediate_size=1000)
    x = torch.randn(1, 4096, 48, requires_grad=True)
    whole, tiled = (peak_of(SwiGLU(config, chunk), x) for chunk in (0, 256))
    weights = 3 * 4 * 48 * 1000
    assert whole > 6 * 4096 * 1000 * 4
    # Input and output, their gradients; those of the weights, twice; 8 intermediates of a tile.
    assert tiled < 5 * x.nbytes + 3 * weights + 8 * 256 * 1000 * 4


def test_chunks_of_the_head_take_the_memory_of_one_chunk() -> None:
    head, hidden = OutputHead(48, 5000), torch.randn(1024, 48, requires_grad=True)
    labels = torch.randint(5000, (1024,))
    whole, chunked = (peak_of(head, hidden, labels, chunk) for chunk in (0, 64))
    assert whole > 2 * 1024 * 5000 * 4
    assert chunked < 3 * 64 * 5000 * 4 + 3 * head.weight.nbytes + 2 * hidden.nbytes


@pytest.mark.parametrize("part", ["head", "mlp"])
def test_gradients_in_bf16_are_no_worse_for_many_chunks(part: str) -> None:
    x = torch.randn(512, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    labels = torch.arange(512) % 97
    layer = OutputHead(48, 97) if part == "head" else SwiGLU(small())
    exact, few, many = (
        gradients(layer, dtype, x, labels, chunk)
        for dtype, chunk in ((torch.float64, 256), (torch.bfloat16, 256), (torch.bfloat16, 4))
    )
    for weight, found in enumerate(many):
        error = (found - exact[weight]).norm()
        assert 0 < error < 1.5 * (few[weight] - exact[weight]).norm()


def gradients(
    layer: OutputHead | SwiGLU, dtype: torch.dtype, x: Tensor, labels: Tensor, chunk: int
) -> list[Tensor]:
    """Of a sum of losses with respect to all weights, which are rounded to bf16 before."""
    layer = layer.bfloat16().to(dtype)
    layer.zero_grad()
    if isinstance(layer, OutputHead):
        loss = layer(x.to(dtype), labels, chunk)
    else:
        layer.chunk = chunk
        loss = layer(x.to(dtype)).double().square().sum()
    loss.backward()
    return [p.grad.double() for p in layer.parameters() if p.grad is not None]


@pytest.mark.gpu
def test_offload_on_a_gpu_changes_the_peak_and_nothing_else() -> None:
    config = small(hidden_size=1024, num_heads=8, intermediate_size=1024, num_layers=12, fold=(64,))
    inputs = [torch.randint(97, (1, 32768), device="cuda") for _ in range(4)]
    gradients, peaks = [], []
    for offload, interval in ((False, 1), (True, 1), (True, 3)):
        model = Llama(
            config, recompute="block", recompute_interval=interval, activation_offload=offload
        )
        model.init_weights(seed=3)
        model = model.to("cuda", torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        for tokens in inputs:  # no synchronization between them
            model(tokens, None, tokens).backward()
        gradients.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
        peaks.append(torch.cuda.max_memory_allocated())
        if model.offload:
            assert len(model.offload.free_buffers) == 12 // interval
        del model
    for plain, *others in zip(*gradients, strict=True):
        assert all(torch.equal(plain, other) for other in others)
    hidden_state = 32768 * 1024 * 2
    assert hidden_state >= EXACT_FROM
    assert max(peaks[1:]) < peaks[0] - 8 * hidden_state


def test_a_buffer_is_unpinned_after_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Runtime:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802 (CUDA's name)
            calls.append("pin")
            return 0

        def cudaHostUnregister(self, *_: int) -> None:  # noqa: N802
            calls.append("unpin")

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(f"wait {device}"))
    like: Any = SimpleNamespace(
        is_cuda=True, nbytes=EXACT_FROM, shape=(EXACT_FROM,), dtype=torch.uint8, device="cuda:1"
    )
    buffer = host_buffer(like)
    assert calls == ["pin"]
    del buffer
    assert calls == ["pin", "wait cuda:1", "unpin"]


@pytest.mark.gpu
def test_a_dropped_buffer_waits_for_its_copy() -> None:
    x = torch.ones(EXACT_FROM, dtype=torch.uint8, device="cuda")
    buffer = host_buffer(x)
    torch.cuda._sleep(500_000_000)
    buffer.copy_(x, non_blocking=True)
    done = torch.cuda.current_stream().record_event()
    assert not done.query()
    del buffer
    assert done.query()
