"""The README.md of an exported folder: the model, its training, and how to load it."""

from pathlib import Path
from typing import Any

import tensorlm
from tensorlm.config import Config, attention_in_words

from .llama_config import needs_code

_LOAD = """## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER%(trust)s)
tokenizer = AutoTokenizer.from_pretrained(FOLDER%(trust)s)
```
"""
_CODE_NOTES = """
The folder includes PyTorch code (hence `trust_remote_code`). If tensorlm is installed, its kernels
are used. Weights have Llama's names, plus `self_attn.hop_bias` in strided layers.
`LlamaForCausalLM.from_pretrained(FOLDER)` loads them as a plain Llama with full attention, which
agrees with this model only within the window (the first axis of a fold).
"""
_KIND_NOTES = {
    "strided": """
Attention follows *Long Sequence Modeling with Attention Tensorization* (Feng, Ying, Tassiulas,
EMNLP 2024 Findings, arXiv 2410.20926), but folds distances instead of absolute positions.
""",
    "routed": """
In routed layers, a token reads its window, the first block of its document, and the `top_k` blocks
that score highest. A block consists of parts of `pool` tokens. Its score is that of its best part,
by the part's mean key. Beyond the window, rotary positions are divided by `stretch`.
""",
}


def model_card(
    manifest: dict[str, Any],
    config: Config,
    dtype: str,
    imported_from: str | None,
    prompts: str | None = None,
) -> str:
    """Make the Hugging Face model card of a checkpoint.

    Args:
        manifest: the checkpoint's manifest, with the steps and tokens actually trained.
        config: the run's configuration.
        dtype: dtype of the exported weights, and their rounding.
        imported_from: name of the folder whose weights the run started from, or None.
        prompts: instructions for the beginning of prompts (`describe_prompts`), or None.
    """
    model, data, train = config.model, config.data, config.train
    optim, state = config.optim, manifest["state"]
    has_code = needs_code(model)
    kinds = " and ".join(dict.fromkeys(model.layer_kinds))
    facts = {
        "Attention": attention_in_words(model),
        "Layers, hidden size, MLP size": (
            f"{model.num_layers}, {model.hidden_size}, {model.intermediate_size}"
        ),
        "Query heads, key/value heads": f"{model.num_heads}, {model.num_kv_heads}",
        "Vocabulary": f"{model.vocab_size:,}",
        "Trained": f"{state['step']:,} steps, {state['tokens']:,} tokens",
        "Rows": (
            f"{data.seq_len:,} tokens, {train.rows_per_step} per step, packing `{data.packing}`"
        ),
        "Optimizer": (
            f"AdamW, learning rate {optim.lr:g} ({optim.schedule}), betas {list(optim.betas)}, "
            f"weight decay {optim.weight_decay:g}, gradient clipping {optim.grad_clip:g}"
        ),
        "Precision": f"trained in {train.dtype}, fp32 master weights; these weights: {dtype}",
        "Seed": str(config.run.seed),
        "Data fingerprint": f"`{manifest.get('data_fingerprint') or 'none'}`",
        "Started from": imported_from or "random weights",
        "Written by": f"tensorlm {tensorlm.__version__}",
    }
    notes = f"\n**Prompts.** {prompts[0].upper()}{prompts[1:]}.\n" if prompts else ""
    notes += _CODE_NOTES if has_code else ""
    for kind, note in _KIND_NOTES.items():
        notes += note if kind in model.layer_kinds else ""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [tensorlm, llama, long-context]
---

# {Path(config.run.dir).name}

A Llama decoder with {kinds} attention, trained with tensorlm.

| | |
| --- | --- |
{rows}

{_LOAD % {"trust": ", trust_remote_code=True" if has_code else ""}}{notes}"""
