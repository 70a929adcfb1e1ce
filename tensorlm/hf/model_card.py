"""The README.md of an exported folder: what the model is, how it was trained, how to load it."""

from pathlib import Path
from typing import Any

import tensorlm
from tensorlm.config import Config

_LOAD = """## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER%(trust)s)
tokenizer = AutoTokenizer.from_pretrained(FOLDER%(trust)s)
```
"""
_FOLDED_NOTES = """
The folder carries its own PyTorch code (hence `trust_remote_code`); where tensorlm is installed its
kernels are used. The weights have Llama's names, plus `self_attn.hop_bias`:
`LlamaForCausalLM.from_pretrained(FOLDER)` loads them as a plain Llama with full attention, which
agrees with this model inside the first axis only.

Attention follows *Long Sequence Modeling with Attention Tensorization* (Feng, Ying, Tassiulas,
EMNLP 2024 Findings, arXiv 2410.20926), with distances folded instead of absolute positions.
"""


def model_card(
    manifest: dict[str, Any],
    config: Config,
    dtype: str,
    imported_from: str | None,
    prompts: str | None = None,
) -> str:
    """Hugging Face model card of a checkpoint.

    Args:
        manifest: the checkpoint's, for what really happened.
        config: the run's configuration.
        dtype: "bf16" or "fp32", of the exported weights, and how they were rounded.
        imported_from: name of the folder whose weights the run started from.
        prompts: what to do so that prompts begin as documents did.
    """
    model, data, train = config.model, config.data, config.train
    optim, state = config.optim, manifest["state"]
    attention = "full attention" if not model.fold else f"fold `{list(model.fold)}`"
    if model.fold and model.full_every:
        attention += f", every {model.full_every}. layer full attention"
    facts = {
        "Attention": attention,
        "Layers, hidden size, MLP size": (
            f"{model.num_layers}, {model.hidden_size}, {model.intermediate_size}"
        ),
        "Query heads, key/value heads": f"{model.num_heads}, {model.num_kv_heads}",
        "Vocabulary": f"{model.vocab_size:,}",
        "Trained": f"{state['step']:,} steps, {state['tokens']:,} tokens",
        "Rows": f"{data.seq_len:,} tokens, {train.rows_per_step} a step, packing `{data.packing}`",
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
    notes += _FOLDED_NOTES if model.fold else ""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [tensorlm, llama, long-context]
---

# {Path(config.run.dir).name}

A Llama decoder with {"tensorized" if model.fold else "full"} attention, trained with tensorlm.

| | |
| --- | --- |
{rows}

{_LOAD % {"trust": ", trust_remote_code=True" if model.fold else ""}}{notes}"""
