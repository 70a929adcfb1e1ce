"""Memory of prompts during training (passkey, needles, RULER): the cache, and the pass filling it.

Each rank answers different prompts with a generating model on the same weights, so a whole prompt
is on one rank for any `sp`. The prompt is read `eval.prefill_chunk` tokens at a time. The counts
follow `hf/cache_tensorlm.py` and `hf/modeling_tensorlm.py`. Letters as in `job.py`, except that t
is the number of tokens of a prompt with its answer, and n that of one pass.
"""

from dataclasses import dataclass

from tensor_attention.routing import num_parts
from tensorlm.config import LayerKind, RouteConfig
from tensorlm.config.evaluation import GENERATION_TASKS

from .job import FP32, Job


@dataclass(frozen=True)
class PromptPass:
    """The last pass over a prompt of `length` tokens on one rank. All sizes are in bytes."""

    job: Job
    length: int

    @property
    def tokens(self) -> int:
        """n: tokens of one pass."""
        return min(self.length, self.job.config.eval.prefill_chunk)

    @property
    def hidden(self) -> int:
        """w C n: the hidden states."""
        return self.job.itemsize * self.job.config.model.hidden_size * self.tokens

    def queries(self, tokens: int) -> int:
        """w H D `tokens`: q, or z of a hop."""
        model = self.job.config.model
        return self.job.itemsize * model.num_heads * model.head_size * tokens

    def keys(self, tokens: int) -> int:
        """w K D `tokens`: k, or v."""
        model = self.job.config.model
        return self.job.itemsize * model.num_kv_heads * model.head_size * tokens


def prompt_lengths(job: Job) -> list[int]:
    """Lengths of the prompts answered during training; empty without such tasks."""
    settings = job.config.eval
    if not settings.every or not set(settings.tasks) & set(GENERATION_TASKS):
        return []
    return sorted(settings.lengths or (job.config.data.seq_len,))


def cache(prompt: PromptPass) -> int:
    """Bytes of the cache of all layers.

    A strided layer keeps keys and z of every hop but the last, for all tokens, and values of one
    inner axis, with a quarter in reserve. A full layer keeps keys and values. A window layer keeps
    those of one window. A routed layer keeps keys and values of all tokens, rotated keys like a
    window layer, the mean keys of its blocks' parts, and the last keys before rotation.
    """
    model, everything = prompt.job.config.model, prompt.keys(prompt.length)
    stay = model.window_size
    if prompt.tokens <= max(stay, 64):  # a short pass is appended to the kept rows
        stay = prompt.tokens + (stay if prompt.length > prompt.tokens else 0)
    newest = prompt.keys(stay + max(64, stay // 4))
    pooled = _pooled(prompt, model.route) if model.route else 0
    sizes = {
        "full": 2 * everything,
        "window": 2 * newest,
        "strided": everything + newest + len(model.fold) * prompt.queries(prompt.length),
        "routed": 2 * everything + newest + pooled,
    }
    return sum(sizes[kind] for kind in prompt.job.kinds)


def _pooled(prompt: PromptPass, route: RouteConfig) -> int:
    """Mean keys, and the keys of the last blocks with a quarter in reserve."""
    recent = 2 * route.block
    parts = num_parts(route.block, route.pool)
    return prompt.keys(prompt.length // route.block * parts + recent + max(64, recent // 4))


def prompt_pass(prompt: PromptPass) -> int:
    """Peak of a pass: the largest part of a block, with two hidden states.

    These are the block's input and the sum after attention.
    """
    parts = [_norm(prompt), _mlp(prompt), *(_attention(prompt, kind) for kind in prompt.job.kinds)]
    return 2 * prompt.hidden + max(parts)


def _norm(prompt: PromptPass) -> int:
    """Two float32 tensors, for any w."""
    return 2 * FP32 * prompt.job.config.model.hidden_size * prompt.tokens


def _mlp(prompt: PromptPass) -> int:
    """The input of SwiGLU, silu(gate), up and their product; it is not tiled."""
    model = prompt.job.config.model
    return prompt.hidden + 3 * prompt.job.itemsize * model.intermediate_size * prompt.tokens


def _attention(prompt: PromptPass, kind: LayerKind) -> int:
    """q and z, and one hop, which runs on all earlier tokens within reach.

    Full layer: rotated q and keys, and z in the kernel's and the model's layout. Window and routed
    layers (an estimate): the same, and for a choice the keys once more.
    """
    new, rows = prompt.queries(prompt.tokens), prompt.length
    if kind == "window":
        return 4 * new + 2 * prompt.keys(rows)
    if kind == "routed":
        return 4 * new + 3 * prompt.keys(rows)
    if kind == "full":
        mask = prompt.tokens * rows if set(prompt.job.kinds) == {"full"} else 0
        return 4 * new + 2 * prompt.keys(rows) + (mask if rows > prompt.tokens else 0)
    padded = 2 * prompt.queries(rows) if rows > prompt.tokens else 0  # q, and z of the last hop
    return 2 * new + padded + prompt.queries(rows) + 2 * prompt.keys(rows)
