"""Loading a Hugging Face folder, exported or of any Llama, without running its code."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tensorlm.runtime.errors import UserError

from .configuration_tensorlm import TensorLMConfig
from .modeling_tensorlm import TensorLMForCausalLM
from .weight_files import check_finite, weight_files


def load_folder(folder: Path, dtype: torch.dtype | str = "auto") -> LlamaForCausalLM:
    """Load the model of a folder on the CPU; code in the folder is not run.

    Args:
        folder: folder with `config.json` and safetensors files.
        dtype: dtype of the weights; "auto": as stored.

    Raises:
        UserError: the folder is damaged or not a Llama, its weights do not match its configuration,
            or a weight is not finite.
    """
    weight_files(folder)  # reports missing files, and files that transformers would read instead
    try:
        fields, _ = LlamaConfig.get_config_dict(folder, local_files_only=True)
        is_ours = fields.get("model_type") == TensorLMConfig.model_type
        # Not registered with AutoConfig, or folders with trusted code would get this class too.
        kind: Any = TensorLMForCausalLM if is_ours else AutoModelForCausalLM
        model, info = kind.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, dtype=dtype,
            ignore_mismatched_sizes=True, output_loading_info=True, use_safetensors=True,
        )  # fmt: skip
    except Exception as error:  # safetensors and the configuration raise their own classes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{folder}: cannot be loaded ({reason[:200]})") from None
    if not isinstance(model, LlamaForCausalLM):
        raise UserError(f"{folder}: must be a Llama, got a {type(model).__name__}")
    # transformers fills missing weights with random numbers.
    strange = sorted(info["missing_keys"]) or sorted(name for name, *_ in info["mismatched_keys"])
    if strange:
        what = "is missing" if info["missing_keys"] else "must have the shape given by config.json"
        raise UserError(f"{folder}: {strange[0]} {what} (export or download the folder again)")
    for name, parameter in model.named_parameters():
        check_finite(folder, name, parameter.detach())
    return model
