"""What the plan predicts, counted tensor by tensor: the operator, a block, the head, an engine."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import liger_kernel.ops.rms_norm
import liger_kernel.ops.swiglu
import torch
import torch.distributed as dist
from torch import Tensor

from fold_parallel import Grid, create_grid
from tensor_attention.gpu import backward_key as triton_backward_key
from tensor_attention.gpu import backward_line as triton_backward_line
from tensor_attention.gpu import backward_query as triton_backward_query
from tensor_attention.gpu import forward as triton_forward
from tensor_attention.gpu import forward_line as triton_forward_line
from tensor_attention.gpu import launch as triton_launch
from tensor_attention.gpu import (
    routed_backward,
    routed_choice,
    routed_forward,
    routed_launch,
    routed_lists,
    routed_tiles,
)
from tensor_attention.gpu import tiles as triton_tiles
from tensorlm.benchmarks.accounting import PeakMemory
from tensorlm.config import Config, load_config
from tensorlm.evaluation.model import EvaluatedModel
from tensorlm.hf.cache_tensorlm import FoldCache
from tensorlm.model import Block, create_llama, float8_cast, loss_kernel, output_head
from tensorlm.model.attention import Attention, KeptChoice
from tensorlm.model.layers import RMSNorm, rotary_table
from tensorlm.model.output_head import OutputHead
from tensorlm.model.recompute import run_block
from tensorlm.plan.job import Job, ZeroLimits, plan_jobs
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.train import engine as engine_module
from tensorlm.train.engine import Engine, create_model, import_muon, init_distributed
from tests.support.launching import ROOT

import_muon()  # else every forked rank would

SHAPE = {
    "train.dtype": "bf16", "model.vocab_size": 512, "model.hidden_size": 64,
    "model.intermediate_size": 192, "model.num_layers": 3, "model.num_heads": 4,
    "model.num_kv_heads": 2, "model.fold": "[64]", "data.seq_len": 512, "train.loss_chunk": 128,
    "train.rows_per_step": 2,
}  # fmt: skip
# Small enough that a small model fills the bucket several times.
LIMITS = ZeroLimits(reduce_bucket=60_000, persistent=100)


def small(**changes: Any) -> Config:
    """A small configuration; `model__fold="[8]"` sets model.fold."""
    settings = SHAPE | {key.replace("__", "."): value for key, value in changes.items()}
    overrides = [f"{key}={str(value).lower()}" for key, value in settings.items()]
    return load_config(ROOT / "configs/demo.toml", overrides)


class _Silent:
    """A kernel that computes nothing: what it is given has been allocated all the same."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


def _unrounded(
    x: Tensor, dtype: torch.dtype, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The results of the kernel that casts to float8, uninitialized."""
    sizes = tuple(x.shape), tuple(reversed(x.shape))
    first, second = (
        None if scale is None else x.new_empty(size, dtype=dtype)
        for scale, size in zip((rows, columns), sizes, strict=True)
    )
    return first, second


@contextmanager
def silent_kernels() -> Iterator[None]:
    """The operator as on a Hopper GPU, Liger's layers, no kernels: results are arbitrary."""
    kernels = [
        (triton_forward, "hop_forward_kernel"), (triton_forward_line, "hop_forward_line_kernel"),
        (triton_launch, "rotate_kernel"), (triton_backward_key, "hop_backward_key_kernel"),
        (triton_backward_query, "hop_backward_query_kernel"),
        (triton_backward_line, "hop_backward_line_kernel"),
        *((routed_choice, f"{name}_kernel") for name in (
            "rotate_stretched", "pooled_key", "query_sum", "choose",
        )),
        *((routed_lists, f"{name}_kernel") for name in ("tile_list", "rank", "reader")),
        (routed_forward, "routed_forward_kernel"),
        (routed_backward, "routed_backward_query_kernel"),
        (routed_backward, "routed_backward_key_kernel"),
        (liger_kernel.ops.rms_norm, "_rms_norm_forward_kernel"),
        (liger_kernel.ops.rms_norm, "_rms_norm_backward_kernel"),
        (liger_kernel.ops.swiglu, "_swiglu_forward_kernel"),
        (liger_kernel.ops.swiglu, "_swiglu_backward_kernel"),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for module, name in kernels:
            stack.enter_context(patch.object(module, name, _Silent()))
        for module in (triton_launch, triton_tiles, routed_launch, routed_tiles):
            stack.enter_context(patch.object(module, "is_interpreted", lambda: False))
        stack.enter_context(patch.object(float8_cast, "_round", _unrounded))
        capability = patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0))
        stack.enter_context(capability)
        yield


class _Sum(torch.autograd.Function):
    """The sum of `x`, which is not kept: its gradient is a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = x.shape, x.dtype
        return x.sum(dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.ones(ctx.like[0], dtype=ctx.like[1])


class _Copy(torch.autograd.Function):
    """A tensor that can be freed, unlike the leaf that it is a copy of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose gradient exists: what backward adds to it is freed."""
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    x.grad = torch.zeros_like(x)
    return x


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.dtype == "bf16" else torch.float32


def operator(config: Config) -> tuple[int, int]:
    """Saved, and the peak of the backward, of the operator of layer 0 on this rank."""
    # gloo's threads may hold a message for a moment after it has arrived: more, never less.
    counts = [_operator(config) for _ in range(3)]
    return min(saved for saved, _ in counts), min(peak for _, peak in counts)


def _operator(config: Config) -> tuple[int, int]:
    grid, model, rows = create_grid(config.parallel.sp), config.model, config.train.micro_batch
    shard = config.data.seq_len // config.parallel.sp
    with silent_kernels(), PeakMemory() as memory:
        layer = Attention(model, 0, grid, "triton")
        q, k, v = (
            _leaf(rows, shard, heads, model.head_size, dtype=_dtype(config))
            for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        )
        rotary = rotary_table(model, config.data.seq_len, torch.device("cpu"))
        doc_start = torch.zeros(rows, shard, dtype=torch.int32)
        before = memory.live
        out = layer.attend(_Copy.apply(q), _Copy.apply(k), _Copy.apply(v), doc_start, rotary)
        _let_messages_go(grid)
        saved = memory.live - before
        total = _Sum.apply(out)
        del out
        memory.restart()
        total.backward()
        return saved, memory.peak - before


def _let_messages_go(grid: Grid) -> None:
    if grid.sp > 1:
        dist.barrier()
        time.sleep(0.01)


def operator_pass(config: Config) -> int:
    """The peak of a forward of the operator of layer 0 that keeps nothing, with q, k, v."""
    return min(_operator_pass(config) for _ in range(3))  # as in `operator`


def _operator_pass(config: Config) -> int:
    grid, model, rows = create_grid(config.parallel.sp), config.model, config.train.micro_batch
    shard = config.data.seq_len // config.parallel.sp
    with silent_kernels(), torch.no_grad(), PeakMemory() as memory:
        layer = Attention(model, 0, grid, "triton")
        rotary = rotary_table(model, config.data.seq_len, torch.device("cpu"))
        doc_start = torch.zeros(rows, shard, dtype=torch.int32)
        before = memory.live
        q, k, v = (
            torch.zeros(rows, shard, heads, model.head_size, dtype=_dtype(config))
            for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        )
        memory.restart()
        layer.attend(q, k, v, doc_start, rotary)
        peak = memory.peak - before
    _let_messages_go(grid)
    return peak


def window_pass(config: Config) -> int:
    """The peak of one pass of perplexity over rows of the run, without the weights."""
    rows, length = config.train.micro_batch, config.data.seq_len
    with silent_kernels(), torch.no_grad(), PeakMemory() as memory:
        model = create_llama(config.model, config.train, create_grid(1), torch.device("cpu"))
        model.eval()
        gc.collect()
        before = memory.live
        tokens, labels = (torch.zeros(rows, length, dtype=torch.int64) for _ in range(2))
        memory.restart()
        model(tokens, None, labels, "none")
        return memory.peak - before


def prompt(config: Config, length: int) -> tuple[int, int]:
    """Bytes of a prompt's cache, at most, and the peak of reading it, without the weights."""
    with torch.no_grad(), PeakMemory() as memory:
        network = create_llama(config.model, config.train, create_grid(1), torch.device("cpu"))
        where = (torch.device("cpu"), Grid())
        evaluated = EvaluatedModel(config, network, "", None, config.data.seq_len, None, *where)
        model = evaluated.generator
        gc.collect()
        before = memory.live
        tokens = torch.zeros(1, length, dtype=torch.int64)
        cache = FoldCache(model.config, expected=length)
        memory.restart()
        kept = 0
        for piece in tokens.split(config.eval.prefill_chunk, dim=1):
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
            rows = [
                rows
                for layer in cache.layers
                for rows in (layer.key_rows, layer.value_rows, *layer.states)
            ]
            kept = max(kept, sum(each.buffer.nbytes for each in rows))
        return kept, memory.peak - before


def block(config: Config) -> tuple[int, int]:
    """Kept from forward to backward, and the peak of the backward, of layer 0."""
    grid, rows, dtype = create_grid(1), config.train.micro_batch, _dtype(config)
    with silent_kernels(), PeakMemory() as memory:
        train = config.train
        layer = Block(
            config.model, 0, grid, "triton", train.mlp_chunk, train.fused_layers, train.linear
        )
        layer.to(dtype)
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        rotary = rotary_table(config.model, config.data.seq_len, torch.device("cpu"))
        doc_start = torch.zeros(rows, config.data.seq_len, dtype=torch.int32)
        x = _leaf(rows, config.data.seq_len, config.model.hidden_size, dtype=dtype)
        before = memory.live
        kept_products, kind = layer.kept_products(x), layer.kind
        choice = KeptChoice()
        y = run_block(layer, train.recompute, kept_products, kind, x, doc_start, rotary, choice)
        del choice
        kept = memory.live - before - y.nbytes
        total = _Sum.apply(y)
        del y
        memory.restart()
        total.backward()
        return kept, memory.peak - before


@contextmanager
def silent_loss_kernel() -> Iterator[None]:
    """The head's kernel and sums of products as on a GPU, without what they compute."""

    def add(total: Tensor, left: Tensor, right: Tensor) -> None:
        if left.dtype == torch.float32:
            total += left @ right

    with (
        patch.object(output_head, "runs_loss_kernel", lambda *_: True),
        patch.object(loss_kernel, "_loss_kernel", _Silent()),
        patch.object(output_head, "add_product", add),
    ):
        yield


def head(config: Config) -> tuple[int, int]:
    """Peaks of the last norm and the output head, forward and backward."""
    model, dtype = config.model, _dtype(config)
    is_fused = config.train.fused_layers == "liger"
    with silent_loss_kernel() if is_fused else nullcontext(), PeakMemory() as memory:
        norm = RMSNorm(model.hidden_size, model.rms_norm_eps).to(dtype)
        output = OutputHead(model.hidden_size, model.vocab_size, config.train.fused_layers).to(
            dtype
        )
        for parameter in (norm.weight, output.weight):
            parameter.grad = torch.zeros_like(parameter)
        x = _leaf(1, config.data.seq_len, model.hidden_size, dtype=dtype)
        labels = torch.zeros(1, config.data.seq_len, dtype=torch.int64)
        before = memory.live
        memory.restart()
        loss = output(norm(x), labels, config.train.loss_chunk)
        forward = memory.peak - before
        memory.restart()
        loss.backward()
        return forward, memory.peak - before


def engines(
    configs: Sequence[Config], limits: ZeroLimits, trains: bool = True
) -> list[dict[str, int]]:
    """Bytes of real engines on this rank: at the start (peak), at rest, and if it trains, in
    forward and backward, and in the update (peaks of a step).
    """
    original = engine_module.deepspeed_config

    def limited(config: Config) -> dict[str, Any]:
        tree = original(config)
        tree["zero_optimization"] |= {
            "reduce_bucket_size": limits.reduce_bucket,
            "sub_group_size": limits.sub_group,
            "stage3_param_persistence_threshold": limits.persistent,
            "stage3_prefetch_bucket_size": limits.prefetch,
            "stage3_max_reuse_distance": limits.max_reuse,
        }
        return tree

    rank, size = dist.get_rank(), dist.get_world_size()
    device = init_distributed(LaunchEnv(rank, size, rank, size, "127.0.0.1", 0))
    with patch.object(engine_module, "deepspeed_config", limited):
        return [_engine(plan_jobs(config, size)[-1], device, trains) for config in configs]


def _engine(job: Job, device: torch.device, trains: bool) -> dict[str, int]:
    grid = create_grid(job.sp)
    with PeakMemory() as memory:
        engine = Engine(create_model(job.config, grid, device, None), job.config)
        gc.collect()
        counts = {"start": memory.peak}
        list(engine.parameter_slices())
        gc.collect()
        counts["rest"] = memory.live
        # Stage 3 knows from the first step what to gather ahead in the next.
        for _ in range((2 if job.zero == 3 else 1) * trains):
            memory.restart()
            for _ in range(job.micro_batches):
                shape = (job.phase.micro_batch, job.phase.seq_len // job.sp)
                tokens = torch.randint(job.config.model.vocab_size, shape)
                loss = engine.forward(tokens, torch.zeros_like(tokens, dtype=torch.int32), tokens)
                engine.backward(loss / tokens.numel())
                del loss, tokens
            counts["backward"] = memory.peak
            gc.collect()  # graphs of recomputed blocks may be cycles
            # gloo's threads hold what they have reduced for a moment longer: on a loaded machine
            # 0.2 s were not always enough.
            time.sleep(1.0)
            memory.restart()
            norm = engine.step(1e-3)
            assert norm == norm, "the update was skipped"
            counts["update"] = memory.peak
    return counts
