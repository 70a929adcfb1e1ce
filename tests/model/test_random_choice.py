"""A random choice of blocks: legal, uniform, the same in any slice, and not exported."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tensorlm.config import ModelConfig, load_config
from tensorlm.config.layer_words import attention_in_words
from tensorlm.hf.export_folder import hf_config
from tensorlm.model.flops import choice_flops
from tensorlm.model.random_choice import random_blocks
from tensorlm.runtime.errors import UserError

ROUTE = {"block": 4, "top_k": 3, "stretch": 2, "open_tile": 1, "choice": "random"}
NUMBERS = {"window": 8, "block": 4, "top_k": 3}


def config(**route: object) -> ModelConfig:
    return ModelConfig.model_validate({
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "window": 8, "route": ROUTE | route,
    })  # fmt: skip


def test_chosen_blocks_are_far_and_different_and_include_the_first() -> None:
    depth = torch.tensor([[*range(70), *range(30)]])
    choice = random_blocks(depth, 2, layer=5, **NUMBERS)
    assert choice.shape == (1, 100, 2, 4)
    for at, position in enumerate(depth[0].tolist()):
        far = {j for j in range(20) if 4 * j <= position - 8}
        for head in range(2):
            blocks = [j for j in choice[0, at, head].tolist() if j >= 0]
            assert len(blocks) == len(set(blocks)) == min(4, len(far))
            assert set(blocks) <= far
            assert not far or 0 in blocks


def test_every_far_block_is_equally_likely_and_layers_and_heads_differ() -> None:
    depth = torch.arange(4000, 12000)[None]
    choice = random_blocks(depth, 2, layer=0, window=8, block=100, top_k=4)
    of_old_blocks = choice[(choice > 0) & (choice < 40)]
    counts = torch.bincount(of_old_blocks.long(), minlength=40)[1:].double()
    assert (counts / counts.mean() - 1).abs().max() < 0.15  # about 1,700 each: 6 deviations
    assert not torch.equal(choice[:, :, 0], choice[:, :, 1])
    assert not torch.equal(choice, random_blocks(depth, 2, layer=1, window=8, block=100, top_k=4))


def test_a_slice_of_tokens_chooses_what_it_chooses_in_the_whole_row() -> None:
    depth = torch.arange(5000)[None]
    whole = random_blocks(depth, 2, layer=1, **NUMBERS)
    torch.testing.assert_close(random_blocks(depth[:, 4100:4200], 2, layer=1, **NUMBERS),
                               whole[:, 4100:4200], rtol=0, atol=0)  # fmt: skip


def test_random_blocks_need_tiles_of_one_token() -> None:
    with pytest.raises(ValidationError, match="open_tile must be 1 with choice = random, got 16"):
        config(open_tile=16)
    assert attention_in_words(config()).endswith("stretch 2, chosen at random)")
    assert choice_flops(config(), torch.arange(64)) == 0


def test_a_model_with_random_blocks_is_not_exported() -> None:
    with pytest.raises(UserError, match="choice: must be content to export or generate, got rand"):
        hf_config(config(), 64, "fp32")
    assert "choice" not in hf_config(config(choice="content"), 64, "fp32")["route"]


def test_only_perplexity_is_evaluated_with_random_blocks() -> None:
    file = Path(__file__).parents[2] / "configs/adapt/routed_random.toml"
    assert load_config(file).model.route is not None
    with pytest.raises(UserError, match=r"eval.tasks: must be \[.ppl.\].* got recall"):
        load_config(file, ['eval.tasks=["ppl","recall"]'])
