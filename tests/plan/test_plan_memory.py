"""The plan's formulas against the tensors that the operator, blocks, head and DeepSpeed make."""

import dataclasses
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from fold_parallel import collectives
from tensorlm.benchmarks.memory import CPU, count_operator
from tensorlm.config import Config, load_config
from tensorlm.plan import activations, evaluation, host, prompts, state
from tensorlm.plan.job import Job, ZeroLimits, plan_jobs
from tensorlm.plan.memory import GpuMemory, gpu_memory
from tensorlm.plan.operator import operator_memory
from tests.support import counted
from tests.support.counted import LIMITS, small
from tests.support.distributed import run_distributed
from tests.support.launching import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts tensors on the CPU")

SCALARS = 1 << 12  # bytes of one-element tensors and such in a whole model


def job_of(config: Config, ranks: int = 1) -> Job:
    return plan_jobs(config, ranks, CPU, LIMITS)[-1]


# -------------------------------------------------------------------------------------- activations

LONG = {"data__seq_len": 4096, "model__num_heads": 8, "model__head_dim": 16}
WINDOW = {"model__fold": "[]", "model__window": 64}
ROUTED = {**WINDOW, "model__route": "{block = 16, top_k = 4, stretch = 2}"}
OPERATORS: list[dict[str, Any]] = [
    {**LONG, "model__fold": "[1024]"},  # hop 1 rotates q and k into copies
    {**LONG, "model__fold": "[8]"},  # hop 2 does
    {**LONG, "model__fold": "[128]", "train__dtype": "fp32"},
    {**LONG, "model__fold": "[32, 32]", "train__micro_batch": 2},
    {**LONG, "model__fold": "[]"},
    {**LONG, **WINDOW},
    {**LONG, **WINDOW, "model__window": 512, "train__dtype": "fp32"},
    {**LONG, **ROUTED},
    {**LONG, **ROUTED, "model__window": 512, "train__micro_batch": 2},
    {**LONG, **ROUTED, "model__route.open_tile": 1, "train__dtype": "fp32"},
    {**LONG, **ROUTED, "model__route.top_k": 1, "model__window": 2048},  # the window is the peak
]


@pytest.mark.parametrize("changes", OPERATORS, ids=str)
def test_operator_on_whole_rows(changes: dict[str, Any]) -> None:
    config = small(**changes)
    predicted = operator_memory(job_of(config), config.model.layer_kind(0))
    saved, peak = counted.operator(config)
    assert predicted.saved == saved
    assert predicted.saved + predicted.backward == pytest.approx(peak, abs=SCALARS)
    assert predicted.forward == pytest.approx(counted.operator_pass(config), abs=SCALARS)


@pytest.mark.parametrize("own_message", [1, 1 << 62])
@pytest.mark.parametrize("ranks", [2, 4])
def test_operator_on_shared_rows(
    ranks: int, own_message: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "OWN_MESSAGE", own_message)
    # Of these, hop 1 of [512] rotates q and k into copies, and hop 2 of [4] does.
    folds = ("[32]", "[512]", "[32, 8]", "[4]", "[]") if ranks == 2 else ("[512]", "[]")
    row = {**LONG, "data__seq_len": 4096}
    configs = [small(**row, model__fold=fold, parallel__sp=ranks) for fold in folds]
    configs.append(small(**row, model__fold="[32]", parallel__sp=ranks, train__micro_batch=2))
    counts = run_distributed(
        lambda: [(*counted.operator(c), counted.operator_pass(c)) for c in configs], ranks
    )
    for config, (saved, peak, forward) in zip(configs, counts[0], strict=True):
        predicted = operator_memory(job_of(config, ranks), config.model.layer_kind(0))
        assert predicted.saved == saved
        assert predicted.saved + predicted.backward == pytest.approx(peak, abs=SCALARS)
        assert predicted.forward == pytest.approx(forward, rel=0.001)


WINDOWS_AND_BLOCKS: list[dict[str, Any]] = [
    WINDOW,
    {**WINDOW, "model__window": 2048},  # longer than the slice of a rank
    ROUTED,
    {**ROUTED, "model__window": 256, "train__micro_batch": 2},
    {**ROUTED, "model__route.top_k": 1, "model__window": 2048, "train__dtype": "fp32"},
]


@pytest.mark.parametrize("ranks", [2, 4])
def test_window_and_routed_layers_on_shared_rows(ranks: int) -> None:
    configs = [small(**{**LONG, **layers}, parallel__sp=ranks) for layers in WINDOWS_AND_BLOCKS]
    counts = run_distributed(
        lambda: [(*counted.operator(c), counted.operator_pass(c)) for c in configs], ranks
    )
    for config, *of_ranks in zip(configs, *counts, strict=True):
        saved, peak, forward = map(max, zip(*of_ranks, strict=True))
        predicted = operator_memory(job_of(config, ranks), config.model.layer_kind(0))
        assert predicted.saved == pytest.approx(saved, abs=SCALARS)
        assert predicted.forward == pytest.approx(forward, rel=0.005)
        # Where hop 1 is the peak, some of the gradients that travel have already landed.
        assert 0.999 * peak <= predicted.saved + predicted.backward <= 1.05 * peak


def test_operator_is_what_was_measured_on_a_gpu() -> None:
    # kernels/README.md: 131,072 tokens, H 32, K 8, D 128, fold [1024]: 5.81 GiB are allocated, 3.31
    # of them beyond the output and the gradients of q, k, v.
    config = load_config(ROOT / "configs/llama8b_32k_fold.toml", ["data.seq_len=131072"])
    memory = operator_memory(Job(config, 1, config.phases[0]), "strided")
    gib, given = 2**30, (1 + 1 / 4 + 1 / 4) + 1  # q, k, v; the gradient that arrives
    allocated = (memory.saved + memory.backward) / gib - given
    reaches = 2 * 4 * 131072 / gib
    assert allocated - reaches == pytest.approx(5.81, abs=0.005)


BLOCKS: list[dict[str, Any]] = [
    {},  # SwiGLU's backward is the peak
    {"model__hidden_size": 128, "model__intermediate_size": 64},  # that of a norm
    {"model__intermediate_size": 32, "model__num_kv_heads": 8, "model__num_heads": 8,
     "model__head_dim": 64, "model__fold": "[8, 8]"},  # attention's
    {"model__fold": "[]", "train__micro_batch": 2},
    {"train__mlp_chunk": 256},
    {"train__mlp_chunk": 64, "model__hidden_size": 128},
    WINDOW,
    {**ROUTED, "model__intermediate_size": 32},
]  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "block", "attention", "selective"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("layers", ["torch", "liger"])
@pytest.mark.parametrize("changes", BLOCKS, ids=str)
def test_block(changes: dict[str, Any], layers: str, dtype: str, recompute: str) -> None:
    config = small(
        **changes, train__dtype=dtype, train__recompute=recompute,
        train__fused_layers=layers, data__seq_len=2048,
    )  # fmt: skip
    job = job_of(config)
    operator = operator_memory(job, config.model.layer_kind(0))
    kept, peak = counted.block(config)
    a_few = SCALARS + 2 * 4 * job.tokens  # such as norms' scales
    # The choice of a routed layer, and results; the block's input is not counted.
    again = operator.kept + activations.kept_results(job, operator)
    kept_too = 0 if recompute == "none" else again
    predicted = activations.block_peak(job, operator) + kept_too
    assert predicted == pytest.approx(peak, abs=a_few)
    saved = activations.saved_by_block(job, operator)
    assert kept == (saved if recompute == "none" else kept_too)


@pytest.mark.parametrize("recompute", ["none", "block", "attention", "selective"])
@pytest.mark.parametrize("linear", ["float8_tensorwise", "float8_rowwise"])
@pytest.mark.parametrize("layers", ["torch", "liger"])
@pytest.mark.parametrize("chunk", [0, 256])
def test_block_in_float8(chunk: int, layers: str, linear: str, recompute: str) -> None:
    config = small(
        train__dtype="bf16", train__recompute=recompute, train__fused_layers=layers,
        train__linear=linear, train__mlp_chunk=chunk, data__seq_len=2048,
    )  # fmt: skip
    job = job_of(config)
    operator = operator_memory(job, config.model.layer_kind(0))
    kept, peak = counted.block(config)
    results = activations.kept_results(job, operator) if recompute != "none" else 0
    scales = 4 * (job.tokens + job.config.model.intermediate_size) * 4
    predicted = activations.block_peak(job, operator) + results
    assert predicted == pytest.approx(peak, abs=SCALARS + 2 * 4 * job.tokens + scales)
    saved = activations.saved_by_block(job, operator) if recompute == "none" else results
    assert kept == saved


def test_each_part_of_a_block_is_the_peak_of_one_case() -> None:
    peaks = []
    for changes in BLOCKS[:3]:
        job = job_of(small(**changes, data__seq_len=2048))
        operator = operator_memory(job, job.kinds[0])
        parts = [
            activations.mlp_peak(job, operator, 0), activations.norm_peak(job, operator),
            activations.attention_peak(job, operator),
        ]  # fmt: skip
        peaks.append(parts.index(max(parts)))
    assert peaks == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("layers", ["torch", "liger"])
@pytest.mark.parametrize("changes", [*BLOCKS, {"model__vocab_size": 8192}], ids=str)
def test_pass_of_perplexity(changes: dict[str, Any], layers: str, dtype: str) -> None:
    config = small(
        **changes, train__dtype=dtype, train__fused_layers=layers, train__attention="triton",
        data__seq_len=2048,
    )  # fmt: skip
    job = job_of(config)
    predicted = evaluation.pass_peak(job, activations.operators_of(job))
    predicted += activations.rotary_table(job) + activations.batch(job)
    assert predicted == pytest.approx(counted.window_pass(config), abs=SCALARS + 4 * 4 * job.tokens)


def test_pass_of_perplexity_is_what_was_measured_on_a_gpu() -> None:
    # docs/evaluation.md: Llama-8B evaluated on an H200, with its weights and nothing else.
    lengths = {32768: 18.4, 131072: 28.6}
    config = load_config(
        ROOT / "configs/llama8b_32k_fold.toml",
        ["train.fused_layers=liger", "eval.every=1", f"eval.lengths={list(lengths)}"],
    )
    job = Job(config, 1, config.phases[0])
    for windows, gib in zip(evaluation.window_jobs(job), lengths.values(), strict=True):
        made = evaluation.pass_peak(windows, activations.operators_of(windows))
        made += activations.rotary_table(windows) + activations.batch(windows)
        assert (state.weights(job) + made) / 2**30 == pytest.approx(gib, abs=0.1)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("chunk", [512, 192])
@pytest.mark.parametrize(
    "changes", [{}, {"model__fold": "[16, 8]"}, {"model__full_every": 2}], ids=str
)
def test_prompt(changes: dict[str, Any], chunk: int, dtype: str) -> None:
    # So large an MLP that it is the peak, since a CPU's attention has other temporary tensors.
    config = small(
        **changes, train__dtype=dtype, model__intermediate_size=8192, eval__prefill_chunk=chunk
    )
    prompt = prompts.PromptPass(job_of(config), 480)
    kept, peak = counted.prompt(config, 480)
    assert prompts.cache(prompt) == kept
    table = activations.rotary_table(prompt.job, 600)
    predicted = prompts.cache(prompt) + prompts.prompt_pass(prompt) + table
    # The last piece is shorter than a full one; the others keep less.
    assert predicted == pytest.approx(peak, rel=0.01 if chunk == 512 else 0.06)


def test_prompts_are_what_was_measured_on_a_gpu() -> None:
    # docs/evaluation.md: five needles in Llama-8B on an H200, with its weights and nothing else.
    lengths = {32768: 31.1, 131072: 67.3}
    overrides = ["zero.stage=2", "eval.every=1", "eval.tasks=['niah']"]
    config = load_config(
        ROOT / "configs/llama8b_32k_fold.toml", [*overrides, f"eval.lengths={list(lengths)}"]
    )
    job = Job(config, 1, config.phases[0])
    assert prompts.prompt_lengths(job) == list(lengths)
    for length, gib in lengths.items():
        prompt = prompts.PromptPass(job, length)
        made = prompts.cache(prompt) + prompts.prompt_pass(prompt)
        made += activations.rotary_table(job, length + length // 4)
        # At that time the embeddings waited too, and caches kept the values of a whole pass.
        seen = prompt.tokens + (1024 if length > prompt.tokens else 0)
        made += prompt.hidden + 32 * prompt.keys(seen + seen // 4 - (1024 + 256))
        assert (state.weights(job) + made) / 2**30 == pytest.approx(gib, abs=0.1)


HEADS = [(512, 512, 512), (4096, 512, 128), (8192, 64, 16)]  # vocabulary, tokens, chunk


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("layers", ["torch", "liger"])
@pytest.mark.parametrize(("vocabulary", "tokens", "chunk"), HEADS)
def test_head(vocabulary: int, tokens: int, chunk: int, layers: str, dtype: str) -> None:
    config = small(
        model__vocab_size=vocabulary, model__fold="[16]", data__seq_len=tokens,
        train__loss_chunk=chunk, train__dtype=dtype, train__fused_layers=layers,
    )  # fmt: skip
    job = job_of(config)
    kernel = patch.object(Job, "runs_loss_kernel", layers == "liger")
    plain = patch.object(Job, "runs_liger", False)  # the norm is PyTorch's in either case
    # In float32 the norm keeps its input itself, which is here before the count begins.
    given = activations.hidden_state(job) if dtype == "fp32" else 0
    forward, backward = (peak + given for peak in counted.head(config))
    with kernel, plain:
        assert activations.head_peak(job) == pytest.approx(forward, rel=0.001)
        in_head = activations.head_gradient(job, 0)
        in_norm = activations.norm_workspace(job) + given
    assert max(in_head, in_norm) == pytest.approx(backward, rel=0.001)


# ------------------------------------------------------------------------------------------ engines

AGAIN = {"train__recompute": "block"}
SPARSE = {"train__recompute_interval": 3}
WIDE = {"model__vocab_size": 4096}  # the head's gradient alone is more than the bucket
MIXED = {**ROUTED, "model__layers": "['window', 'routed', 'full']"}
ENGINES: list[dict[str, Any]] = [
    {"zero__stage": 1},
    {"zero__stage": 1, **AGAIN, "train__rows_per_step": 4},
    {"zero__stage": 2, **AGAIN, "model__tie_embeddings": True, "train__rows_per_step": 4},
    {"zero__stage": 2, **WIDE, "optim__state_dtype": "bf16"},
    {"zero__stage": 3, **AGAIN, "data__seq_len": 1024},
    {"zero__stage": 3, **AGAIN, "model__num_layers": 7, "train__mlp_chunk": 128},
    {"zero__stage": 3, **WIDE, "optim__state_dtype": "bf16", "train__rows_per_step": 4},
    {"zero__stage": 0, **AGAIN, "train__dtype": "fp32"},
    {"zero__stage": 2, **AGAIN, **MIXED},
    {"zero__stage": 3, **MIXED},
    {"zero__stage": 2, "train__recompute": "selective", "train__rows_per_step": 4},
    {"zero__stage": 1, **AGAIN, **SPARSE, "model__num_layers": 8, "data__seq_len": 1024},
    {"zero__stage": 3, **AGAIN, **SPARSE, "model__num_layers": 7, "data__seq_len": 1024},
]
ON_ONE_RANK, ON_TWO_RANKS = (3,), range(len(ENGINES))


@cache
def counts(ranks: int) -> dict[int, dict[str, int]]:
    """For each engine, the largest count of all ranks."""
    chosen = ON_ONE_RANK if ranks == 1 else ON_TWO_RANKS
    configs = [small(**ENGINES[index], train__attention="blocked") for index in chosen]
    by_rank = run_distributed(counted.engines, ranks, configs, LIMITS, time_limit=300)
    return {
        index: {key: max(count[key] for count in found) for key in found[0]}
        for index, found in zip(chosen, zip(*by_rank, strict=True), strict=True)
    }


def predict(index: int, ranks: int) -> tuple[Job, GpuMemory]:
    """With the operator that the CPU runs, which is not the GPU's."""
    job = job_of(small(**ENGINES[index], train__attention="blocked"), ranks)
    return job, gpu_memory(job, {kind: count_operator(job, kind) for kind in set(job.kinds)})


every_engine = pytest.mark.parametrize(
    ("index", "ranks"), [*((i, 1) for i in ON_ONE_RANK), *((i, 2) for i in ON_TWO_RANKS)]
)


@every_engine
def test_weights_gradients_and_adam_state(index: int, ranks: int) -> None:
    job, _ = predict(index, ranks)
    parts = [
        state.weights(job), state.master_weights(job), state.moments(job), state.gradients(job, 0),
        state.reduce_bucket(job) if job.zero == 3 else 0,
    ]  # fmt: skip
    assert sum(parts) == pytest.approx(counts(ranks)[index]["rest"], abs=SCALARS)


@every_engine
def test_peaks_of_a_step(index: int, ranks: int) -> None:
    _, memory = predict(index, ranks)
    totals = {snapshot.name: snapshot.total for snapshot in memory.snapshots}
    update = totals.pop("update")
    del totals["start"]
    count = counts(ranks)[index]
    assert update == pytest.approx(count["update"], rel=0.02)
    assert max(totals.values()) == pytest.approx(count["backward"], rel=0.06)


def test_gradients_that_one_bucket_holds_are_reduced_at_the_end() -> None:
    configs = [
        small(
            zero__stage=stage, model__num_layers=10, data__seq_len=128, train__loss_chunk=32,
            train__attention="blocked", **AGAIN,
        )
        for stage in (2, 3)
    ]  # fmt: skip
    limits = ZeroLimits(reduce_bucket=600_000, persistent=100)
    (counts,) = run_distributed(counted.engines, 1, configs, limits, time_limit=300)
    for config, count in zip(configs, counts, strict=True):
        job = plan_jobs(config, 1, CPU, limits)[-1]
        memory = gpu_memory(job, {kind: count_operator(job, kind) for kind in set(job.kinds)})
        totals = {snapshot.name: snapshot.total for snapshot in memory.snapshots}
        del totals["start"], totals["update"]
        assert max(totals, key=lambda name: totals[name]) == "end of the backward"
        assert totals["end of the backward"] == pytest.approx(count["backward"], rel=0.06)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(3, {**WIDE, "model__num_layers": 1}), (4, {"model__num_layers": 20, "train__dtype": "fp32"})],
    ids=["the table", "many blocks"],
)
def test_the_start_gathers_the_largest_parameter(ranks: int, changes: dict[str, Any]) -> None:
    config = small(zero__stage=3, train__rows_per_step=ranks, **changes)
    counts = run_distributed(counted.engines, ranks, [config], LIMITS, False, time_limit=300)
    job = job_of(config, ranks)
    predicted = gpu_memory(job).snapshots[0].total
    assert predicted == pytest.approx(counts[0][0]["start"], rel=0.02)
    if ranks == 4:  # less than the model as a whole
        assert predicted < 0.9 * job.itemsize * job.parameters


def test_offloaded_state_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [small(zero__stage=stage, zero__offload_optimizer=True) for stage in (2, 3)]
    (ranks,) = run_distributed(counted.engines, 1, configs, LIMITS, False, time_limit=300)
    monkeypatch.setattr(host, "pinned", lambda num_bytes: num_bytes)  # only beside a GPU
    for config, count in zip(configs, ranks, strict=True):
        job = job_of(config)
        on_gpu = state.weights(job) + state.offload_buffer(job)
        on_gpu += state.reduce_bucket(job) if job.zero == 3 else 0
        assert state.master_weights(job) == state.moments(job) == 0
        temporary = 2 * 4 * min(job.shard, LIMITS.sub_group)  # of AdamW, in a step
        on_host = host.offloaded_optimizer(job) - temporary
        assert on_gpu + on_host == pytest.approx(count["rest"], abs=SCALARS)


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_offloaded_activations_are_on_the_host(
    interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(
        **AGAIN, zero__stage=2, train__activation_offload=True, train__attention="blocked",
        model__num_layers=8, train__recompute_interval=interval,
    )  # fmt: skip
    ((count,),) = run_distributed(counted.engines, 1, [config], LIMITS, time_limit=300)
    monkeypatch.setattr(host, "pinned", lambda num_bytes: num_bytes)  # only beside a GPU
    job = job_of(config)
    memory = gpu_memory(job, {kind: count_operator(job, kind) for kind in set(job.kinds)})
    on_gpu = max(p.total for p in memory.snapshots if p.name not in ("start", "update"))
    on_host = host.offloaded_activations(job)
    assert on_host == -(-8 // interval) * activations.hidden_state(job)
    assert on_gpu + on_host == pytest.approx(count["backward"], rel=0.06)


def test_limits_are_the_defaults_of_deepspeed() -> None:
    theirs = DeepSpeedZeroConfig()
    assert dataclasses.asdict(ZeroLimits()) == {
        "reduce_bucket": theirs.reduce_bucket_size,
        "sub_group": theirs.sub_group_size,
        "prefetch": theirs.prefetch_bucket_size,
        "max_reuse": theirs.max_reuse_distance,
        "persistent": theirs.param_persistence_threshold,
    }
