"""Memory of prompts in the middle of training (passkey, needles, RULER): a cache, and the pass that
fills it.

Each rank answers prompts of its own with a generating model on the same weights, so that a whole
prompt is on one rank, whatever `sp` is. It is read `eval.prefill_chunk` tokens at a time. The
counts are those of `hf/cache_tensorlm.py` and `hf/modeling_tensorlm.py`. Letters as in `job.py`,
but t is the tokens of a prompt with its answer, and n those of one pass.
"""

from dataclasses import dataclass

from tensorlm.config import LayerKind
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
        """w H D of so many tokens: q, or z of a hop."""
        model = self.job.config.model
        return self.job.itemsize * model.num_heads * model.head_size * tokens

    def keys(self, tokens: int) -> int:
        """w K D of so many tokens: k, or v."""
        model = self.job.config.model
        return self.job.itemsize * model.num_kv_heads * model.head_size * tokens


def prompt_lengths(job: Job) -> list[int]:
    """Lengths at which prompts are answered during training; none without such tasks."""
    settings = job.config.eval
    if not settings.every or not set(settings.tasks) & set(GENERATION_TASKS):
        return []
    return sorted(settings.lengths or (job.config.data.seq_len,))


def cache(prompt: PromptPass) -> int:
    """What all layers keep of a prompt.

    A strided layer: keys and z of every hop but the last, of all tokens; values of the newest pass
    and the inner axis in front of it, with a quarter to spare. A full layer: keys and values. A
    window layer: those of the newest pass and the window in front. A routed layer: keys and values
    of all tokens, keys once more as a window layer, and the mean keys of its blocks.
    """
    model, everything = prompt.job.config.model, prompt.keys(prompt.length)
    seen = prompt.tokens + (model.window_size if prompt.length > prompt.tokens else 0)
    newest = prompt.keys(seen + max(64, seen // 4))
    means = prompt.keys(prompt.length // model.route.block) if model.route else 0
    sizes = {
        "full": 2 * everything,
        "window": 2 * newest,
        "strided": everything + newest + len(model.fold) * prompt.queries(prompt.length),
        "routed": 2 * everything + newest + means,
    }
    return sum(sizes[kind] for kind in prompt.job.kinds)


def prompt_pass(prompt: PromptPass) -> int:
    """The largest of a block's parts.

    Three hidden states wait: the embeddings, the block's input, and the sum that follows attention.
    """
    parts = [_norm(prompt), _mlp(prompt), *(_attention(prompt, kind) for kind in prompt.job.kinds)]
    return 3 * prompt.hidden + max(parts)


def _norm(prompt: PromptPass) -> int:
    """Two float32 tensors, whatever w is."""
    return 2 * FP32 * prompt.job.config.model.hidden_size * prompt.tokens


def _mlp(prompt: PromptPass) -> int:
    """Its input, silu(gate), up and their product; there are no tiles."""
    model = prompt.job.config.model
    return prompt.hidden + 3 * prompt.job.itemsize * model.intermediate_size * prompt.tokens


def _attention(prompt: PromptPass, kind: LayerKind) -> int:
    """q and z beside one hop, which runs on all rows within reach where earlier passes have been.

    A full layer: q and keys rotated, and z in the kernel's order and the model's. Of window and
    routed layers an estimate: the same, and a choice's keys once more.
    """
    new, rows = prompt.queries(prompt.tokens), prompt.length
    if kind == "window":
        return 4 * new + 2 * prompt.keys(rows)
    if kind == "routed":
        return 4 * new + 3 * prompt.keys(rows)
    if kind == "full":
        mask = prompt.tokens * rows if set(prompt.job.kinds) == {"full"} else 0
        return 4 * new + 2 * prompt.keys(rows) + (mask if rows > prompt.tokens else 0)
    padded = 2 * prompt.queries(rows) if rows > prompt.tokens else 0  # q, and z of the hop before
    return 2 * new + padded + prompt.queries(rows) + 2 * prompt.keys(rows)
