"""Memory of activations on one rank: what blocks keep for the backward, and what one block and the
output head need while they compute. Letters as in `job.py`.

The counts are those of `model.py`, `layers.py` and `loss.py` operation by operation; the tests
compare them with every tensor that PyTorch makes. One rule decides most of them: an operation frees
what it has saved when its own backward is over.
"""

from .job import MASTER, Job
from .operator import OperatorMemory, operator_memory

Fold = tuple[int, ...]

# Hidden states on their way to the host, or back, while the block before or after computes.
OFFLOADS_IN_FLIGHT = 2


def hidden_state(job: Job) -> int:
    """w C t: what one block passes to the next."""
    return job.itemsize * job.config.model.hidden_size * job.tokens


def saved_by_norm(job: Job) -> int:
    """RMSNorm keeps its input in float32, that normalized, the product with the weight, and one
    float32 a token.
    """
    return (
        MASTER * job.config.model.hidden_size * job.tokens + 2 * hidden_state(job) + 4 * job.tokens
    )


def saved_by_first_norm(job: Job) -> int:
    """As the others, but a float32 input is the block's own, which is counted with the block."""
    return saved_by_norm(job) - (hidden_state(job) if job.itemsize == MASTER else 0)


def norm_workspace(job: Job) -> int:
    """6 float32 tensors at the peak of a norm's backward, its input among them."""
    return 6 * MASTER * job.config.model.hidden_size * job.tokens


def mlp_width(job: Job, tokens: int) -> int:
    """w I of so many tokens: one of SwiGLU's intermediate tensors."""
    return job.itemsize * job.config.model.intermediate_size * tokens


def chunked(job: Job) -> bool:
    """Whether SwiGLU sees fewer tokens at one time than one forward pass has."""
    return 0 < job.config.train.mlp_chunk < job.tokens


def saved_by_mlp(job: Job) -> int:
    """gate, silu(gate), up and their product; nothing in chunks, which are computed again."""
    return 0 if chunked(job) else 4 * mlp_width(job, job.tokens)


def saved_by_block(job: Job, operator: OperatorMemory) -> int:
    """All that the backward of a block needs, except its input."""
    norms = saved_by_first_norm(job) + saved_by_norm(job)
    return norms + operator.saved + saved_by_mlp(job)


def kept_by_block(job: Job, operator: OperatorMemory) -> int:
    """What a block keeps on the GPU until its backward: with recomputation, its input alone."""
    if job.offloads_activations:
        return 0
    if job.recomputes:
        return hidden_state(job)
    input_too = hidden_state(job) if job.itemsize == MASTER else 0
    return input_too + saved_by_block(job, operator)


def mlp_peak(job: Job, operator: OperatorMemory, reduction: int) -> int:
    """SwiGLU's backward, before the norms and attention of the block have had theirs.

    Six of its tensors at once, or five while gradients are reduced after that of `down`. In chunks,
    weights' gradients add up from chunk to chunk: the sum of all three, and two of one more.
    """
    norms = saved_by_first_norm(job) + saved_by_norm(job)
    waiting = norms + operator.saved + hidden_state(job)
    matrix = job.itemsize * job.config.model.hidden_size * job.config.model.intermediate_size
    if chunked(job):
        chunk = 6 * mlp_width(job, job.config.train.mlp_chunk) + hidden_state(job)
        return waiting + max(chunk + 5 * matrix, 3 * matrix + reduction)
    width = mlp_width(job, job.tokens)
    return waiting + max(6 * width, 5 * width + matrix + reduction)


def norm_peak(job: Job, operator: OperatorMemory) -> int:
    """The second norm's backward: the first norm and attention wait, the residual is beside it."""
    waiting = saved_by_first_norm(job) + operator.saved + hidden_state(job)
    return waiting + norm_workspace(job)


def attention_peak(job: Job, operator: OperatorMemory) -> int:
    """The operator's backward: the first norm waits, the residual is beside it."""
    waiting = saved_by_first_norm(job) + operator.saved + hidden_state(job)
    return waiting + operator.backward


def block_peak(job: Job, operator: OperatorMemory, reduction: int = 0) -> int:
    """One block's backward, with all that it keeps or has computed again, except its input.

    `reduction`: bytes that gradients of weights need on their way to other ranks meanwhile.
    """
    return max(
        mlp_peak(job, operator, reduction), norm_peak(job, operator), attention_peak(job, operator)
    )


def saved_activations(job: Job, operators: dict[Fold, OperatorMemory], blocks: int) -> int:
    """What the first `blocks` blocks keep."""
    kept = sum(kept_by_block(job, operators[fold]) for fold in job.folds[:blocks])
    if job.offloads_activations:
        kept += min(blocks, OFFLOADS_IN_FLIGHT) * hidden_state(job)
    return kept


def head_peak(job: Job) -> int:
    """The last norm and the output head's backward, one chunk of logits at a time.

    12 V chunk: float32 logits' log-softmax and two gradients of it. With several chunks the
    gradient of the head's weight is added up, three of them for a moment, and the gradients of
    hidden states gather.
    """
    chunk = min(job.config.train.loss_chunk, job.tokens)
    logits = job.config.model.vocab_size * chunk
    gradient = job.itemsize * job.table
    if chunk == job.tokens:
        peak = max(3 * MASTER * logits, job.itemsize * logits + gradient)
    else:
        peak = hidden_state(job) + max(
            3 * MASTER * logits + gradient, job.itemsize * logits + 2 * gradient, 3 * gradient
        )
    return saved_by_norm(job) + peak


def embedding_peak(job: Job) -> int:
    """The embedding's backward: the gradients of its output and of the whole table."""
    return hidden_state(job) + job.itemsize * job.table


def shared_gradient(job: Job) -> int:
    """A tied table: the head's part of its gradient waits for the embedding's."""
    return job.itemsize * job.table if job.config.model.tie_embeddings else 0


def rotary_table(job: Job) -> int:
    """4 D per position of the whole row: a cosine and a sine for each pair."""
    return MASTER * job.config.model.head_size * job.stage.seq_len


def batch(job: Job) -> int:
    """Tokens and labels (int64), document starts (int32)."""
    return (8 + 8 + 4) * job.tokens


def operators_of(job: Job) -> dict[Fold, OperatorMemory]:
    """The attention operator of each kind of layer, on a GPU."""
    return {fold: operator_memory(job, fold) for fold in set(job.folds)}
