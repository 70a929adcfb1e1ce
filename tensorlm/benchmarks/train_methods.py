"""Methods of the training benchmark, and how far neighboring tokens' choices agree in it."""

import torch
from torch import Tensor, nn

from tensor_attention.routing import KERNEL_TILE
from tensorlm.config import ModelConfig
from tensorlm.model.attention import Attention, KeptChoice

METHODS = ("tensorized", "routed", "strided", "window", "full", "huggingface")
# Number of repetitions of each random token. Independent tokens would choose independently; in a
# trained model, 16 neighbors open 2.3 times the blocks of one of them (kernels/README.md).
RUN = 8


def shape_of(model: ModelConfig, method: str) -> ModelConfig:
    """The model with all layers of the method's kind; unchanged for "tensorized".

    Raises:
        ValueError: the model has no window or no route for such layers.
    """
    if method == "tensorized":
        return model
    plain = {"window": 0, "fold": (), "full_every": 0, "route": None, "route_every": 0}
    changes: dict[str, object] = {**plain, "layers": ()}
    if method in ("full", "huggingface"):
        return model.model_copy(update=changes)
    if not model.window_size or (method == "routed" and model.route is None):
        needed = "[model.route] and model.window" if method == "routed" else "model.window"
        raise ValueError(f"{method}: needs {needed} (set it, or remove the method)")
    match method:
        case "strided":
            changes["fold"] = model.fold or (model.window_size,)
        case "window":
            changes["window"] = model.window_size
        case "routed":
            changes |= {"window": model.window_size, "route": model.route}
    return model.model_copy(update=changes)


def draw_tokens(vocab_size: int, length: int, device: torch.device) -> Tensor:
    """[1, length]: random tokens, each repeated RUN times."""
    tokens = torch.randint(0, vocab_size, (1, -(-length // RUN)), device=device)
    return tokens.repeat_interleave(RUN, dim=1)[:, :length]


class OpenBlocks:
    """Context that counts the choices of a model's routed layers.

    `ratio`: number of blocks open in a tile of 16 tokens / number that one of them chooses, as a
    mean over routed layers and the second half of the row; NaN if nothing was chosen.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, Attention) and m.kind == "routed"]
        self._handles = [layer.register_forward_hook(self._count) for layer in layers]
        self._ratios: list[float] = []

    def __enter__(self) -> "OpenBlocks":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def ratio(self) -> float:
        return sum(self._ratios) / len(self._ratios) if self._ratios else float("nan")

    def _count(self, layer: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
        kept = inputs[3]
        assert isinstance(kept, KeptChoice)
        if kept.choice is not None:
            self._ratios.append(open_ratio(kept.choice))


def open_ratio(choice: Tensor) -> float:
    """Number of blocks open in a tile of 16 tokens / those of one token; `choice` [B, T, K, C]."""
    half = choice[:, choice.shape[1] // 2 :]
    tiles = half.shape[1] // KERNEL_TILE
    tiled = half[:, : tiles * KERNEL_TILE].unflatten(1, (tiles, KERNEL_TILE)).transpose(2, 3)
    ids = tiled.flatten(3).sort(-1).values  # [B, tiles, K, 16 C]
    opens = (ids[..., 1:] != ids[..., :-1]).sum(-1) + 1 - (ids[..., 0] < 0).int()
    own = (tiled >= 0).sum((3, 4)) / KERNEL_TILE
    return float(opens.sum() / own.sum())
