"""Memory of activations on one rank: what blocks keep for the backward, and what one block and the
output head need while they compute. Letters as in `job.py`.

The counts are those of `model.py`, `layers.py` and `loss.py` operation by operation; the tests
compare them with every tensor that PyTorch makes. One rule decides most of them: an operation frees
what it has saved when its own backward is over.
"""

from tensorlm.config import LayerKind

from .job import FP32, Job
from .operator import OperatorMemory, operator_memory

# Hidden states on their way to the host, or back, while the block before or after computes.
OFFLOADS_IN_FLIGHT = 2


def hidden_state(job: Job) -> int:
    """w C t: what one block passes to the next."""
    return job.itemsize * job.config.model.hidden_size * job.tokens


def saved_by_norm(job: Job) -> int:
    """Its input (float32, or as it is where Liger's kernel runs), the product with the weight, and
    one float32 a token; PyTorch's operations also keep the normalized input.
    """
    per_token = FP32 * job.tokens
    if job.runs_liger:
        return 2 * hidden_state(job) + per_token
    return FP32 * job.config.model.hidden_size * job.tokens + 2 * hidden_state(job) + per_token


def saved_by_first_norm(job: Job) -> int:
    """As the others, but an input that is kept as it is is the block's own, counted there."""
    return saved_by_norm(job) - (hidden_state(job) if keeps_own_input(job) else 0)


def keeps_own_input(job: Job) -> bool:
    """Whether a norm keeps its input itself, not a float32 copy."""
    return job.runs_liger or job.itemsize == FP32


def norm_workspace(job: Job) -> int:
    """Tensors at the peak of a norm's backward, its input among them: 6 in float32 (5 where none is
    cast), or Liger's 3 of w bytes.
    """
    if job.runs_liger:
        return 3 * hidden_state(job)
    tensors = 5 if job.itemsize == FP32 else 6
    return tensors * FP32 * job.config.model.hidden_size * job.tokens


def mlp_width(job: Job, tokens: int) -> int:
    """w I of so many tokens: one of SwiGLU's intermediate tensors."""
    return job.itemsize * job.config.model.intermediate_size * tokens


def is_tiled(job: Job) -> bool:
    """Whether SwiGLU sees fewer tokens at one time than one forward pass has."""
    return 0 < job.config.train.mlp_chunk < job.tokens


def saved_by_mlp(job: Job) -> int:
    """gate, up and their product, and by PyTorch's operations silu(gate); nothing in tiles."""
    if is_tiled(job):
        return 0
    return (3 if job.runs_liger else 4) * mlp_width(job, job.tokens)


def saved_by_block(job: Job, operator: OperatorMemory) -> int:
    """All that the backward of a block needs, except its input."""
    norms = saved_by_first_norm(job) + saved_by_norm(job)
    return norms + operator.saved + saved_by_mlp(job)


def kept_by_block(job: Job, operator: OperatorMemory) -> int:
    """What a block keeps on the GPU until its backward: with recomputation, its input, and the
    choice of a routed layer.
    """
    if job.offloads_activations:
        return operator.kept
    if job.recomputes:
        return hidden_state(job) + operator.kept
    input_too = hidden_state(job) if keeps_own_input(job) else 0
    return input_too + saved_by_block(job, operator)


def mlp_peak(job: Job, operator: OperatorMemory, reduction: int) -> int:
    """SwiGLU's backward, before the norms and attention of the block have had theirs.

    By PyTorch's operations six of its tensors at once, and five beside the gradient of `down`, four
    when that is reduced; Liger writes gradients over gate and up, so there are fewer. Last, that of
    gate beside two gradients of the input. In tiles: seven (or four) tensors of one tile beside
    float32 gradients of all three weights.
    """
    norms = saved_by_first_norm(job) + saved_by_norm(job)
    waiting = norms + operator.saved + hidden_state(job)
    weight = job.config.model.hidden_size * job.config.model.intermediate_size
    matrix = job.itemsize * weight
    if is_tiled(job):
        tile = (4 if job.runs_liger else 7) * mlp_width(job, job.config.train.mlp_chunk)
        sums = 3 * FP32 * weight
        inside = sums + max(tile, 3 * matrix)
        return waiting + hidden_state(job) + max(inside, 3 * matrix + reduction)
    width, most, beside = mlp_width(job, job.tokens), 6, 5
    if job.runs_liger:
        most, beside = 4, 4
    return waiting + max(
        most * width, beside * width + matrix, (beside - 1) * width + matrix + reduction,
        width + matrix + 2 * hidden_state(job),
    )  # fmt: skip


def norm_peak(job: Job, operator: OperatorMemory) -> int:
    """The second norm's backward: the first norm and attention wait, the residual is beside it."""
    waiting = saved_by_first_norm(job) + operator.saved + hidden_state(job)
    return waiting + norm_workspace(job) + held_by_tiles(job)


def attention_peak(job: Job, operator: OperatorMemory) -> int:
    """The operator's backward: the first norm waits, the residual is beside it."""
    waiting = saved_by_first_norm(job) + operator.saved + hidden_state(job)
    return waiting + operator.backward + held_by_tiles(job)


def held_by_tiles(job: Job) -> int:
    """Tiles that are not recomputed hold their input until the whole backward is over."""
    return hidden_state(job) if is_tiled(job) and not job.recomputes else 0


def block_peak(job: Job, operator: OperatorMemory, reduction: int = 0) -> int:
    """One block's backward, with all that it keeps or has computed again, except its input (and
    a choice that recomputation has kept).

    `reduction`: bytes that gradients of weights need on their way to other ranks meanwhile.
    """
    if job.recomputes:
        operator = operator._replace(saved=operator.saved - operator.kept)
    return max(
        mlp_peak(job, operator, reduction), norm_peak(job, operator), attention_peak(job, operator)
    )


def saved_activations(job: Job, operators: dict[LayerKind, OperatorMemory], blocks: int) -> int:
    """What the first `blocks` blocks keep."""
    kept = sum(kept_by_block(job, operators[kind]) for kind in job.kinds[:blocks])
    if job.offloads_activations:
        kept += min(blocks, OFFLOADS_IN_FLIGHT) * hidden_state(job)
    return kept


def head_peak(job: Job) -> int:
    """The last norm, and the output head with its gradients, one chunk of logits at a time.

    Float32 gradients of the weight, and those of hidden states. Beside them float32 logits and
    their softmax; or the logits' gradients and the weight's, of one chunk.
    """
    chunk = min(job.config.train.loss_chunk, job.tokens)
    logits = job.config.model.vocab_size * chunk
    beside = max(2 * FP32 * logits, job.itemsize * (logits + job.table))
    return saved_by_norm(job) + hidden_state(job) + FP32 * job.table + beside


def head_gradient(job: Job, reduction: int) -> int:
    """The backward of the head: its weight's gradient, which is cast from float32, or reduced."""
    gradient, chunk = job.itemsize * job.table, min(job.config.train.loss_chunk, job.tokens)
    scaled = FP32 * job.config.model.hidden_size * chunk  # hidden states' gradients, by chunk
    cast = FP32 * job.table if job.itemsize < FP32 else scaled
    # The norm's output is gone, the gradient of it is there.
    return saved_by_norm(job) + gradient + max(cast, reduction)


def embedding_peak(job: Job) -> int:
    """The embedding's backward: the gradients of its output and of the whole table."""
    return hidden_state(job) + job.itemsize * job.table


def shared_gradient(job: Job) -> int:
    """A tied table: the head's part of its gradient waits for the embedding's."""
    return job.itemsize * job.table if job.config.model.tie_embeddings else 0


def rotary_table(job: Job, positions: int | None = None) -> int:
    """4 D per position (of the whole row): a cosine and a sine for each pair."""
    return FP32 * job.config.model.head_size * (positions or job.stage.seq_len)


def batch(job: Job) -> int:
    """Tokens and labels (int64), document starts (int32)."""
    return (8 + 8 + 4) * job.tokens


def operators_of(job: Job) -> dict[LayerKind, OperatorMemory]:
    """The attention operator of each kind of layer, on a GPU."""
    return {kind: operator_memory(job, kind) for kind in set(job.kinds)}
