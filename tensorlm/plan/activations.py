"""Memory of activations on one rank.

Counts what blocks keep for the backward pass, and what one block and the output head need while
they compute. Letters as in `job.py`.

The counts follow `tensorlm/model` operation by operation; the tests compare them with every tensor
that PyTorch allocates. One rule decides most of them: an operation frees what it has saved when its
own backward is done.
"""

from tensorlm.config import LayerKind

from .job import FP32, Job
from .operator import OperatorMemory, operator_memory, sizes

# Hidden states being copied to the host, or back, while a neighboring block computes.
OFFLOADS_IN_FLIGHT = 2


def hidden_state(job: Job) -> int:
    """w C t: the tensor that one block passes to the next."""
    return job.itemsize * job.config.model.hidden_size * job.tokens


def saved_by_norm(job: Job) -> int:
    """What a norm saves: its input, the product with the weight, and one float32 per token.

    PyTorch's operations save the input in float32, and the normalized input too; Liger's kernel
    saves the input unchanged.
    """
    per_token = FP32 * job.tokens
    if job.runs_liger:
        return 2 * hidden_state(job) + per_token
    return FP32 * job.config.model.hidden_size * job.tokens + 2 * hidden_state(job) + per_token


def saved_by_first_norm(job: Job) -> int:
    """`saved_by_norm`, without an input that is already counted as the block's own input."""
    return saved_by_norm(job) - (hidden_state(job) if keeps_own_input(job) else 0)


def keeps_own_input(job: Job) -> bool:
    """Whether a norm saves its input itself rather than a float32 copy."""
    return job.runs_liger or job.itemsize == FP32


def norm_workspace(job: Job) -> int:
    """Tensors at the peak of a norm's backward, including its input.

    6 in float32 (5 if none is cast); with Liger 3 of w bytes per element.
    """
    if job.runs_liger:
        return 3 * hidden_state(job)
    tensors = 5 if job.itemsize == FP32 else 6
    return tensors * FP32 * job.config.model.hidden_size * job.tokens


def mlp_width(job: Job, tokens: int) -> int:
    """w I `tokens`: one of SwiGLU's intermediate tensors."""
    return job.itemsize * job.config.model.intermediate_size * tokens


def is_tiled(job: Job) -> bool:
    """Whether SwiGLU processes a forward pass in tiles of tokens."""
    return 0 < job.config.train.mlp_chunk < job.tokens


def saved_by_mlp(job: Job) -> int:
    """gate, up and their product; with PyTorch's operations silu(gate) too; nothing if tiled."""
    if is_tiled(job):
        return 0
    return (3 if job.runs_liger else 4) * mlp_width(job, job.tokens)


def saved_by_block(job: Job, operator: OperatorMemory) -> int:
    """What a block saves for its backward, except its input."""
    norms = saved_by_first_norm(job) + saved_by_norm(job)
    return norms + operator.saved + saved_by_mlp(job) + kept_scales(job)


def kept_scales(job: Job) -> int:
    """A float32 for each input and weight whose products run in `float8_tensorwise`."""
    if job.config.train.linear != "float8_tensorwise":
        return 0
    attention, mlp = (1 + 3) + (1 + 1), (1 + 2) + (1 + 1)  # q, k, v; o; gate, up; down
    return FP32 * (attention + (0 if is_tiled(job) else mlp))


def kept_by_block(job: Job, operator: OperatorMemory) -> int:
    """What a block keeps on the GPU until its backward.

    With recomputation: the choice of a routed layer and `kept_results`; its input is counted in
    `kept_inputs`.
    """
    if job.recomputes:
        return operator.kept + kept_results(job, operator)
    input_too = hidden_state(job) if keeps_own_input(job) else 0
    return input_too + saved_by_block(job, operator)


def kept_results(job: Job, operator: OperatorMemory) -> int:
    """What recomputation keeps besides a block's input (`model/recompute.py`).

    "attention": the results of attention, of a routed layer only those of its blocks. "selective":
    q, k, v, the results of attention and of o, and of gate and up unless SwiGLU is tiled. Both: the
    scales of `kept_scales`.
    """
    if job.recompute == "attention":
        results = operator.results if operator.last_result is None else operator.last_result
        return results + kept_scales(job)
    if job.recompute != "selective":
        return 0
    q, k, _, _ = sizes(job)
    mlp = 0 if is_tiled(job) else 2 * mlp_width(job, job.tokens)
    return q + 2 * k + operator.results + hidden_state(job) + mlp + kept_scales(job)


def mlp_peak(job: Job, operator: OperatorMemory, reduction: int) -> int:
    """Peak of SwiGLU's backward, which comes before that of the block's norms and attention.

    With PyTorch's operations: six of its tensors at once; then five with the gradient of `down`;
    then four while that is reduced. Liger overwrites gate and up with gradients, so it needs fewer.
    At the end: the gradient of gate and two gradients of the input. In tiles: seven tensors of one
    tile (Liger: four) and float32 gradients of all three weights. Float8 adds what
    `float8_peaks` lists, and in tiles the weights in float8: gate and up in both orders, and down.
    """
    norms = saved_by_first_norm(job) + saved_by_norm(job)
    waiting = norms + operator.saved + hidden_state(job)
    weight = job.config.model.hidden_size * job.config.model.intermediate_size
    matrix = job.itemsize * weight
    if is_tiled(job):
        tile = (4 if job.runs_liger else 7) * mlp_width(job, job.config.train.mlp_chunk)
        sums = 3 * FP32 * weight
        cast = 5 * weight if job.runs_float8 else 0
        tiles = max([tile, *float8_peaks(job, job.config.train.mlp_chunk)])
        inside = sums + max(cast + tiles, 3 * matrix)
        return waiting + hidden_state(job) + max(inside, 3 * matrix + reduction)
    width, most, beside = mlp_width(job, job.tokens), 6, 5
    if job.runs_liger:
        most, beside = 4, 4
    return waiting + max(
        most * width, beside * width + matrix, (beside - 1) * width + matrix + reduction,
        width + matrix + 2 * hidden_state(job), *float8_peaks(job, job.tokens),
        hidden_state(job) + 2 * matrix + reduction if job.runs_float8 else 0,
    )  # fmt: skip


def float8_peaks(job: Job, tokens: int) -> tuple[int, ...]:
    """Peaks of the backward of SwiGLU's products in float8, of `tokens` tokens.

    In down: gate, up, their product and its gradient (PyTorch's operations: silu(gate) too), the
    product transposed in float8, the output's gradient in float8 in both orders, and the weight's
    gradient. Then in up: the gradients of gate and up, one of them in float8 in both orders; the
    input transposed, its gradient and the part of up; the gradients of both weights.
    """
    if not job.runs_float8:
        return ()
    width, model = mlp_width(job, tokens), job.config.model
    hidden = job.itemsize * model.hidden_size * tokens
    matrix = job.itemsize * model.hidden_size * model.intermediate_size
    before = 4 if job.runs_liger else 5
    return (
        before * width + width // 2 + hidden + matrix,
        3 * width + 5 * hidden // 2 + 2 * matrix,
    )


def norm_peak(job: Job, operator: OperatorMemory) -> int:
    """Peak of the second norm's backward: what the first norm and attention saved is still there,
    and the residual's gradient.
    """
    waiting = saved_by_first_norm(job) + operator.saved + hidden_state(job)
    return waiting + norm_workspace(job)


def attention_peak(job: Job, operator: OperatorMemory) -> int:
    """Peak of attention's backward: what the first norm saved is still there, and the residual's
    gradient.
    """
    waiting = saved_by_first_norm(job) + operator.saved + hidden_state(job)
    return waiting + operator.backward


def block_peak(job: Job, operator: OperatorMemory, reduction: int = 0) -> int:
    """Peak of one block's backward, with everything it has kept or recomputed.

    Excludes its input, and what recomputation keeps.

    Args:
        job: the job.
        operator: memory of the block's attention operator.
        reduction: bytes that the reduction of weight gradients needs at the same time.
    """
    kept = operator.kept + kept_results(job, operator) if job.recomputes else 0
    return (
        max(
            mlp_peak(job, operator, reduction), norm_peak(job, operator),
            attention_peak(job, operator),
        )
        - kept
    )  # fmt: skip


def saved_activations(
    job: Job, operators: dict[LayerKind, OperatorMemory], blocks: int, is_backward: bool = True
) -> int:
    """Bytes that the first `blocks` blocks keep for their backward.

    In the backward pass, they include inputs that have been found again.
    """
    kept = sum(kept_by_block(job, operators[kind]) for kind in job.kinds[:blocks])
    if job.recomputes and blocks:
        found = (blocks - 1) % job.interval if is_backward else 0
        kept += kept_inputs(job, blocks, found) * hidden_state(job)
    return kept


def kept_inputs(job: Job, blocks: int, found: int) -> int:
    """Number of inputs of the first `blocks` blocks that are on the GPU.

    Each group of blocks keeps one. If these are offloaded, the last one is there, and the one
    before it unless backward has `found` others again.
    """
    groups = -(-blocks // job.interval)
    if job.offloads_activations:
        return max(min(groups, OFFLOADS_IN_FLIGHT), 1 + found)
    return groups + found


def head_peak(job: Job) -> int:
    """Peak of the output head: what the last norm saved, and the head with its gradients.

    Gradients of the weight in float32, and of the hidden states. In addition, for one chunk of
    tokens: float32 logits and their softmax, or the gradients of logits and weight. On a GPU one
    kernel overwrites the logits with their gradients, and the weight's gradient is added directly
    unless it is float32.
    """
    chunk = min(job.config.train.loss_chunk, job.tokens)
    logits = job.config.model.vocab_size * chunk
    if job.runs_loss_kernel:
        product = job.table if job.itemsize == FP32 else 0
        beside = job.itemsize * (logits + product) + FP32 * chunk
    else:
        beside = max(2 * FP32 * logits, job.itemsize * (logits + job.table))
    return saved_by_norm(job) + hidden_state(job) + FP32 * job.table + beside


def head_gradient(job: Job, reduction: int) -> int:
    """Peak of the head's backward: its weight's gradient, cast from float32 or being reduced."""
    gradient, chunk = job.itemsize * job.table, min(job.config.train.loss_chunk, job.tokens)
    scaled = FP32 * job.config.model.hidden_size * chunk  # hidden states' gradients, by chunk
    cast = FP32 * job.table if job.itemsize < FP32 else scaled
    # The norm's output has been freed; its gradient takes the same space.
    return saved_by_norm(job) + gradient + max(cast, reduction)


def embedding_peak(job: Job) -> int:
    """Peak of the embedding's backward: the gradients of its output and of the whole table."""
    return hidden_state(job) + job.itemsize * job.table


def shared_gradient(job: Job) -> int:
    """The head's part of a tied table's gradient, kept until the embedding's part is computed."""
    return job.itemsize * job.table if job.config.model.tie_embeddings else 0


def rotary_table(job: Job, positions: int | None = None) -> int:
    """4 D per position of the whole row: a cosine and a sine for each pair of elements."""
    return FP32 * job.config.model.head_size * (positions or job.phase.seq_len)


def batch(job: Job) -> int:
    """Tokens and labels (int64) and document starts (int32)."""
    return (8 + 8 + 4) * job.tokens


def operators_of(job: Job) -> dict[LayerKind, OperatorMemory]:
    """Memory of the attention operator on a GPU, by kind of layer."""
    return {kind: operator_memory(job, kind) for kind in set(job.kinds)}
