"""Decoding speed on one device after a long prompt, compared with stock Llama with SDPA.

Both models have the shape and dtype of the configuration, and random weights. The prompt is one
forward pass that fills the cache. Then a plain loop generates one token at a time, greedily, which
leaves out the overhead of `generate`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tensorlm.config import Config
from tensorlm.hf.cache_tensorlm import FoldCache
from tensorlm.hf.configuration_tensorlm import TensorLMConfig
from tensorlm.hf.export_folder import hf_config
from tensorlm.hf.llama_config import needs_code
from tensorlm.hf.modeling_tensorlm import TensorLMForCausalLM
from tensorlm.runtime.errors import UserError

from .device import find_device, now, release_memory
from .train_methods import shape_of

METHODS = ("tensorlm", "huggingface")
_WARM_UP = 4  # number of tokens before timing starts


class DecodeMeasurement(NamedTuple):
    """One method after a prompt of `length` tokens; NaN if it does not fit.

    `cache_gib` is the memory that stays allocated after the prompt, `memory_gib` the peak of prompt
    and decoding, weights included. Both are NaN on a CPU.
    """

    method: str
    length: int
    prefill_seconds: float
    tokens_per_second: float
    cache_gib: float
    memory_gib: float


def measure(
    config: Config, lengths: Sequence[int], methods: Sequence[str], new_tokens: int
) -> Iterator[DecodeMeasurement]:
    """Measure each method after prompts of each length.

    Args:
        config: configuration with the model's shape, layers and dtype.
        lengths: prompt lengths in tokens.
        methods: names in `METHODS`.
        new_tokens: number of tokens to time.

    Raises:
        UserError: all layers of the configuration have full attention.
    """
    if not needs_code(config.model):
        raise UserError(
            "model: must have window, strided or routed layers, got only full attention (set "
            "model.fold, or model.window and model.route)"
        )
    device = find_device()
    for method in methods:
        model = build(config, method, max(lengths) + new_tokens + _WARM_UP, device)
        for length in lengths:
            yield _measure(model, method, length, new_tokens, device)
        del model
        release_memory()


def build(config: Config, method: str, longest: int, device: torch.device) -> LlamaForCausalLM:
    """Build the model of one method, for positions up to `longest`."""
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    torch.manual_seed(config.run.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            if method == "tensorlm":
                shape = hf_config(config.model, longest, "fp32")
                model: LlamaForCausalLM = TensorLMForCausalLM(TensorLMConfig(**shape))
            else:
                shape = hf_config(shape_of(config.model, "full"), longest, "fp32")
                model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(before)
    return model.eval()


@torch.no_grad()
def _measure(
    model: Any, method: str, length: int, new_tokens: int, device: torch.device
) -> DecodeMeasurement:
    """Measure one method at one length; the first prompt compiles kernels and is not timed."""
    tokens = torch.randint(model.config.vocab_size, (1, length), device=device)
    on_gpu = device.type == "cuda"
    cache: Any = None
    out: Any = None
    try:
        for _ in range(2 if on_gpu else 1):
            cache = out = None  # free the first pass, to measure what the second one keeps
            release_memory()
            before = torch.cuda.memory_allocated() if on_gpu else math.nan
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            cache = (
                FoldCache(model.config, expected=length + new_tokens + _WARM_UP)
                if method == "tensorlm"
                else DynamicCache()
            )
            started = now(device)
            out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            prefill = now(device) - started
        held = (torch.cuda.memory_allocated() - before) / 2**30 if on_gpu else math.nan
        for step in range(_WARM_UP + new_tokens):
            if step == _WARM_UP:
                started = now(device)
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=cache, use_cache=True)
        seconds = now(device) - started
    except torch.OutOfMemoryError:
        return DecodeMeasurement(method, length, *[math.nan] * 4)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else math.nan
    return DecodeMeasurement(method, length, prefill, new_tokens / seconds, held, peak)


def format_table(rows: Sequence[DecodeMeasurement]) -> str:
    """A Markdown table, with the speed relative to stock Llama after the same prompt."""
    theirs = {row.length: row.tokens_per_second for row in rows if row.method == "huggingface"}
    lines = [
        "| prompt tokens | method | prompt s | tokens/s | cache GiB | peak GiB | vs Llama |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.length, METHODS.index(row.method))):
        ratio = row.tokens_per_second / theirs.get(row.length, math.nan)
        lines.append(
            f"| {row.length:,} | {row.method} | {row.prefill_seconds:.2f} "
            f"| {row.tokens_per_second:.1f} | {row.cache_gib:.2f} | {row.memory_gib:.2f} "
            f"| {ratio:.2f} |"
        )
    return "\n".join(lines)
