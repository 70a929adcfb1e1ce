"""Load a Hugging Face folder, exported or any Llama's, by this installation's code alone."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tensorlm.runtime.errors import UserError

from .configuration_tensorlm import TensorLMConfig
from .modeling_tensorlm import TensorLMForCausalLM
from .weight_files import check_finite, weight_files


def load_folder(folder: Path, dtype: torch.dtype | str = "auto") -> LlamaForCausalLM:
    """The model of a folder, on the CPU; no code in the folder is run.

    Args:
        folder: with `config.json` and safetensors files.
        dtype: of the weights; "auto": as they are stored.

    Raises:
        UserError: it is damaged, not a Llama, its weights are not those of its configuration, or
            one is not finite.
    """
    weight_files(folder)  # reports what is missing, and what transformers would read instead
    try:
        fields, _ = LlamaConfig.get_config_dict(folder, local_files_only=True)
        is_ours = fields.get("model_type") == TensorLMConfig.model_type
        # Not registered with AutoConfig: folders whose code is trusted would get this class, too.
        kind: Any = TensorLMForCausalLM if is_ours else AutoModelForCausalLM
        model, info = kind.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, dtype=dtype,
            ignore_mismatched_sizes=True, output_loading_info=True, use_safetensors=True,
        )  # fmt: skip
    except Exception as error:  # safetensors and the checks of a configuration have their own kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{folder}: cannot be loaded ({reason[:200]})") from None
    if not isinstance(model, LlamaForCausalLM):
        raise UserError(f"{folder}: a {type(model).__name__}, not a Llama")
    # Such weights would be random numbers.
    strange = sorted(info["missing_keys"]) or sorted(name for name, *_ in info["mismatched_keys"])
    if strange:
        what = "missing" if info["missing_keys"] else "not of the shape in config.json"
        raise UserError(f"{folder}: {strange[0]} is {what} (export or download it again)")
    for name, parameter in model.named_parameters():
        check_finite(folder, name, parameter.detach())
    return model
