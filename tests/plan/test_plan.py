"""Plans: what fits, how long it takes, what would fit, and how the launcher tells it."""

import copy
import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorlm.config import Config, load_config, parse_config
from tensorlm.model.flops import peak_flops, train_flops
from tensorlm.plan import activations, host, state
from tensorlm.plan.gpus import GIB, GPUS, find_gpu
from tensorlm.plan.job import Job, plan_jobs
from tensorlm.plan.memory import gpu_memory
from tensorlm.plan.planning import Plan, longest_row, make_plan
from tensorlm.plan.proposals import GAIN, MAX_PROPOSALS, SPARE, Proposal, apply, propose
from tensorlm.plan.recompute import ORDER, resolve_recompute
from tensorlm.plan.report import format_plan, plan_json
from tensorlm.plan.speed import step_time
from tensorlm.runtime.errors import UserError
from tests.support.forked import Completed, run_forked
from tests.support.launching import ROOT

LLAMA = "configs/llama8b_32k_fold.toml"


def llama(*overrides: str) -> Config:
    return load_config(ROOT / LLAMA, overrides)


def plan(*overrides: str, gpus: int = 8, gpu: str = "h100") -> Plan:
    return make_plan(llama(*overrides), gpus, find_gpu(gpu))


def job(*overrides: str, gpus: int = 8) -> Job:
    return plan_jobs(llama(*overrides), gpus)[-1]


# -------------------------------------------------------------------------------------------- sizes


def test_parameters_are_those_of_the_model() -> None:
    from tensorlm.model import Llama
    from tensorlm.model.flops import num_parameters

    for overrides in ([], ["model.tie_embeddings=true", "model.full_every=2"], ["model.fold=[]"]):
        planned = job("model.num_layers=4", *overrides)
        with torch.device("meta"):
            model = Llama(planned.config.model)
        assert planned.parameters == num_parameters(model)
        assert planned.largest == max(p.numel() for p in model.parameters())


def test_llama_8b_by_hand() -> None:
    memory = gpu_memory(
        job("optim.state_dtype=bf16", "train.rows_per_step=1", "train.fused_layers=torch", gpus=1)
    )
    at, parameters = {s.name: s.parts for s in memory.snapshots}, 8_030_262_272
    parts = at["backward of block 30 of 32 while gradients are reduced"]
    assert parts["weights"] == 2 * parameters
    assert parts["master_weights"] == parts["gradients"] == parts["moments"] == 4 * parameters
    assert parts["reduce_bucket"] == 4 * 500_000_000
    assert parts["gathered_weights"] == 0  # one rank has all of them
    # 32 blocks keep 32,768 x 4,096 bf16; two of them are done when the bucket is full.
    assert parts["saved_activations"] == 30 * 32768 * 4096 * 2
    assert parts["rotary_table"] == 32768 * 128 * 4
    per_token = 2 * (8 * 4096 + 4) + 2 * (3 * 4096 + 2 * 1024) + 2 * 32 * 4 + 2 * 4 + 2 * 4096
    swiglu = 4 * 2 * 14336 * 32768 + 2 * 14336 * 4096  # four tensors, the gradient of a matrix
    assert parts["block_peak"] == per_token * 32768 + swiglu + 4 * 500_000_000
    # Logits of 2,048 tokens and their softmax, both in float32.
    table, logits = 128256 * 4096, 128256 * 2048
    norm = 8 * 4096 * 32768 + 4 * 32768
    assert at["loss"]["head_peak"] == norm + 2 * 4096 * 32768 + 4 * table + 8 * logits
    assert memory.needed == memory.allocated + memory.overhead


def test_many_ranks_start_with_their_shards_and_one_whole_parameter() -> None:
    start = gpu_memory(job("train.rows_per_step=512", gpus=512)).snapshots[0].total
    shards, small = (2 + 4 + 4) * 8_030_262_272 / 512, 2 * 65 * 4096
    bucket, table = 4 * 500_000_000, 2 * 128256 * 4096
    assert start == pytest.approx(shards + small + bucket + table, rel=0.001)


def test_peaks_of_the_data_sheets_are_those_that_mfu_is_taken_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for gpu in GPUS.values():
        name = f"NVIDIA {gpu.name}"
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == gpu.flops


@pytest.mark.parametrize("text", ["v100", "0", "-3", "inf", "nan", ""])
def test_unknown_gpus_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="must be a100, h100, h200, b200 or GiB of memory, got "):
        find_gpu(text)


def test_gpu_by_its_memory() -> None:
    assert find_gpu("24").memory == find_gpu("24GiB").memory == 24 * GIB
    assert find_gpu("H100") == GPUS["h100"]


# --------------------------------------------------------------------------------------- properties

shapes = st.fixed_dictionaries(
    {
        "model.hidden_size": st.sampled_from([512, 2048, 4096]),
        "model.intermediate_size": st.sampled_from([2048, 8192, 14336]),
        "model.num_layers": st.integers(4, 40),
        "model.vocab_size": st.sampled_from([32000, 128256]),
        "model.num_kv_heads": st.sampled_from([1, 4, 8, 32]),
        "model.fold": st.sampled_from([[1024], [512, 4], []]),
        "model.full_every": st.sampled_from([0, 2]),
        "data.seq_len": st.sampled_from([32768, 65536, 262144]),
        "train.recompute": st.sampled_from(ORDER),
        "zero.stage": st.sampled_from([1, 2, 3]),
    }
)
few = settings(max_examples=30, deadline=None)
BASE = llama().model_dump()


def shaped(shape: dict[str, Any], **changes: Any) -> Job:
    tree = copy.deepcopy(BASE)
    for key, value in (shape | {k.replace("__", "."): v for k, v in changes.items()}).items():
        section, name = key.split(".")
        tree[section][name] = value
    return plan_jobs(parse_config(tree, ""), 16)[-1]


@few
@given(shapes, st.sampled_from([1, 2, 4, 8]))
def test_more_sp_needs_less_memory_for_activations(shape: dict[str, Any], sp: int) -> None:
    one, other = (shaped(shape, parallel__sp=p) for p in (sp, 2 * sp))
    kept = [activations.saved_activations(j, activations.operators_of(j), 1) for j in (one, other)]
    # What does not halve is the inner row in front of each shard; sharing at all takes q, k and z a
    # second time, in columns.
    assert kept[1] < (0.55 if sp > 1 else 0.7) * kept[0]
    assert gpu_memory(other).needed <= gpu_memory(one).needed


@few
@given(shapes)
def test_what_saves_memory_never_costs_any(shape: dict[str, Any]) -> None:
    plain = shape | {"train.recompute": "none"}
    again = shape | {"train.recompute": "block"}
    needed = gpu_memory(shaped(again)).needed
    assert needed <= gpu_memory(shaped(plain)).needed
    for saving in (
        {"train__activation_offload": True}, {"optim__state_dtype": "bf16"},
        {"train__loss_chunk": 512}, {"zero__offload_optimizer": True},
    ):  # fmt: skip
        if shape["zero.stage"] > 1 or "zero__offload_optimizer" not in saving:
            assert gpu_memory(shaped(again, **saving)).needed <= needed
    for costly in ({"train__micro_batch": 2}, {"data__seq_len": 2 * shape["data.seq_len"]}):
        assert gpu_memory(shaped(again, **costly)).needed >= needed


@few
@given(shapes, st.sampled_from([1, 2, 4, 32]))
def test_more_ranks_hold_less_of_the_state(shape: dict[str, Any], gpus: int) -> None:
    def resting(ranks: int, stage: int) -> int:
        planned = dataclasses.replace(shaped(shape, zero__stage=stage), gpus=ranks)
        parts = (state.weights, state.master_weights, state.moments)
        gradients = state.gradients(planned, planned.parameters, reduced=True)
        return sum(part(planned) for part in parts) + gradients

    for stage in (1, 2, 3):
        assert resting(2 * gpus, stage) < resting(gpus, stage)
    assert resting(2 * gpus, 3) < resting(2 * gpus, 2) < resting(2 * gpus, 1)


# --------------------------------------------------------------------------------------------- time


def test_model_flops_are_those_of_training() -> None:
    planned = job("train.rows_per_step=16", "data.seq_len=16384", "model.full_every=4")
    depth = torch.arange(16384)[None].expand(16, -1)
    time = step_time(planned, GPUS["h100"])
    assert time.model_flops == train_flops(planned.config.model, depth)
    assert time.tokens == 16 * 16384
    assert time.mfu == pytest.approx(time.model_flops / time.seconds / 8 / 989e12)
    assert 0.2 < time.mfu < 0.7


def test_recomputing_offloading_and_exchanges_take_time() -> None:
    base = step_time(job(), GPUS["h100"]).parts
    plain = step_time(job("train.recompute=none"), GPUS["h100"]).parts
    assert base["recomputation"] > plain["recomputation"] == 0
    assert base | {"recomputation": 0} == plain | {"recomputation": 0}
    tiles = job("train.mlp_chunk=4096", "train.recompute=none")
    assert 0 < step_time(tiles, GPUS["h100"]).parts["recomputation"] < base["recomputation"]
    offloaded = step_time(job("zero.offload_optimizer=true"), GPUS["h100"]).parts
    assert offloaded["update"] > 10 * base["update"]
    shared = step_time(job("parallel.sp=8"), GPUS["h100"]).parts
    assert shared["row_exchange"] > 0 == base["row_exchange"]
    alone = step_time(job(gpus=1), GPUS["h100"]).parts
    assert alone["weight_exchange"] == 0 < base["weight_exchange"]


def test_auto_is_the_least_recomputation_that_fits() -> None:
    config = llama("train.recompute=auto")
    needed = {
        recompute: make_plan(llama(f"train.recompute={recompute}"), 8, GPUS["h100"]).memory.needed
        for recompute in ORDER
    }
    assert sorted(needed, key=lambda recompute: -needed[recompute]) == list(ORDER)
    for recompute, memory in needed.items():
        assert resolve_recompute(config, 8, memory).train.recompute == recompute
        chosen = resolve_recompute(config, 8, memory - 1).train.recompute
        assert ORDER.index(chosen) == min(ORDER.index(recompute) + 1, 3)
    plan = make_plan(config, 8, GPUS["h200"])
    assert plan.config.train.recompute == plan.jobs[0].recompute == "selective"
    assert f"recompute = {plan.jobs[0].recompute}" in format_plan(plan, [], "a run")


def test_less_recomputation_takes_less_time() -> None:
    seconds = [
        step_time(job(f"train.recompute={recompute}"), GPUS["h100"]).parts["recomputation"]
        for recompute in ORDER
    ]
    assert 0 == seconds[0] < seconds[1] < 0.2 * seconds[2] < 0.2 * seconds[3]
    tiled = job("train.recompute=selective", "train.mlp_chunk=4096")
    assert seconds[1] < step_time(tiled, GPUS["h100"]).parts["recomputation"] < seconds[2]


def test_an_interval_takes_a_forward_pass_of_the_other_layers() -> None:
    parts = {
        every: step_time(
            job(f"train.recompute_interval={every}", "zero.stage=3"), GPUS["h100"]
        ).parts
        for every in (1, 2, 4, 32)
    }
    again = {every: parts[every]["recomputation"] - parts[1]["recomputation"] for every in parts}
    # 16, 24 and 31 of 32 layers
    assert again[2] / 16 == pytest.approx(again[4] / 24) == pytest.approx(again[32] / 31)
    assert 0.5 * parts[1]["recomputation"] < again[2] < 0.7 * parts[1]["recomputation"]
    for part in ("products", "attention", "other_operations", "update"):
        assert parts[1][part] == parts[2][part]
    assert parts[1]["weight_exchange"] < parts[2]["weight_exchange"]
    assert (
        host.offloaded_activations(
            job("train.activation_offload=true", "train.recompute_interval=3")
        )
        == 11 * 2**28
    )


def test_transfers_of_activations_hide_behind_a_block_where_the_link_is_fast() -> None:
    planned = job("train.activation_offload=true")
    slow = dataclasses.replace(GPUS["h100"], host_link=2e9)
    exposed = step_time(planned, slow).parts["activation_transfers"]
    moved = 2 * 32 * 8 * 32768 * 4096 * 2  # there and back, blocks, micro-batches
    assert 0.8 * moved / (0.8 * 2e9) < exposed < moved / (0.8 * 2e9)
    assert step_time(planned, GPUS["h100"]).parts["activation_transfers"] == 0
    assert step_time(job(), slow).parts["activation_transfers"] == 0


def test_weight_exchange_by_stage() -> None:
    parameters, micro_batches = 8_030_262_272, 8
    sent = {1: 10, 2: 8 * micro_batches + 2, 3: 8 * micro_batches}  # bytes a parameter, in a step
    for stage, size in sent.items():
        seconds = step_time(job(f"zero.stage={stage}"), GPUS["h100"]).parts["weight_exchange"]
        assert seconds == pytest.approx(size * parameters * 7 / 8 / (0.52 * 450e9))
    between = step_time(job(gpus=64), GPUS["h100"]).parts["weight_exchange"]
    assert between == pytest.approx(8 * parameters * 63 / 64 / (0.52 * 450e9))
    # measured on two H200: all-reduce and gather of ZeRO-1
    measured = step_time(job("zero.stage=1", gpus=2), GPUS["h200"]).parts["weight_exchange"]
    assert measured == pytest.approx(0.1727, rel=0.02)


# --------------------------------------------------------------------------------------------- host


def test_host_memory_by_hand() -> None:
    overrides = ["train.activation_offload=true", "checkpoint.background=true"]
    planned = job(*overrides)
    parts = host.host_memory(planned).parts
    assert parts["offloaded_activations"] == 32 * 2**28
    longer = host.host_memory(job(*overrides, "data.seq_len=49152")).parts
    assert longer["offloaded_activations"] == 32 * 3 * 2**27  # pinned without rounding
    assert parts["checkpoint_copy"] == 12 * planned.shard
    assert parts["offloaded_optimizer"] == 0
    assert host.pinned(2**28 + 1) == 2**29
    assert host.host_memory(job("zero.offload_optimizer=true")).parts["offloaded_optimizer"] > (
        20 * planned.shard
    )


def test_mapped_data_are_the_token_files(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/shard-00000.tokens").write_bytes(b"x" * 1000)
    assert host.mapped_data(job(f"data.path={tmp_path}")) == 1000
    assert host.mapped_data(job("data.path=/nowhere")) == 0


# ---------------------------------------------------------------------------------------- proposals

OVERRIDES = {
    "too long": ["data.seq_len=262144"],
    "nothing recomputed": ["train.recompute=none"],
    "one GPU": ["train.rows_per_step=8"],
    "wasteful": ["parallel.sp=8", "zero.offload_optimizer=true"],
}
PLANS = {case: plan(*overrides) for case, overrides in OVERRIDES.items()}
PLANS["one GPU"] = plan(*OVERRIDES["one GPU"], gpus=1, gpu="h200")


@cache
def proposals_for(case: str) -> list[Proposal]:
    return propose(PLANS[case])


@pytest.mark.parametrize("case", PLANS)
def test_proposals_fit_when_they_are_planned_from_the_command_line(case: str) -> None:
    original, proposals = PLANS[case], proposals_for(case)
    assert 1 <= len(proposals) <= MAX_PROPOSALS
    costs = [proposal.plan.cost for proposal in proposals]
    assert costs == sorted(costs)
    for proposal in proposals:
        words = str(proposal).split()
        gpus = original.gpus
        if "--gpus" in words:
            place = words.index("--gpus")
            gpus = int(words[place + 1])
            del words[place : place + 2]
        again = make_plan(llama(*OVERRIDES[case], *words), gpus, original.gpu)
        assert again.memory.needed <= (1 - SPARE) * original.gpu.memory
        assert again.memory == proposal.plan.memory
        assert again.cost == proposal.plan.cost
        if original.fits:
            assert again.cost < original.cost * (1 - GAIN)


def test_a_change_that_does_not_help_is_not_proposed() -> None:
    for case, original in PLANS.items():
        for proposal in proposals_for(case):
            for left_out in proposal.changes:
                rest = tuple(change for change in proposal.changes if change != left_out)
                config, gpus = apply(original, rest)
                try:
                    less = make_plan(config, gpus, original.gpu)
                except UserError:
                    continue  # the others need it
                has_room = less.margin >= SPARE * original.gpu.memory
                assert not has_room or less.cost > proposal.plan.cost


def test_what_is_good_already_is_left_alone() -> None:
    good = plan("train.micro_batch=2")
    assert good.fits
    assert propose(good) == []
    assert "no change costs noticeably less" in format_plan(good, [], "name")


def test_nothing_is_proposed_where_the_model_cannot_start() -> None:
    small = plan(gpu="12")
    assert not small.fits
    assert propose(small) == []
    assert "the whole model at the start" in format_plan(small, [], "name")


def test_bf16_moments_are_said_to_change_training() -> None:
    (proposal,) = [p for p in proposals_for("one GPU") if p.settings == ("optim.state_dtype",)]
    text = format_plan(PLANS["one GPU"], [proposal], "name")
    assert "optim.state_dtype=bf16 (changes training)" in text


@pytest.mark.parametrize("overrides", [(), ("parallel.sp=8",), ("model.fold=[]",)])
def test_the_longest_row_fits_and_a_longer_one_does_not(overrides: tuple[str, ...]) -> None:
    length = longest_row(plan(*overrides))
    unit = 8192 if overrides == ("parallel.sp=8",) else 1024
    assert length >= 32768
    assert plan(*overrides, f"data.seq_len={length}").fits
    assert not plan(*overrides, f"data.seq_len={length + unit}").fits
    assert longest_row(plan(*overrides, gpu="20")) == 0


def test_perplexity_during_training_is_told_by_length() -> None:
    assert not plan().evaluations
    assert not plan("eval.every=100", "eval.tasks=['passkey']", "zero.stage=2").evaluations
    assert list(plan("eval.every=100").evaluations) == [32768]  # that of the rows
    planned = plan("eval.every=100", "eval.lengths=[32768,2097152]", "train.mlp_chunk=8192")
    short, long = planned.evaluations.values()
    assert short.allocated < planned.memory.allocated  # nothing is kept for a backward
    assert long.needed > planned.gpu.memory
    assert planned.fits  # training does, and goes on
    report = format_plan(planned, [], "it")
    assert f"perplexity at 32,768 tokens: {short.needed / GIB:.1f} GiB, fits\n" in report
    line = f"perplexity at 2,097,152 tokens: {long.needed / GIB:.1f} GiB, does not fit and will be"
    assert line in report


@pytest.mark.parametrize("task", ["passkey", "niah", "ruler"])
def test_prompts_during_training_are_told_by_length(task: str) -> None:
    settings = [f"eval.tasks=['ppl','{task}']", "zero.stage=2"]
    assert not plan(*settings).prompts  # never evaluated
    assert not plan("eval.every=100").prompts  # perplexity has none
    planned = plan(*settings, "eval.every=100", "eval.lengths=[8192,2097152]")
    short, long = planned.prompts.values()
    assert long.needed > planned.gpu.memory
    report = format_plan(planned, [], "it")
    assert f"prompts of 8,192 tokens: {short.needed / GIB:.1f} GiB, fits\n" in report
    line = f"prompts of 2,097,152 tokens: {long.needed / GIB:.1f} GiB, does not fit and will be"
    assert line in report
    assert list(plan_json(planned, [])["prompts"]) == [8192, 2097152]
    # A prompt is on one rank, however many share a row in training.
    shared = plan(*settings, "eval.every=100", "eval.lengths=[8192]", "parallel.sp=8")
    assert shared.prompts[8192].peak.parts["cache"] == short.peak.parts["cache"]


def test_the_largest_phase_decides() -> None:
    config = load_config(ROOT / "configs/llama8b_128k.toml", ["parallel.sp=1"])
    planned = make_plan(config, 8, GPUS["h200"])
    assert [job.phase.seq_len for job in planned.jobs] == [8192, 32768, 131072]
    assert planned.largest == 2
    assert planned.memory.needed == max(memory.needed for memory in planned.memories)


# ----------------------------------------------------------------------------------------- launcher


def launch(*arguments: str) -> Completed:
    return run_forked("plan.py", "--config", LLAMA, *arguments)


def test_launcher_tells_what_does_not_fit_and_what_would(tmp_path: Path) -> None:
    output = tmp_path / "plan.json"
    result = launch("--gpus", "1", "--gpu", "h200", "--json", str(output), "train.rows_per_step=8")
    assert result.returncode == 0, result.stderr
    numbers = json.loads(output.read_text())
    original = PLANS["one GPU"]
    assert not numbers["fits"]
    assert numbers["needed_bytes"] == original.memory.needed
    assert numbers["allocated_bytes"] == sum(numbers["phases"][numbers["peak"]].values())
    assert numbers["step_seconds"] == pytest.approx(sum(numbers["time"].values()))
    assert len(numbers["proposals"]) == len(proposals_for("one GPU"))
    for text in (
        f"{LLAMA} on 1 x H200: 8.03 B parameters", "predicted from formulas",
        f"does not fit: {original.memory.needed / GIB:.1f} of 139 GiB", "largest part is moments",
        "host memory:", "MFU", "optim.state_dtype=bf16",
    ):  # fmt: skip
        assert text in result.stdout


def test_launcher_refuses_what_cannot_be_planned() -> None:
    result = launch("--gpus", "3", "parallel.sp=2")
    assert result.returncode == 2
    assert result.stderr == "error: parallel.sp: sp = 2 does not divide 3 ranks (legal sp: 1, 3)\n"
    assert result.stdout == ""


def test_routed_layers_are_planned() -> None:
    path = ROOT / "configs/llama8b_32k.toml"
    plans = {
        name: make_plan(load_config(path, overrides), 8, find_gpu("h200"))
        for name, overrides in {
            "routed": [], "window": ["model.layers=[" + "'window'," * 31 + "'routed']"],
            "full": ["model.layers=[" + "'full'," * 31 + "'routed']"],
        }.items()
    }  # fmt: skip
    times = {name: plan.time.parts["attention"] for name, plan in plans.items()}
    assert times["window"] < times["routed"] < times["full"]
    # Of one layer, 19.9 ms were measured (kernels/README.md), and the rates are of 131,072 tokens.
    rows = plans["routed"].jobs[-1].micro_batches
    assert times["routed"] / 32 / rows == pytest.approx(19.91e-3, rel=0.05)
    assert plans["routed"].memory.allocated > plans["window"].memory.allocated
