"""The DeepSpeed engine. No other module imports DeepSpeed.

All ranks form one ZeRO group. DeepSpeed computes and reduces gradients and applies steps; the
learning rate, counters, loss scaling and checkpoints are ours. Checkpoints read and write this
rank's share of the fp32 weights and Adam state through `parameter_slices`, at every ZeRO stage.
"""

import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from fold_parallel import Grid
from tensorlm.checkpoint import STATE, ParameterSlice
from tensorlm.config import Config
from tensorlm.model import Llama, WeightInit, create_llama
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.runtime.ranks import join_ranks

from .adamw import LowMemoryAdamW, Piece, new_state
from .optim import create_optimizer


def init_distributed(launch: LaunchEnv) -> torch.device:
    """Join the job's process group (NCCL on GPUs, gloo on CPUs); returns this rank's device."""
    # DeepSpeed uses deprecated names, for older versions of torch.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    deepspeed_logger.setLevel(logging.WARNING)
    device = join_ranks(launch)
    if device.type == "cuda":
        # DeepSpeed takes these for the index of the GPU.
        for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
            os.environ[name] = str(device.index)
    else:
        # Used only for inference, but DeepSpeed would compile it from source at the start. Its own
        # dictionary of operators is not read: that probes each of them, with the C compiler.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    return device


def import_muon() -> None:
    """Import DeepSpeed's Muon without PyTorch's compiler, which takes 5 CPU seconds to import.

    DeepSpeed asks of every optimizer whether it is Muon, and passes Muon's functions to
    `torch.compile` at import. Nothing here calls them.
    """
    compile_decorator = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_decorator


def deepspeed_config(config: Config) -> dict[str, Any]:
    """DeepSpeed's JSON configuration, with every value that matters set explicitly."""
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "memory_efficient_linear": False,  # it would replace F.linear for the whole process
    }
    if config.zero.offload_optimizer:
        pin_memory = torch.cuda.is_available()
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optim.grad_clip if config.zero.stage else 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Stage 1: convert each gradient to fp32 as it is ready, not all at the end of backward.
        "bf16": {"enabled": config.train.dtype == "bf16", "immediate_grad_update": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }


def create_model(config: Config, grid: Grid, device: torch.device, seed: int | None) -> Llama:
    """Create the model of a run for an `Engine`, with random weights of `seed`.

    With `seed` None the weights are arbitrary. At ZeRO stage 3 this is a collective call, and the
    whole model is never in memory: each parameter in turn is created, initialized and divided among
    the ranks.
    """
    if config.zero.stage < 3:
        model = create_llama(config.model, config.train, grid, device)
        if seed is not None:
            model.init_weights(seed)
        return model
    model = create_llama(config.model, config.train, grid, torch.device("meta"))
    weights = None if seed is None else WeightInit(config.model, seed)
    holders: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((module, key))  # tied weights have two
    divide = deepspeed.zero.Init(config_dict_or_path=deepspeed_config(config))
    for name, abstract in list(model.named_parameters()):
        parameter = nn.Parameter(torch.empty_like(abstract, device=device))
        if weights:
            weights.fill(name, parameter)
        else:  # must be finite, like PyTorch's initial weights: benchmarks train on them
            nn.init.normal_(parameter, std=config.model.init_std)
        for module, key in holders[abstract]:
            setattr(module, key, parameter)
        divide._convert_to_zero_parameters([parameter])
    return model


class Engine:
    """A model, its AdamW and DeepSpeed, driven one optimizer step at a time."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        # DeepSpeed adds fields to parameters: Any.
        self._names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
        self._stage = config.zero.stage
        self._grad_clip = config.optim.grad_clip
        self._unsharded_norm = float("nan")
        self._moment_dtype = torch.bfloat16 if config.optim.state_dtype == "bf16" else torch.float32
        adamw = create_optimizer(model, config)
        import_muon()
        if self._stage == 0:
            adamw.register_step_pre_hook(self._clip_unsharded)
        with redirect_stdout(io.StringIO()):  # stage 1 prints its memory use
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=adamw,
                config=deepspeed_config(config),
                dist_init_required=False,
            )
        self._adamw = adamw if self._stage == 0 else self._optimizer.optimizer
        if hasattr(self._optimizer, "_update_hp_grad"):  # DeepSpeed's BF16_Optimizer: stage 1
            self._optimizer._update_hp_grad = self._add_gradient
        if isinstance(adamw, LowMemoryAdamW):
            adamw.name_pieces(self._pieces())

    @property
    def module(self) -> nn.Module:
        """The model, for evaluation."""
        return self._engine.module

    @property
    def adam_step(self) -> int:
        """Number of updates that Adam has made; skipped steps do not count."""
        return max((int(state["step"]) for state in self._adamw.state.values()), default=0)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Compute the summed loss of one micro-batch; `backward` must follow."""
        loss_sum: Tensor = self._engine(*inputs)
        return loss_sum

    def backward(self, scaled_loss: Tensor) -> None:
        """Accumulate the gradient of the last micro-batch.

        Gradients are averaged over ranks. If the summed loss is scaled by world size / labels of
        the whole step, they are the gradients of the mean loss over the step's labels.
        """
        self._engine.backward(scaled_loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Clip and apply the accumulated gradients; returns their norm before clipping.

        If the norm is not finite, no rank has applied the step.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if self._stage == 0:
            return self._unsharded_norm
        norm = self._engine.get_global_grad_norm()
        return float(norm) if self._engine.was_step_applied() else float("nan")

    @torch.no_grad()
    def _add_gradient(self, parameter: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        """Add a bf16 gradient to its float32 sum; DeepSpeed would cast it to float32 first."""
        if parameter.grad is None:
            return
        total = self._optimizer.fp32_groups_gradients[group][index]
        total.add_(parameter.grad.view(total.shape))
        parameter._hp_grad = total
        self._optimizer.fp32_groups_has_gradients[group][index] = True

    def _clip_unsharded(self, *_: Any) -> None:
        """Clip gradients before AdamW steps at stage 0, where DeepSpeed has no gradient norm."""
        gradients = [p.grad for p in self._names if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._unsharded_norm = float(norm)
        if not math.isfinite(self._unsharded_norm):
            for parameter in self._names:
                parameter.grad = None  # AdamW skips parameters without a gradient
        elif self._grad_clip:
            torch.nn.utils.clip_grads_with_norm_(list(self._names), self._grad_clip, norm)

    def parameter_slices(self) -> Iterator[ParameterSlice]:
        """Yield this rank's slices; call `refresh_weights` after writing to them."""
        self._ensure_adam_state()
        for index, (parameter, name) in enumerate(self._names.items()):
            if self._stage == 0:
                yield self._unsharded_slice(parameter, name, index)
            elif self._stage == 3:
                yield self._stage3_slice(parameter, name)
            elif getattr(parameter, "_hp_mapping", None) is not None:
                yield self._flat_slice(parameter, name)

    def _pieces(self) -> dict[Tensor, list[Piece]]:
        """The parameter ranges that each tensor updated by AdamW holds."""
        slices = list(self.parameter_slices())
        held = {state["exp_avg"].data_ptr(): p for p, state in self._adamw.state.items()}
        pieces: dict[Tensor, list[Piece]] = {tensor: [] for tensor in held.values()}
        for part in slices:
            view, size = part.state["exp_avg"], part.stop - part.start
            if size:
                begin = int(view.storage_offset())
                tensor = held[view.data_ptr() - begin * view.element_size()]
                pieces[tensor].append(Piece(part.name, part.start, begin, size))
        return pieces

    def refresh_weights(self, adam_step: int) -> None:
        """Rebuild the working weights after slices were written, and set Adam's step count."""
        for state in self._adamw.state.values():
            state["step"].fill_(adam_step)
        if self._stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self._stage == 3:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self._optimizer.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    def replicas(self) -> dict[str, Tensor]:
        """Working weights that every rank holds in full, and that must be equal on all ranks."""
        return {
            name: parameter.data
            for parameter, name in self._names.items()
            if self._stage < 3 or getattr(parameter, "ds_persist", False)
        }

    def kept(self) -> dict[str, Tensor]:
        """Working weights and Adam state that this rank holds from one step to the next.

        Only `step` and `refresh_weights` change them.
        """
        tensors = {
            name: parameter.ds_tensor if self._stage == 3 else parameter.data
            for parameter, name in self._names.items()
        }
        for piece in self.parameter_slices():
            tensors |= {f"{piece.name}/{key}": value for key, value in piece.state.items()}
        return tensors

    def _ensure_adam_state(self) -> None:
        """Create Adam's state if torch has not: a checkpoint may need it before the first step."""
        if self._stage == 3:
            held = self._optimizer.fp32_partitioned_groups_flat
        else:
            held = [p for group in self._adamw.param_groups for p in group["params"]]
        for p in held:
            if not self._adamw.state[p]:
                step_device = p.device if self._adamw.defaults.get("fused") else torch.device("cpu")
                self._adamw.state[p].update(new_state(p, self._moment_dtype, step_device))

    def _unsharded_slice(self, parameter: nn.Parameter, name: str, index: int) -> ParameterSlice:
        """Slice at stage 0: every rank holds the whole parameter; ownership is round-robin."""
        state = {"master": parameter.data, **self._adamw.state[parameter]}
        views = {key: state[key].view(-1) for key in STATE}
        is_owned = index % dist.get_world_size() == dist.get_rank()
        return ParameterSlice(name, parameter.shape, 0, parameter.numel(), views, is_owned)

    def _flat_slice(self, parameter: Any, name: str) -> ParameterSlice:
        """Slice at stages 1 and 2: a range of this rank's partition of the group's flat buffer."""
        mapping = parameter._hp_mapping
        held, window = mapping.lp_fragment_address, mapping.hp_fragment_address
        (flat,) = self._adamw.param_groups[mapping.param_group_index]["params"]
        state = {"master": flat.detach(), **self._adamw.state[flat]}
        views = {key: state[key].narrow(0, window.start, window.numel) for key in STATE}
        return ParameterSlice(name, parameter.shape, held.start, held.start + held.numel, views)

    def _stage3_slice(self, parameter: Any, name: str) -> ParameterSlice:
        """Slice at stage 3: each parameter is cut into equal parts, the last ones padded."""
        size = parameter.ds_tensor.ds_numel
        start = min(dist.get_rank() * size, parameter.ds_numel)
        stop = min(start + size, parameter.ds_numel)
        views = {}
        for key in STATE:
            which = None if key == "master" else key
            view, _ = self._optimizer._get_fp32_opt_state_partition(
                parameter, release_swap_buffers=False, optim_state_key=which
            )
            views[key] = view.detach()[: stop - start]
        return ParameterSlice(name, parameter.ds_shape, start, stop, views)
