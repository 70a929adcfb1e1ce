"""Floating-point operations of the model, counted for its layers and the actual documents."""

import functools
import re
import time

import torch
from torch import Tensor

from tensor_attention import fold_axes
from tensor_attention.routing import num_parts
from tensorlm.config import LayerKind, ModelConfig, Recompute

# Dense bf16 FLOP/s by the words of a device's name, from vendors' data sheets, without sparsity.
# The first entry whose words are all in the name counts, so variants come before their base models.
GPU_PEAKS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12,
    "H200 NVL": 835e12, "H200": 989e12,
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "MI300X": 1307e12,
}  # fmt: skip
# Words that turn a known name into another device: a slice of it, or a smaller chip.
_OTHER_DEVICES = {"mig", "laptop", "d"}


def linear_flops_per_token(config: ModelConfig) -> int:
    """Forward FLOPs of all matrix products with weights, for one token (2 per weight)."""
    head = 2 * config.hidden_size * config.vocab_size
    return config.num_layers * layer_flops_per_token(config) + head


def layer_flops_per_token(config: ModelConfig) -> int:
    """The part of `linear_flops_per_token` of one layer."""
    c, d = config.hidden_size, config.head_size
    attention = c * d * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = 3 * c * config.intermediate_size
    return 2 * (attention + mlp)


def attention_flops(config: ModelConfig, depth: Tensor) -> int:
    """Forward FLOPs of all attention layers; the choice of blocks is counted in `choice_flops`.

    Each visited (query, key) pair costs 2 D for the score and 2 D for the value, per query head.

    Args:
        config: shape of the model.
        depth: [...] integer, number of earlier tokens in each token's document.
    """
    pairs = {kind: layer_pairs(config, kind, depth) for kind in set(config.layer_kinds)}
    per_pair = 4 * config.num_heads * config.head_size
    return sum(per_pair * pairs[kind] for kind in config.layer_kinds)


def choice_flops(config: ModelConfig, depth: Tensor) -> int:
    """Forward FLOPs of choosing blocks in all routed layers; the choice has no backward pass.

    A score is the dot product of the sum of a group's queries and a mean key, of `pool` tokens of a
    block: 2 D per key head.
    """
    if config.route is None or config.route.choice == "random":
        return 0
    window, block = config.window_size, config.route.block
    # Candidates are the blocks that begin before the window, except the document's first.
    scores = int(((depth - window).clamp(min=0) // block).sum())
    scores *= num_parts(block, config.route.pool)
    layers = config.layer_kinds.count("routed")
    return 2 * config.num_kv_heads * config.head_size * scores * layers


def layer_pairs(config: ModelConfig, kind: LayerKind, depth: Tensor) -> int:
    """Number of (query, key) pairs that one layer of this kind visits.

    A routed layer reads its window and top_k + 1 blocks, or the whole past if that is less. The
    newest block may reach into the window: a token that chooses it visits up to block - 1 pairs
    fewer. They count, since they are computed. Blocks opened by earlier tokens of a tile do not
    count.
    """
    match kind:
        case "full":
            return attention_pairs((), depth)
        case "strided":
            return attention_pairs(config.fold, depth)
        case "window":
            return int((depth + 1).clamp(max=config.window_size).sum())
        case "routed":
            assert config.route is not None
            most = config.window_size + (config.route.top_k + 1) * config.route.block
            return int((depth + 1).clamp(max=most).sum())


def attention_pairs(fold: tuple[int, ...], depth: Tensor) -> int:
    """Number of (query, key) pairs of a fold's hops: each hop's length, cut at the document."""
    total = depth.numel()  # every token visits itself, once
    if not total:
        return 0
    for axis in fold_axes(fold, int(depth.max()) + 1):
        total += int((depth // axis.stride).clamp(max=axis.length - 1).sum())
    return total


def train_flops(config: ModelConfig, depth: Tensor) -> int:
    """Model FLOPs of forward and backward, without recomputation.

    Args:
        config: shape of the model.
        depth: [...] integer, number of earlier tokens in each counted token's document.
    """
    forward = linear_flops_per_token(config) * depth.numel()
    return 3 * (forward + attention_flops(config, depth)) + choice_flops(config, depth)


def recomputed_flops(
    config: ModelConfig, depth: Tensor, recompute: Recompute, mlp_chunk: int = 0, interval: int = 1
) -> int:
    """FLOPs of recomputation in the backward pass; other arguments as in `train_flops`.

    With "block", each layer is recomputed except for its last product and the choice of blocks,
    which is kept; tiling the MLP adds nothing. With "attention", of attention only the windows of
    routed layers are recomputed, if it runs on the GPU's kernels. Otherwise, only the first two
    products of a tiled MLP are recomputed. `repeated_kinds` run once more.
    """
    is_tiled = 0 < mlp_chunk < depth.numel()
    linear = recomputed_linear_flops_per_token(config, recompute, is_tiled)
    attention = 0
    if recompute == "block":
        attention = attention_flops(config, depth)
    elif recompute == "attention" and "routed" in config.layer_kinds:
        pairs = layer_pairs(config, "window", depth)
        attention = 4 * config.num_heads * config.head_size * pairs
        attention *= config.layer_kinds.count("routed")
    per_pair = 4 * config.num_heads * config.head_size
    again = repeated_kinds(config, interval)
    attention += sum(per_pair * layer_pairs(config, kind, depth) for kind in again)
    linear += len(again) * layer_flops_per_token(config)
    return linear * depth.numel() + attention


def repeated_kinds(config: ModelConfig, interval: int) -> list[LayerKind]:
    """Kinds of the layers that run again, whole, to find the inputs of those after them.

    Only every `interval`-th layer has kept its input: all but the last of its group run again.
    """
    kinds = config.layer_kinds[:-1]
    return [kind for number, kind in enumerate(kinds, start=1) if number % interval]


def recomputed_linear_flops_per_token(
    config: ModelConfig, recompute: Recompute, is_tiled: bool
) -> int:
    """The part of `recomputed_flops` in matrix products with weights, for one token."""
    product = 2 * config.num_layers * config.hidden_size * config.intermediate_size
    if recompute not in ("block", "attention"):
        return 2 * product if is_tiled else 0
    head = 2 * config.hidden_size * config.vocab_size
    return linear_flops_per_token(config) - head - product


def num_parameters(model: torch.nn.Module) -> int:
    """Number of distinct parameters over all ranks; tied weights count once."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of one device: bf16 from the data sheet of known GPUs, else measured here."""
    if device.type == "cuda":
        peak = sheet_peak(torch.cuda.get_device_name(device))
        return peak or _measured_flops(device, torch.bfloat16, size=8192)
    return _measured_flops(device, torch.float32, size=1024)


def sheet_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU that CUDA calls `name`; None if it is not in GPU_PEAKS."""
    board = find_board(name)
    return GPU_PEAKS[board] if board else None


def find_board(name: str) -> str | None:
    """The entry of GPU_PEAKS that CUDA calls `name`, or None."""
    words = _words(name)
    if words & _OTHER_DEVICES:
        return None
    return next((board for board in GPU_PEAKS if words >= _words(board)), None)


def _words(name: str) -> set[str]:
    return set(re.split(r"[\s-]+", name.lower()))


@functools.cache
def _measured_flops(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few matrix products [size, size], for unknown devices.

    GPUs train in bf16 and need a large product to be busy; CPUs are measured in float32.
    """
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # on a GPU the first one loads the kernel
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for it
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
