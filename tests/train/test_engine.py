"""The model that an engine is made of, divided while it is made; what it imports."""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from fold_parallel import Grid
from tensorlm.config import Config
from tensorlm.model import create_llama
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.train.engine import Engine, create_model, import_muon, init_distributed
from tensorlm.train.optim import parameter_groups
from tests.support.counted import small
from tests.support.distributed import run_distributed


def divided_weights(config: Config, seed: int) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """Every parameter put together from the ranks' shards, and names by the optimizer's group."""
    rank, size = dist.get_rank(), dist.get_world_size()
    device = init_distributed(LaunchEnv(rank, size, rank, size, "127.0.0.1", 0))
    model = create_model(config, Grid(size, rank), device, seed)
    whole, names = {}, {}
    parameter: Any  # DeepSpeed adds fields
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0  # nothing is left of it but its shard
        shards = [torch.empty_like(parameter.ds_tensor) for _ in range(size)]
        dist.all_gather(shards, parameter.ds_tensor.data)
        whole[name] = torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)
        names[parameter] = name
    groups = [[names[p] for p in g["params"]] for g in parameter_groups(model, config.optim)]
    return whole, groups


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_zero_3_makes_the_weights_of_any_other_stage(dtype: str, tied: bool) -> None:
    config = small(
        zero__stage=3, train__dtype=dtype, model__tie_embeddings=tied, model__fold="[16]",
        train__rows_per_step=2,
    )  # fmt: skip
    model = create_llama(config.model, config.train, Grid(), torch.device("cpu"))
    model.init_weights(7)
    expected = dict(model.named_parameters())
    names = {p: name for name, p in expected.items()}
    groups = [[names[p] for p in g["params"]] for g in parameter_groups(model, config.optim)]
    for whole, own_groups in run_distributed(divided_weights, 2, config, 7, time_limit=120):
        assert list(whole) == list(expected)
        for name, parameter in expected.items():
            assert whole[name].dtype == parameter.dtype
            assert torch.equal(whole[name], parameter), name
        assert own_groups == groups


def test_deepspeeds_muon_is_imported_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*args: Any, **options: Any) -> None:
        raise AssertionError("torch.compile takes seconds")

    for name in [name for name in sys.modules if ".zero.muon." in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch, "compile", compiled)
    import_muon()
    assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules
    assert compiler.compile() is compiled  # for whoever compiles afterwards


def test_deepspeed_adds_gradients_by_the_method_that_the_engine_replaces() -> None:
    hook = BF16_Optimizer.accumulate_hp_grads_and_remove_lp
    assert "_update_hp_grad" in hook.__code__.co_names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_added_to_the_bits_of_deepspeeds_method(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before, grads = torch.randn(2, 15), torch.randn(2, 3, 5).to(dtype)

    def added(by_us: bool) -> list[Any]:
        sums = [before[0].clone(), before[1].clone()]
        optimizer = SimpleNamespace(
            fp32_groups_gradients=[sums],
            fp32_groups_has_gradients=[[False, False]],
            autoep_folding_tp_group=None,
        )
        engine: Any = object.__new__(Engine)
        engine._optimizer = optimizer
        add = engine._add_gradient if by_us else partial(BF16_Optimizer._update_hp_grad, optimizer)
        parameter: Any = torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype))
        add(parameter, 0, 0, False)  # without a gradient
        for grad in grads:
            parameter.grad = grad.clone()
            add(parameter, 0, 1, False)
        assert parameter._hp_grad is sums[1]
        assert torch.equal(parameter.grad, grads[1])  # the sum alone changes
        return [*sums, optimizer.fp32_groups_has_gradients]

    ours, theirs = added(True), added(False)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[1], before[1])
    assert ours[2] == theirs[2] == [[False, True]]
