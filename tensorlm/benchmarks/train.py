"""Forward and backward of a whole model on one device, by kind of attention (`train_methods.py`).

All methods train the same decoder shape on one document of random tokens (in runs of equal ones),
in the configuration's dtype. Memory settings (recomputation, offload, tiles, fused layers) are
those of the configuration; `huggingface` recomputes its layers, and runs Liger's layers and loss
unless `train.fused_layers` is "torch" or Liger is not installed. The optimizer is left out:
its cost does not depend on the length, and with it fewer layers would fit.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fold_parallel import Grid
from tensor_attention import Rotary, apply_rotary
from tensorlm.config import Config
from tensorlm.hf.export_folder import hf_config
from tensorlm.model import Block, create_llama
from tensorlm.model.attention import Attention, KeptChoice
from tensorlm.model.float8 import apply_linears
from tensorlm.model.flops import num_parameters, peak_flops, train_flops
from tensorlm.model.fused import runs_liger
from tensorlm.plan.planning import longest

from .device import find_device, now, release_memory
from .train_methods import METHODS, OpenBlocks, draw_tokens, shape_of


class TrainMeasurement(NamedTuple):
    """One method at one length; NaN if it does not fit.

    `mfu` is the rate of the method's own model FLOPs (without recomputation) / the data sheet's
    peak. `memory_gib` is the peak of allocated memory, weights and their gradients included.
    `open_blocks` is `OpenBlocks.ratio` of a routed model, on which its time depends; NaN for other
    models.
    """

    method: str
    length: int
    parameters: int
    seconds: float
    tokens_per_second: float
    mfu: float
    memory_gib: float
    open_blocks: float


class SdpaAttention(nn.Module):
    """PyTorch's full attention (cuDNN on GPUs) with the weights of an `Attention` layer.

    It supports only one document and one rank.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, x: Tensor, doc_start: Tensor, rotary: Rotary, kept: KeptChoice | None = None
    ) -> Tensor:
        own = self.attention
        projections = apply_linears(x, (own.q_proj, own.k_proj, own.v_proj), own.linear)
        q, k, v = (part.unflatten(-1, (-1, own.head_dim)) for part in projections)
        position = torch.arange(x.shape[1], device=x.device)
        q, k = apply_rotary(q, rotary, position), apply_rotary(k, rotary, position)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if x.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                is_causal=True, enable_gqa=True,
            )  # fmt: skip
        return apply_linears(out.transpose(1, 2).flatten(-2), (own.o_proj,), own.linear)[0]


def measure(
    config: Config, lengths: Sequence[int], methods: Sequence[str], repeats: int
) -> Iterator[TrainMeasurement]:
    """Measure every method at every length, on the GPU if there is one; yields each result."""
    device = find_device()
    peak = peak_flops(device)
    for method in methods:
        model = build(config, method, max(lengths), device)
        counted = shape_of(config.model, method)
        for length in lengths:
            seconds, memory, opened = _time_step(model, method, config, length, repeats, device)
            flops = train_flops(counted, torch.arange(length)[None])
            yield TrainMeasurement(
                method, length, num_parameters(model), seconds, length / seconds,
                flops / seconds / peak, memory, opened,
            )  # fmt: skip
        del model
        release_memory()


def measure_longest(config: Config, method: str) -> int:
    """Tokens of the longest document on which one method can train, to 1/32 of it."""
    device = find_device()
    model = build(config, method, 2**20, device)

    def fits(length: int) -> bool:
        return not math.isnan(_time_step(model, method, config, length, 0, device)[0])

    return longest(fits, config.model.window_size or 1024, precision=32)


def build(config: Config, method: str, longest: int, device: torch.device) -> nn.Module:
    """Build the model of one method, in the dtype of training, in training mode."""
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    if method == "huggingface":
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = hf_config(shape_of(config.model, method), longest, "fp32")
        with device:
            theirs = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).to(dtype)
        if runs_liger(config.train.fused_layers, device.type == "cuda"):
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=theirs)
        theirs.gradient_checkpointing_enable()
        return theirs.train()
    settings = config.train
    if settings.recompute == "auto":
        settings = settings.model_copy(update={"recompute": "block"})
    # Use PyTorch's initial weights: `init_weights` of billions takes many seconds.
    model = create_llama(shape_of(config.model, method), settings, Grid(), device)
    if method == "full":
        for block in model.layers:
            assert isinstance(block, Block)
            block.self_attn = SdpaAttention(block.self_attn)  # type: ignore[assignment]
    return model


def _time_step(
    model: nn.Module, method: str, config: Config, length: int, repeats: int, device: torch.device
) -> tuple[float, float, float]:
    """(median seconds, peak GiB, `OpenBlocks.ratio`) of forward and backward; NaN if out of memory.

    The first step compiles kernels, and is timed only if `repeats` is 0.
    """
    tokens = draw_tokens(config.model.vocab_size, length, device)
    release_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    opened = math.nan
    try:
        for _ in range(repeats + 1):
            started = now(device)
            if method == "huggingface":
                loss = model(tokens, labels=tokens, use_cache=False).loss
            else:
                with nullcontext() if times else OpenBlocks(model) as blocks:
                    loss = model(tokens, None, tokens) / length
                opened = blocks.ratio if blocks else opened
            loss.backward()
            del loss  # frees the graph, whose buffers the next step reuses
            model.zero_grad()
            times.append(now(device) - started)
    except torch.OutOfMemoryError:
        model.zero_grad()
        return math.nan, math.nan, math.nan
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else math.nan
    return statistics.median(times[1:] or times), memory, opened


def format_table(rows: Sequence[TrainMeasurement]) -> str:
    """A Markdown table, with the speed relative to full attention at the same length."""
    full = {row.length: row.tokens_per_second for row in rows if row.method == "full"}
    lines = [
        "| tokens | method | parameters | seconds | tokens/s | MFU | peak GiB | vs full | open |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.length, METHODS.index(row.method))):
        ratio = row.tokens_per_second / full.get(row.length, math.nan)
        lines.append(
            f"| {row.length:,} | {row.method} | {row.parameters:,} | {row.seconds:.3f} "
            f"| {row.tokens_per_second:,.0f} | {row.mfu:.1%} | {row.memory_gib:.2f} | {ratio:.2f} "
            f"| {row.open_blocks:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[TrainMeasurement], path: str) -> None:
    """Plot tokens per second and peak memory against length, one line per method (PNG)."""
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.5))
    for method in dict.fromkeys(row.method for row in rows):
        points = sorted(
            (row.length, row.tokens_per_second, row.memory_gib)
            for row in rows
            if row.method == method and not math.isnan(row.seconds)
        )
        lengths, speeds, peaks = zip(*points, strict=True) if points else ((), (), ())
        speed.plot(lengths, speeds, marker="o", label=method)
        memory.plot(lengths, peaks, marker="o", label=method)
    speed.set(xscale="log", xlabel="tokens", ylabel="tokens per second", ylim=(0, None))
    memory.set(xscale="log", xlabel="tokens", ylabel="peak memory in GiB")
    for axes in (speed, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
