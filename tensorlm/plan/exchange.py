"""What one shared layer would take on 8 to 1,024 GPUs, from link bandwidths and a compute rate.

The formula is in docs/sequence_parallelism.md, and so are the measurements of two GPUs that the
rates inside a node come from; what it gives for more GPUs is measured nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fold_parallel import layer_traffic, routed_traffic
from tensorlm.config import Config
from tensorlm.model.flops import layer_pairs, linear_flops_per_token

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Machine:
    """What one GPU is assumed to reach; bandwidths are one way.

    Those marked so were measured on two H200, 65,536 tokens of Llama-8B on each.
    """

    gpus_per_node: int = 8
    nvlink: float = 200e9  # bytes/s of a swap, packing included (measured; NVLink 4 itself: 450)
    network: float = 40e9  # bytes/s: 80 % of 400 Gbit/s per GPU
    latency: float = 2e-6  # seconds per message
    flops: float = 570e12  # FLOP/s of a layer that exchanges nothing (measured; peak: 989 in bf16)
    overlap: float = 0.45  # of what hop 1 could hide of the swap of q and k (measured)


class Projection(NamedTuple):
    """Of one layer, forward and backward, per GPU."""

    gpus: int
    seq_len: int
    sent_bytes: float
    network_bytes: float
    compute_seconds: float
    exchange_seconds: float
    exposed_seconds: float

    @property
    def efficiency(self) -> float:
        """Share of the time in which the GPU computes."""
        return self.compute_seconds / (self.compute_seconds + self.exposed_seconds)


def project(config: Config, gpus: int, machine: Machine) -> Projection:
    """Layer 0 of `config`, one row of as many tokens per GPU as `config` gives each rank."""
    model, tokens = config.model, config.data.seq_len // config.parallel.sp
    seq_len, kind = tokens * gpus, model.layer_kind(0)
    per_pair = 4 * model.num_heads * model.head_size
    pairs = layer_pairs(model, kind, torch.arange(seq_len)[None]) / seq_len
    linear = linear_flops_per_token(model) - 2 * model.hidden_size * model.vocab_size
    forward_flops = tokens * (linear / model.num_layers + per_pair * pairs)
    hop_1 = 0.0 if kind == "full" else tokens * per_pair * model.window_size / machine.flops

    others = min(gpus, machine.gpus_per_node) - 1, max(gpus - machine.gpus_per_node, 0)
    sent = network = exchange = exposed = 0.0
    for backward in (False, True):
        neighbours, *sizes = (tokens * size for size in _sent(config, seq_len, gpus, backward))
        swaps = [_swap_seconds(size, others, machine) for size in sizes if size]
        halo = 0.0
        if neighbours:
            # A node's last GPU sends to another node; all wait for it.
            link = machine.network if others[1] else machine.nvlink
            halo = neighbours / link + machine.latency
        hidden = min(swaps[0], hop_1 * (2 if backward else 1)) if swaps and hop_1 else 0.0
        sent += neighbours + sum(sizes)
        network += sum(sizes) * others[1] / sum(others)
        exchange += halo + sum(swaps)
        exposed += halo + sum(swaps) - machine.overlap * hidden
    compute = 3 * forward_flops / machine.flops
    return Projection(gpus, seq_len, sent, network, compute, exchange, exposed)


def _sent(config: Config, seq_len: int, sp: int, backward: bool) -> tuple[float, ...]:
    """Bytes of layer 0 per token of the row: to neighbours, then of each exchange of all ranks."""
    model, kind = config.model, config.model.layer_kind(0)
    itemsize = 2 if config.train.dtype == "bf16" else 4
    if kind in ("window", "routed"):
        route = model.route if kind == "routed" else None
        sent = routed_traffic(
            seq_len, sp, window=model.window_size, key_heads=model.num_kv_heads,
            head_dim=model.head_size, itemsize=itemsize, backward=backward,
            top_k=route.top_k if route else 0, open_tile=route.open_tile if route else 1,
        )  # fmt: skip
        return sent.halo + sent.choice, sent.gather
    return layer_traffic(
        seq_len, sp, model.layer_fold(0), heads=model.num_heads, key_heads=model.num_kv_heads,
        head_dim=model.head_size, backward=backward, itemsize=itemsize,
    )  # fmt: skip


def _swap_seconds(num_bytes: float, others: tuple[int, int], machine: Machine) -> float:
    """One swap: both kinds of links at the same time, and a message to each other rank."""
    inside, outside = (num_bytes * count / sum(others) for count in others)
    slower = max(inside / machine.nvlink, outside / machine.network)
    return slower + sum(others) * machine.latency


def project_all(config: Config, machine: Machine) -> list[Projection]:
    """For each number of GPUs in GPUS that can share such a row."""
    tokens = config.data.seq_len // config.parallel.sp
    projections = []
    for gpus in GPUS:
        try:
            config.model.check_sharing(tokens * gpus, gpus)
        except ValueError:
            continue
        projections.append(project(config, gpus, machine))
    return projections


def format_projection(projections: Sequence[Projection], config: Config, machine: Machine) -> str:
    """A Markdown table under a heading that states the assumptions."""
    tokens, fold = config.data.seq_len // config.parallel.sp, config.model.layer_fold(0)
    kind = f"fold {list(fold)}" if fold else f"{config.model.layer_kind(0)} attention"
    lines = [
        "Projection, not a measurement: one layer, forward and backward, per GPU. "
        f"Each GPU holds {tokens:,} tokens of one row, {kind}, {config.train.dtype}.",
        f"Assumed: {machine.gpus_per_node} GPUs a node, {machine.nvlink / 1e9:g} GB/s inside it, "
        f"{machine.network / 1e9:g} GB/s a GPU between nodes, {machine.latency * 1e6:g} us a "
        f"message, {machine.flops / 1e12:g} TFLOP/s a GPU; nothing is recomputed.",
        "A swap takes max(bytes inside / node, bytes outside / network) + (GPUs - 1) messages; "
        f"hop 1 hides {machine.overlap:.0%} of what it could of the first one; exposed: the rest.",
        "",
        "| GPUs = sp | tokens a row | sent MB | between nodes MB | compute ms | exchange ms | "
        "exposed ms | efficiency |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {p.gpus} | {p.seq_len:,} | {p.sent_bytes / 1e6:.1f} | {p.network_bytes / 1e6:.1f} "
        f"| {p.compute_seconds * 1e3:.2f} | {p.exchange_seconds * 1e3:.2f} "
        f"| {p.exposed_seconds * 1e3:.2f} | {p.efficiency:.0%} |"
        for p in projections
    ]
    left_out = sorted(set(GPUS) - {p.gpus for p in projections})
    if left_out:
        lines += ["", f"GPUs that cannot share such a row: {', '.join(map(str, left_out))}"]
    return "\n".join(lines)
