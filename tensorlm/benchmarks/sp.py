"""One layer of a configuration on the ranks of this job: time, bytes sent, gain from overlap.

Each rank of a row computes its share of one document of random values. Times are medians over
repeats, of the slowest rank; all ranks start each repeat together.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fold_parallel import Grid, create_grid, sharded_tensor_attention
from fold_parallel.swap import rows_to_columns
from tensorlm.config import Config, layers_in_words
from tensorlm.model import Block
from tensorlm.model.layers import rotary_table
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.ranks import leave_distributed
from tensorlm.train.engine import init_distributed

LAYER, ATTENTION = "decoder layer", "its attention"
SERIAL, SWAP = "attention, swap of q and k before hop 1", "swap of q and k alone"


class LayerCost(NamedTuple):
    """Times of one layer, and the bytes sent to other ranks per token of the row."""

    ranks: str
    milliseconds: dict[str, tuple[float, float]]  # forward; forward and backward
    forward_bytes: float
    backward_bytes: float


class _SentBytes(TorchDispatchMode):
    """Counts the bytes that this rank's all-to-alls send to other ranks."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.total = 0
        self._grid = grid

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.c10d.alltoall_base_.default:
            message, splits = args[1], args[4]
            own = splits[self._grid.sp_rank] if splits else message.numel() // self._grid.sp
            self.total += message.numel() - own
        return func(*args, **(kwargs or {}))


def measure(config: Config, launch: LaunchEnv, repeats: int) -> LayerCost:
    """Measure layer 0 of `config` on all ranks of the job; collective."""
    device = init_distributed(launch)
    grid = create_grid(config.parallel.sp)
    model, train, rows = config.model, config.train, config.train.micro_batch
    dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
    shard = config.data.seq_len // grid.sp
    with device:
        block = Block(
            model, 0, grid, train.attention, train.mlp_chunk, train.fused_layers
        ).to(dtype)  # fmt: skip
        doc_start = torch.zeros(rows, shard, dtype=torch.int32)
        x = torch.randn(rows, shard, model.hidden_size, dtype=dtype, requires_grad=True)
        q, k, v = (
            torch.randn(rows, shard, heads, model.head_size, dtype=dtype, requires_grad=True)
            for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        )
    rotary = rotary_table(model, config.data.seq_len, device)
    fold = model.layer_fold(0)

    def attention() -> tuple[Tensor, ...]:
        return (block.self_attn.attend(q, k, v, doc_start, rotary),)

    def serial() -> tuple[Tensor, ...]:
        out = sharded_tensor_attention(
            q, k, v, fold, grid=grid, doc_start=doc_start, hop_bias=block.self_attn.hop_bias,
            rotary=rotary, backend=config.train.attention, overlap=False,
        )  # fmt: skip
        return (out,)

    cases: dict[str, tuple[Callable[[], tuple[Tensor, ...]], Sequence[Tensor]]] = {
        LAYER: (lambda: (block(x, doc_start, rotary),), [x, *block.parameters()]),
        ATTENTION: (attention, [q, k, v]),
    }
    if fold and grid.swap_group is not None:
        group = grid.swap_group
        cases[SERIAL] = (serial, [q, k, v])
        cases[SWAP] = (lambda: rows_to_columns((q, k), fold[0], group), [q, k])
    times = {
        name: _milliseconds(function, leaves, repeats, grid, device)
        for name, (function, leaves) in cases.items()
    }
    sent = torch.tensor(_bytes(attention, [q, k, v], grid), dtype=torch.float64, device=device)
    if grid.world_size > 1:
        dist.all_reduce(sent)
    forward_bytes, backward_bytes = (sent / (grid.dp * rows * config.data.seq_len)).tolist()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    leave_distributed()
    return LayerCost(f"{launch.world_size} x {name}", times, forward_bytes, backward_bytes)


def _milliseconds(
    function: Callable[[], tuple[Tensor, ...]],
    leaves: Sequence[Tensor],
    repeats: int,
    grid: Grid,
    device: torch.device,
) -> tuple[float, float]:
    """Milliseconds of forward, and of forward and backward."""
    cotangents = [torch.randn_like(x) for x in function()]

    def both() -> None:
        torch.autograd.grad(function(), leaves, cotangents)

    def seconds(run: Callable[[], object]) -> float:
        _meet(grid, device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    both()
    with torch.no_grad():
        forward = statistics.median(seconds(function) for _ in range(repeats))
    whole = statistics.median(seconds(both) for _ in range(repeats))
    slowest = torch.tensor([forward, whole], dtype=torch.float64, device=device)
    if grid.world_size > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest[0].item() * 1e3, slowest[1].item() * 1e3


def _meet(grid: Grid, device: torch.device) -> None:
    """Wait until all ranks have arrived and their devices are idle."""
    if grid.world_size > 1:
        dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(
    function: Callable[[], tuple[Tensor, ...]], leaves: Sequence[Tensor], grid: Grid
) -> tuple[int, int]:
    """Bytes sent by this rank: forward, backward."""
    with _SentBytes(grid) as forward:
        outputs = function()
    with _SentBytes(grid) as backward:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
    return forward.total, backward.total


def format_cost(cost: LayerCost, config: Config) -> str:
    """A Markdown table, followed by the bytes sent and the gain from overlap."""
    model = config.model
    route = None if model.route is None else model.route.model_dump()
    kind = layers_in_words(model.layer_kinds[:1], model.fold, model.window_size, route)
    lines = [
        f"{cost.ranks}, torch {torch.__version__}: sp {config.parallel.sp}, "
        f"{config.train.micro_batch} x {config.data.seq_len:,} tokens, "
        f"{kind}, {config.train.dtype}",
        "",
        "| | forward ms | forward and backward ms |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {f:.2f} | {b:.2f} |" for name, (f, b) in cost.milliseconds.items()]
    lines += [
        "",
        f"sent per token of the row: {cost.forward_bytes:,.0f} bytes forward, "
        f"{cost.backward_bytes:,.0f} backward",
    ]
    if SWAP in cost.milliseconds:
        change = cost.milliseconds[ATTENTION][1] - cost.milliseconds[SERIAL][1]
        lines[-1] += f"; overlapping the swap of q and k changes attention by {change:+.2f} ms"
    return "\n".join(lines)
