"""The model under evaluation: losses of given tokens, and greedy continuations of prompts.

A checkpoint is loaded into the trainer's `Llama`, whose ranks may share a row. To generate, a model
of `tensorlm.hf` shares its weights. A Hugging Face folder is loaded as such a model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fold_parallel import Grid
from tensorlm.checkpoint import config_to_read, load_weights, select_checkpoint
from tensorlm.config import Config, ModelConfig
from tensorlm.data.tokenizer.tokenizers import check_tokenizer, largest_text_id, load_tokenizer
from tensorlm.hf.export_folder import DTYPES
from tensorlm.hf.llama_config import model_settings
from tensorlm.model import Llama, create_llama
from tensorlm.runtime.errors import UserError

from .describe import describe_model
from .ranks import LeaveRequest
from .results import RANDOM_WEIGHTS


@dataclass
class EvaluatedModel:
    """A network with its tokenizer and its origin.

    config: the settings of the evaluation, not those with which the model was trained.
    network: a `Llama` on a grid of ranks, or a Hugging Face model (then `grid.sp` is 1).
    """

    config: Config
    network: Any
    name: str  # path of the run or folder
    step: int | None
    trained_length: int
    tokenizer: Any
    device: torch.device
    grid: Grid
    on_progress: Callable[[], None] = lambda: None  # called after each pass, for a watchdog
    leave: LeaveRequest | None = None  # checked after each pass
    gathers_weights: bool = False  # whether each pass gathers weights from all ranks (ZeRO 3)
    facts: dict[str, Any] = field(default_factory=dict)  # about the model, for the report

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the layers that choose blocks."""
        config = self.network.config
        if isinstance(config, ModelConfig):
            kinds: list[str] = list(config.layer_kinds)
        elif hasattr(config, "layer_kind"):
            kinds = [config.layer_kind(layer) for layer in range(config.num_hidden_layers)]
        else:  # another Llama
            kinds = []
        return [layer for layer, kind in enumerate(kinds) if kind == "routed"]

    @cached_property
    def shape(self) -> ModelConfig:
        """The network's settings as a `[model]` section."""
        if isinstance(self.network, Llama):
            return self.network.config
        return ModelConfig.model_validate(model_settings(Path(self.name)))

    @property
    def partners(self) -> range:
        """The ranks that take part in each of this rank's passes over windows."""
        if self.gathers_weights:
            return range(self.grid.world_size)
        first = self.grid.dp_rank * self.grid.sp
        return range(first, first + self.grid.sp)

    @property
    def window_unit(self) -> int:
        """Tokens of which window lengths must be a multiple, so that ranks can share windows."""
        if self.grid.sp == 1:
            return 1
        assert isinstance(self.network, Llama)
        fold = self.network.config.fold
        return self.grid.sp * (fold[0] if fold else 1)

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> NDArray[np.float32]:
        """Loss of each token given those before it, in nats.

        Args:
            tokens: [B, L + 1] int64.

        Returns:
            [B, L]; zero at tokens of other ranks of the sequence group, so that the sum over ranks
            is complete.
        """
        mine = self.grid.tokens(tokens.shape[1] - 1)
        inputs, labels = (t[:, mine].to(self.device) for t in (tokens[:, :-1], tokens[:, 1:]))
        if isinstance(self.network, Llama):
            found = self.network(inputs, None, labels, "none")
        else:
            found = self._hugging_face_losses(inputs, labels)
        result = np.zeros((tokens.shape[0], tokens.shape[1] - 1), np.float32)
        result[:, mine] = found.float().cpu().numpy()
        self._pass_done(len(self.partners), None if self.gathers_weights else self.grid.sp_group)
        return result

    def _pass_done(self, num_partners: int, group: dist.ProcessGroup | None) -> None:
        """Report progress after a pass shared by the ranks of `group`, and check for a stop."""
        self.on_progress()
        if self.leave:
            self.leave.check(num_partners, group)

    def _hugging_face_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        hidden = self.network.model(input_ids=inputs, use_cache=False).last_hidden_state
        size, parts = self.config.train.loss_chunk, []
        chunks = hidden.flatten(0, 1).split(size), labels.flatten().split(size)
        for h, y in zip(*chunks, strict=True):
            parts.append(F.cross_entropy(self.network.lm_head(h).float(), y, reduction="none"))
        return torch.cat(parts).view_as(labels)

    def encode(self, text: str) -> list[int]:
        """BOS and the ids of `text`, encoded like documents for training."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return [self.tokenizer.bos_token_id, *encoded["input_ids"]]

    @torch.no_grad()
    def generate(
        self,
        prompt: list[int],
        num_tokens: int,
        look: Callable[[Any], None] | None = None,
        is_done: Callable[[str], bool] | None = None,
    ) -> str:
        """The most likely continuation of at most `num_tokens` tokens, as text.

        Args:
            prompt: token ids.
            num_tokens: maximum length of the continuation.
            look: called with the cache afterwards: a `FoldCache` unless the model is a plain Llama.
            is_done: called with the text after each token; True ends it.
        """
        from .decoding import continue_greedily, make_cache

        tokens, eos_id = torch.tensor([prompt], device=self.device), self.tokenizer.eos_token_id
        cache = make_cache(self.generator, len(prompt), num_tokens)
        size = self.config.eval.prefill_chunk

        def text_of(found: Tensor) -> str:
            text: str = self.tokenizer.decode(found, skip_special_tokens=True)
            return text

        found = continue_greedily(
            self.generator, tokens, num_tokens, eos_id, size, cache,
            (lambda found: is_done(text_of(found))) if is_done else None,
        )  # fmt: skip
        if look is not None:
            look(cache)
        self._pass_done(1, None)
        return text_of(found)

    @cached_property
    def generator(self) -> Any:
        """A model that generates with a cache, and shares the network's weights."""
        from .decoding import decoder_of

        return decoder_of(self.network, self.trained_length, self.device)


# -------------------------------------------------------------------------------------------- open


def open_checkpoint_model(
    config: Config, step: int | None, device: torch.device, grid: Grid
) -> EvaluatedModel:
    """Open the model of a checkpoint of `config.run.dir`; the newest if `step` is None.

    Raises:
        UserError: the checkpoint does not exist or is damaged, its model is not the configured one,
            or it was trained with a tokenizer other than that of `data.path`.
    """
    checkpoint = select_checkpoint(Path(config.run.dir), step, grid.rank, grid.world_size)
    trained = config_to_read(checkpoint, config)
    sha256 = checkpoint.manifest.get("tokenizer_sha256")  # None for imported weights
    if sha256:
        fix = f"set data.path to the data of {checkpoint.folder.parent}"
        check_tokenizer(_tokenizer_folder(config), sha256, fix)
    tokenizer = _load_tokenizer(_tokenizer_folder(config), trained.model.vocab_size)
    model = create_llama(trained.model, config.train, grid, device).eval()
    load_weights(checkpoint, model)
    name, seq_len = str(checkpoint.folder.parent.resolve()), trained.data.seq_len
    facts = describe_model(model, trained.model, checkpoint.manifest.get("state", {}).get("tokens"))
    return EvaluatedModel(
        config, model, name, checkpoint.step, seq_len, tokenizer, device, grid, facts=facts
    )


def open_random_model(config: Config, device: torch.device, grid: Grid) -> EvaluatedModel:
    """Make the configured model with random weights, to measure time and memory of an evaluation.

    Raises:
        UserError: the tokenizer of `data.path` has more ids than the model.
    """
    tokenizer = _load_tokenizer(_tokenizer_folder(config), config.model.vocab_size)
    model = create_llama(config.model, config.train, grid, device).eval()
    torch.manual_seed(config.run.seed)  # on the device: `init_weights` takes a minute
    for name, parameter in model.named_parameters():
        if not name.endswith(("norm.weight", "hop_bias")):
            parameter.data.normal_(std=config.model.init_std)
    name, seq_len = str(Path(config.run.dir).resolve() / RANDOM_WEIGHTS), config.data.seq_len
    facts = describe_model(model, config.model, None)
    return EvaluatedModel(config, model, name, None, seq_len, tokenizer, device, grid, facts=facts)


def open_hugging_face_model(
    config: Config, folder: Path, device: torch.device, grid: Grid
) -> EvaluatedModel:
    """Open a Llama or tensorlm folder with this installation's code; its own code is not run.

    Raises:
        UserError: it is not such a folder, or its tokenizer has more ids than its model.
    """
    from tensorlm.hf.load_folder import load_folder  # slow to import, as in decoding.py

    network = load_folder(folder, DTYPES[config.train.dtype])
    tokenizer = load_tokenizer(folder)
    _check_ids(folder, tokenizer, network.config.vocab_size)
    name, length = str(folder.resolve()), network.config.max_position_embeddings
    facts, network = describe_model(network, network.config, None), network.to(device).eval()
    return EvaluatedModel(config, network, name, None, length, tokenizer, device, grid, facts=facts)


def wrap_training_model(
    config: Config,
    module: nn.Module,
    step: int,
    device: torch.device,
    grid: Grid,
    on_progress: Callable[[], None],
    leave: LeaveRequest,
    tokens: int | None = None,
) -> EvaluatedModel:
    """Wrap the model that is being trained.

    After each forward pass, `on_progress` is called and `leave` is checked. `tokens` is the number
    of tokens trained so far.
    """
    tokenizer, seq_len = load_tokenizer(_tokenizer_folder(config)), config.data.seq_len
    name = str(Path(config.run.dir).resolve())
    return EvaluatedModel(
        config, module, name, step, seq_len, tokenizer, device, grid, on_progress, leave,
        config.zero.stage == 3, describe_model(module, config.model, tokens),
    )  # fmt: skip


def _tokenizer_folder(config: Config) -> Path:
    return Path(config.data.path) / "tokenizer"


def _load_tokenizer(folder: Path, vocab_size: int) -> Any:
    """Load the tokenizer of a model with `vocab_size` ids.

    Raises:
        UserError: there is no tokenizer, or it has more ids.
    """
    tokenizer = load_tokenizer(folder)
    _check_ids(folder, tokenizer, vocab_size)
    return tokenizer


def _check_ids(folder: Path, tokenizer: Any, vocab_size: int) -> None:
    num_ids = largest_text_id(tokenizer) + 1
    if num_ids > vocab_size:
        raise UserError(
            f"{folder}: must have at most vocab_size = {vocab_size} ids, got {num_ids} (use the "
            "model's tokenizer)"
        )
