"""The loss of a checkpoint's weights, exact or rounded, with one layer in memory at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorlm.checkpoint import Checkpoint
from tensorlm.config import ModelConfig
from tensorlm.data.shards import Corpus
from tensorlm.model import Llama
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.progress import byte_bar

from .rounding import Rounding, round_part

_TOKENS = 512  # number of predicted tokens: enough to compare two sets of weights


def sample_document(data: Path, checkpoint: Checkpoint) -> tuple[Tensor, str]:
    """Tokens of a document for `streamed_loss`, and the folder of its split.

    Args:
        data: prepared data set; a held-out document is used if it has any.
        checkpoint: the checkpoint, whose tokenizer must be that of the data.

    Returns:
        [1, at most 513] int64: the beginning of the first document that is long enough, or else the
        longest document.

    Raises:
        UserError: there is no such data set, or it was encoded with another tokenizer.
    """
    split = next((s for s in ("valid", "train") if (data / s / "index.json").exists()), "train")
    corpus = Corpus(data / split)
    wanted = checkpoint.manifest.get("tokenizer_sha256", corpus.tokenizer_sha256)
    if corpus.tokenizer_sha256 != wanted:
        raise UserError(
            f"{data / split}: must be encoded with the tokenizer of the run's data, got another"
        )
    document = int(corpus.lengths.clip(max=_TOKENS + 1).argmax())
    tokens = corpus.tokens(document, 0, _TOKENS + 1)
    return torch.from_numpy(tokens.astype("int64"))[None], str(data / split)


@torch.no_grad()
def streamed_loss(
    checkpoint: Checkpoint,
    shape: ModelConfig,
    tokens: Tensor,
    change: Callable[[str, Tensor], Tensor] = lambda name, weight: weight,
) -> float:
    """Mean loss per predicted token, in float32 on the CPU.

    Args:
        checkpoint: the checkpoint; its weights are read one layer at a time.
        shape: shape of the model.
        tokens: [1, T + 1] int64, one document.
        change: function of a parameter's name and float32 value that returns the value to use.

    Raises:
        UserError: a file of the checkpoint cannot be read.
    """
    with torch.device("meta"):
        model = Llama(shape).eval()
    names = {parameter: name for name, parameter in model.named_parameters()}
    modules = (model.embed_tokens, *model.layers, model.norm, model.lm_head)

    def load(module: nn.Module, _: Any) -> None:
        weights = {}
        for key, parameter in module.named_parameters():
            weight = checkpoint.read_parameter(names[parameter])
            weights[key] = change(names[parameter], weight)
            bar(weight.nbytes)
        module.load_state_dict(weights, assign=True)

    def drop(module: nn.Module, _: Any, __: Any) -> None:
        module.to("meta")

    for module in modules:
        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)
    total = sum(4 * p.numel() for module in modules for p in module.parameters())
    with byte_bar(total, "measure the loss") as bar:
        loss = model(tokens[:, :-1], None, tokens[:, 1:])
    return float(loss) / (tokens.shape[1] - 1)


def describe_losses(
    checkpoint: Checkpoint, shape: ModelConfig, data: Path, rounding: Rounding
) -> str:
    """One line with the loss of the checkpoint, of the bf16 export, and of rounding to nearest."""
    try:
        tokens, place = sample_document(data, checkpoint)
    except UserError as error:
        return f"note: the loss of the exported weights was not measured ({error.problems[0]})"

    def loss(how: Rounding) -> float:
        def rounded(name: str, weight: Tensor) -> Tensor:
            flat = round_part(weight.flatten(), torch.bfloat16, how, name, 0)
            return flat.float().view_as(weight)

        return streamed_loss(checkpoint, shape, tokens, rounded)

    text = (
        f"loss on {tokens.shape[1] - 1} tokens of {place}: "
        f"checkpoint {streamed_loss(checkpoint, shape, tokens):.4f}, "
        f"export {loss(rounding):.4f}"
    )
    return text if rounding == "nearest" else f"{text}, rounding to nearest {loss('nearest'):.4f}"
