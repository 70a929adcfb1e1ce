"""Whether a run can go on from a checkpoint: the same model, data and rows."""

import json
from typing import Any

from tensorlm.config import Config, ModelConfig
from tensorlm.runtime.errors import UserError

from .manifest import Checkpoint


def check_resumable(checkpoint: Checkpoint, config: Config, data_fingerprint: str) -> None:
    """The run of `config`, on data of this fingerprint, can go on from `checkpoint`.

    Raises:
        UserError: it is of another model, data, or other rows a step.
    """
    check_model(checkpoint, config)
    try:
        state, fingerprint = checkpoint.manifest["state"], checkpoint.manifest["data_fingerprint"]
        step, rows = int(state["step"]), int(state["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.folder}: not the manifest of a run ({error})") from None
    if rows and fingerprint != data_fingerprint:
        raise UserError(
            f"{checkpoint.folder}: was trained on other data, or with another data section or seed "
            "(restore them, or choose a new run.dir)"
        )
    # The last stage has no end: it may go on with other rows a step.
    earlier = config.rows_after(sum(stage.steps for stage in config.train.earlier_stages))
    expected = config.rows_after(step)
    fits = rows >= earlier if expected >= earlier else rows == expected
    if not fits:
        raise UserError(
            f"train.earlier_stages: {step} steps have {min(expected, earlier)} rows, "
            f"{checkpoint.folder} has {rows} (set them back, or choose a new run.dir)"
        )


def check_model(checkpoint: Checkpoint, config: Config) -> None:
    """The configured model is the one that was trained.

    Raises:
        UserError: a line for each setting that differs.
    """
    try:
        differences = model_differences(checkpoint.manifest["config"], config)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{checkpoint.folder}: not the checkpoint of a run") from None
    if differences:
        raise UserError(*(f"{checkpoint.folder}: {line}" for line in differences))


def model_differences(trained: dict[str, Any], config: Config) -> list[str]:
    """How the configured model differs from that of a checkpoint, one line for each setting.

    Only initial values may differ, since a checkpoint has its own.

    Args:
        trained: `config` of the checkpoint's manifest.
        config: the configuration of today.

    Raises:
        KeyError, ValueError: `trained` is not the configuration of a run.
    """
    before, now = ModelConfig.model_validate(trained["model"]), config.model
    theirs, ours = _architecture(before), _architecture(now)
    if theirs["head_dim"] != ours["head_dim"]:  # one may spell out what 0 stands for
        theirs["head_dim"], ours["head_dim"] = before.head_size, now.head_size
    if before.layer_kinds == now.layer_kinds:  # there are several ways to say which is which
        for settings, model in ((theirs, before), (ours, now)):
            settings |= _of_equal_kinds(model)
    return [
        f"model.{key}: is {json.dumps(ours.get(key))}, the checkpoint has "
        f"{json.dumps(theirs.get(key))} (set it back)"
        for key in ours | theirs
        if ours.get(key) != theirs.get(key)
    ]


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """All settings that make a model what it is, written in one way."""
    settings = model.model_dump(mode="json", exclude={"init_std", "hop_bias_init"})
    if model.fold:
        settings["window"] = 0  # fold[0] says it
    if not (model.fold or model.window or model.route):
        settings["full_every"] = 0  # all layers are full without it
    route = settings.pop("route") or {}
    return settings | {f"route.{key}": value for key, value in route.items()}


def _of_equal_kinds(model: ModelConfig) -> dict[str, Any]:
    """Settings that say which layers are of which kind, where that is known to be the same."""
    settings: dict[str, Any] = {"full_every": 0, "route_every": 0, "layers": []}
    if "strided" not in model.layer_kinds:  # of a fold there is only the window
        has_windows = bool({"window", "routed"} & set(model.layer_kinds))
        settings |= {"fold": [], "window": model.window_size if has_windows else 0}
    return settings
