"""Which layer is of which kind, what old settings mean, and what cannot go together."""

from pathlib import Path
from typing import Any

import pytest

from tensorlm.checkpoint import model_differences
from tensorlm.config import LayerKind, ModelConfig, attention_in_words, load_config
from tensorlm.runtime.errors import UserError

DEMO = Path(__file__).parents[2] / "configs/demo.toml"  # fold = [256], 4 layers
ROUTE = {"block": 64, "top_k": 16, "stretch": 8}
GIVEN = "model.route={block=64, top_k=16, stretch=8}"


def shape(**changes: Any) -> ModelConfig:
    given: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_layers": 4,
        "num_heads": 4, "num_kv_heads": 2,
    }  # fmt: skip
    return ModelConfig.model_validate({**given, **changes})


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, "full full full full"),
        ({"full_every": 2}, "full full full full"),
        ({"fold": [16]}, "strided strided strided strided"),
        ({"fold": [16], "full_every": 2}, "strided full strided full"),
        ({"window": 64}, "window window window window"),
        ({"window": 64, "full_every": 4}, "window window window full"),
        ({"window": 64, "route": ROUTE}, "routed routed routed routed"),
        ({"fold": [64], "route": ROUTE}, "routed routed routed routed"),
        ({"window": 64, "route": ROUTE, "route_every": 2}, "window routed window routed"),
        ({"fold": [64, 4], "route": ROUTE, "route_every": 2}, "strided routed strided routed"),
        (
            {"window": 64, "route": ROUTE, "route_every": 2, "full_every": 4},
            "window routed window full",
        ),
        (
            {"fold": [64], "route": ROUTE, "layers": ["full", "window", "routed", "strided"]},
            "full window routed strided",
        ),
    ],
)
def test_kinds_of_layers(settings: dict[str, Any], kinds: str) -> None:
    model = shape(**settings)
    assert list(model.layer_kinds) == kinds.split()
    for layer, kind in enumerate(model.layer_kinds):
        assert model.layer_kind(layer) == kind
        assert model.layer_fold(layer) == (model.fold if kind == "strided" else ())
    assert model.window_size == (64 if {"window", "routed"} & set(kinds.split()) else
                                 settings.get("fold", [0])[0])  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "full attention"),
        ({"fold": [16, 4]}, "fold [16, 4]"),
        ({"fold": [16], "full_every": 2}, "fold [16], full attention in 2 of 4 layers"),
        ({"window": 1024}, "window 1,024"),
        (
            {"window": 64, "route": ROUTE, "route_every": 2, "full_every": 4},
            "routed (window 64, 16 + 1 blocks of 64, stretch 8), window 64 in 2 of 4 layers, "
            "full attention in 1 of 4 layers",
        ),
    ],
)
def test_attention_in_words(settings: dict[str, Any], words: str) -> None:
    assert attention_in_words(shape(**settings)) == words


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (
            ["window=1024"],
            ["window must be fold[0] = 256, got 1024 (remove window, or set fold[0] = 1024)"],
        ),
        (
            ["route_every=2"],
            ["route_every must be 0 without routed layers, got 2 (add [model.route]"],
        ),
        (
            ["fold=[]", "window=32", GIVEN],
            ["route.block must be at most the window of 32 tokens, got 64 (lower block, or raise"],
        ),
        (["fold=[]", GIVEN], ["window must be at least 1 for routed layers, got 0 (like 1024)"]),
        (
            ["fold=[]", "layers=['window', 'full', 'full', 'full']"],
            ["window must be at least 1 for window layers, got 0 (like 1024)"],
        ),
        (
            ["layers=['routed', 'full', 'full', 'full']"],
            ["route must be given for routed layers, got none (add [model.route]"],
        ),
        (
            ["fold=[]", "window=32", "layers=['strided', 'full', 'full', 'window']"],
            ["fold must have an inner axis for strided layers, got [] (like [1024])"],
        ),
        (
            ["layers=['full']", "full_every=2", "route_every=3", GIVEN],
            [
                "layers must have one entry for each of num_layers = 4, got 1",
                "full_every must be 0 if layers is given, got 2 (remove full_every or layers)",
                "route_every must be 0 if layers is given, got 3 (remove route_every or",
            ],
        ),
        (["route_every=9", GIVEN], ["route must be used by at least one layer, got none (lower"]),
        (["full_every=1", GIVEN], ["route must be used by at least one layer, got none (lower"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_go_together_is_one_line_with_what_would_do(
    overrides: list[str], lines: list[str]
) -> None:
    named = [x if x.startswith("model.") else f"model.{x}" for x in overrides]
    with pytest.raises(UserError) as caught:
        load_config(DEMO, named)
    found = list(caught.value.problems)
    assert len(found) == len(lines), found
    for line, words in zip(found, lines, strict=True):
        assert line.startswith(f"{DEMO}: model: {words}")


def test_unknown_kinds_and_keys_of_a_route_are_named() -> None:
    with pytest.raises(UserError) as caught:
        load_config(DEMO, ["model.layers=['rooted']", "model.route.blok=3", "model.window=-1"])
    text = "\n".join(caught.value.problems)
    assert "model.layers.0: must be 'window', 'strided', 'routed' or 'full', got \"rooted\"" in text
    assert "model.route.blok: unknown key (did you mean block?)" in text
    assert "model.window: must be at least 0, got -1" in text


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.route.block=48", "block must be one of (16, 32, 64, 128), got 48"),
        ("model.route.open_tile=32", "open_tile must be at most 16, got 32"),
    ],
)
def test_blocks_that_kernels_do_not_take_are_legal_unless_kernels_are_asked_for(
    override: str, reason: str
) -> None:
    load_config(DEMO, [GIVEN, override])
    with pytest.raises(UserError, match=r"model\.route: ") as caught:
        load_config(DEMO, [GIVEN, override, "train.attention=triton"])
    assert reason in caught.value.problems[0]


def test_ranks_share_rows_of_window_and_routed_layers_whatever_the_window() -> None:
    for overrides in ([GIVEN], ["model.fold=[]", "model.window=64"]):
        load_config(DEMO, [*overrides, "parallel.sp=2", "data.seq_len=3978"])
        with pytest.raises(UserError, match=r"sp = 4 cannot share rows with seq_len = 3978"):
            load_config(DEMO, [*overrides, "parallel.sp=4", "data.seq_len=3978"])
    full_too = ["model.fold=[]", "model.window=64", "model.full_every=2", "data.seq_len=3978"]
    with pytest.raises(UserError, match=r"sp = 3 cannot share .* heads = 4"):
        load_config(DEMO, [*full_too, "parallel.sp=3"])


def trained(*overrides: str) -> dict[str, Any]:
    tree = load_config(DEMO, overrides).model_dump(mode="json", exclude_none=True)
    for name in ("window", "route_every", "layers"):  # as of a version without them
        if not any(name in override for override in overrides):
            del tree["model"][name]
    return tree


def differing(before: dict[str, Any], *overrides: str) -> list[str]:
    lines = model_differences(before, load_config(DEMO, overrides))
    return [line.partition(":")[0].removeprefix("model.") for line in lines]


def test_settings_of_earlier_versions_mean_what_they_meant() -> None:
    assert not differing(trained())
    assert not differing(trained("model.full_every=2"), "model.full_every=2")
    assert not differing(trained(), "model.window=256")
    assert not differing(trained("model.fold=[]"), "model.fold=[]", "model.full_every=2")
    kinds: tuple[LayerKind, ...] = ("strided", "full", "strided", "full")
    listed = f"model.layers={list(kinds)}"
    assert not differing(trained("model.full_every=2"), listed)


def test_every_setting_of_routes_is_told_when_it_differs() -> None:
    before = trained(GIVEN)
    assert not differing(before, GIVEN)
    assert not differing(before, "model.fold=[]", "model.window=256", GIVEN)
    assert differing(before, "model.fold=[128]", GIVEN) == ["window"]
    for name, value in (
        ("block", 32),
        ("top_k", 8),
        ("stretch", 16),
        ("open_tile", 1),
        ("pool", 8),
    ):
        assert differing(before, GIVEN, f"model.route.{name}={value}") == [f"route.{name}"]
    assert differing(before, GIVEN, "model.route_every=2") == ["route_every"]
    assert differing(before, GIVEN, "model.layers=['routed','full','full','full']") == ["layers"]
    random = ("model.route.open_tile=1", "model.route.choice=random")
    assert differing(before, GIVEN, *random) == ["route.open_tile", "route.choice"]
    names = ("block", "top_k", "stretch", "open_tile", "pool", "choice")
    routes = [f"route.{name}" for name in names]
    assert sorted(differing(before)) == sorted(routes)
    (line,) = model_differences(before, load_config(DEMO, [GIVEN, "model.route.block=32"]))
    assert line == "model.route.block: must be 64, as in the checkpoint, got 32 (restore it)"
