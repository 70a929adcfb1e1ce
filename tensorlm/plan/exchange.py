"""Projected time of one layer with sequence parallelism on 2 to 1,024 GPUs.

docs/sequence_parallelism.md has the formula, and the measurements on two GPUs that give the rates
inside a node. Projections for more GPUs have not been compared with measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fold_parallel import layer_traffic, routed_traffic
from tensorlm.config import Config
from tensorlm.model.flops import layer_pairs, linear_flops_per_token

GPUS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Machine:
    """Rates that one GPU is assumed to reach; bandwidths are one way.

    Values marked "measured": two H200, each with 65,536 tokens of Llama-8B.
    """

    gpus_per_node: int = 8
    nvlink: float = 200e9  # bytes/s of a swap, packing included (measured; NVLink 4: 450e9)
    network: float = 40e9  # bytes/s: 80 % of 400 Gbit/s per GPU
    latency: float = 2e-6  # seconds per message
    flops: float = 570e12  # FLOP/s of a layer without exchange (measured; bf16 peak: 989e12)
    overlap: float = 0.45  # share of the possible overlap of hop 1 with the swap (measured)


class Projection(NamedTuple):
    """Bytes and times of one layer, forward and backward, per GPU."""

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
    """Project layer 0 of `config` for one row, with the tokens per GPU of `config` per rank."""
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
        neighbors, *sizes = (tokens * size for size in _sent(config, seq_len, gpus, backward))
        swaps = [_swap_seconds(size, others, machine) for size in sizes if size]
        halo = 0.0
        if neighbors:
            # A node's last GPU sends to another node, and all GPUs wait for it.
            link = machine.network if others[1] else machine.nvlink
            halo = neighbors / link + machine.latency
        hidden = min(swaps[0], hop_1 * (2 if backward else 1)) if swaps and hop_1 else 0.0
        sent += neighbors + sum(sizes)
        network += sum(sizes) * others[1] / sum(others)
        exchange += halo + sum(swaps)
        exposed += halo + sum(swaps) - machine.overlap * hidden
    compute = 3 * forward_flops / machine.flops
    return Projection(gpus, seq_len, sent, network, compute, exchange, exposed)


def _sent(config: Config, seq_len: int, sp: int, backward: bool) -> tuple[float, ...]:
    """Bytes of layer 0 per token of the row: sent to neighbors, then in each exchange of all."""
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
    """Seconds of one swap: both kinds of links work in parallel, one message per other rank."""
    inside, outside = (num_bytes * count / sum(others) for count in others)
    slower = max(inside / machine.nvlink, outside / machine.network)
    return slower + sum(others) * machine.latency


def project_all(config: Config, machine: Machine) -> list[Projection]:
    """Projections for each number of GPUs in GPUS that can share such a row."""
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
        f"Assumed: {machine.gpus_per_node} GPUs per node; bandwidth per GPU "
        f"{machine.nvlink / 1e9:g} GB/s inside a node and {machine.network / 1e9:g} GB/s between "
        f"nodes; {machine.latency * 1e6:g} us per message; {machine.flops / 1e12:g} TFLOP/s per "
        "GPU; no recomputation.",
        "A swap takes max(bytes inside a node / its bandwidth, bytes between nodes / their "
        "bandwidth) + (GPUs - 1) messages. Hop 1 hides "
        f"{machine.overlap:.0%} of the possible overlap with the first swap; the rest is exposed.",
        "",
        "| GPUs = sp | tokens per row | sent MB | between nodes MB | compute ms | exchange ms | "
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
