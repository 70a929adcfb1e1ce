"""Whether a run can continue from a checkpoint: the same model, data and rows."""

import json
from typing import Any

from tensorlm.config import Config, ModelConfig, parse_config
from tensorlm.runtime.errors import UserError

from .manifest import Checkpoint


def check_resumable(checkpoint: Checkpoint, config: Config, data_fingerprint: str) -> None:
    """Check that the run of `config`, on data of this fingerprint, can continue from `checkpoint`.

    Raises:
        UserError: the checkpoint belongs to another model, other data or other rows per step.
    """
    check_model(checkpoint, config)
    try:
        state, fingerprint = checkpoint.manifest["state"], checkpoint.manifest["data_fingerprint"]
        step, rows = int(state["step"]), int(state["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.folder}: must be a checkpoint of a run ({error})") from None
    if rows and fingerprint != data_fingerprint:
        raise UserError(
            f"{checkpoint.folder}: was trained with other data, [data] settings or run.seed "
            "(restore them, or choose a new run.dir)"
        )
    # The last phase has no fixed end: it may continue with other rows per step.
    earlier = config.rows_after(sum(phase.steps for phase in config.train.earlier_stages))
    expected = config.rows_after(step)
    fits = rows >= earlier if expected >= earlier else rows == expected
    if not fits:
        raise UserError(
            f"train.earlier_stages: {step} steps must have the {rows} rows of {checkpoint.folder}, "
            f"got {min(expected, earlier)} (restore the phases, or choose a new run.dir)"
        )


def check_model(checkpoint: Checkpoint, config: Config) -> None:
    """Check that the configured model is the one that was trained.

    Raises:
        UserError: one line for each setting that differs.
    """
    try:
        differences = model_differences(checkpoint.manifest["config"], config)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{checkpoint.folder}: must be a checkpoint of a run") from None
    if differences:
        raise UserError(*(f"{checkpoint.folder}: {line}" for line in differences))


def config_to_read(checkpoint: Checkpoint, config: Config) -> Config:
    """The configuration of a checkpoint, for evaluation or export, with the stretch of `config`.

    A model reads contexts longer than its training rows better with a larger stretch, which keeps
    distances within those of training. All other settings of `[model]` must be the checkpoint's.

    Raises:
        UserError: one line for each setting that differs.
    """
    trained = parse_config(checkpoint.manifest["config"], str(checkpoint.folder))
    if trained.model.route is None or config.model.route is None:
        check_model(checkpoint, config)
        return trained
    check_model(checkpoint, _with_stretch(config, trained.model.route.stretch))
    return _with_stretch(trained, config.model.route.stretch)


def _with_stretch(config: Config, stretch: int) -> Config:
    assert config.model.route is not None
    route = config.model.route.model_copy(update={"stretch": stretch})
    model = config.model.model_copy(update={"route": route})
    return config.model_copy(update={"model": model})


def model_differences(trained: dict[str, Any], config: Config) -> list[str]:
    """Differences between the configured model and a checkpoint's, one line for each setting.

    Settings of initial values may differ, since the checkpoint has its own values.

    Args:
        trained: `config` of the checkpoint's manifest.
        config: the current configuration.

    Raises:
        KeyError, ValueError: `trained` is not the configuration of a run.
    """
    before, now = ModelConfig.model_validate(trained["model"]), config.model
    theirs, ours = _architecture(before), _architecture(now)
    if theirs["head_dim"] != ours["head_dim"]:  # 0 and hidden_size / num_heads mean the same
        theirs["head_dim"], ours["head_dim"] = before.head_size, now.head_size
    if before.layer_kinds == now.layer_kinds:  # different settings can give the same kinds
        for settings, model in ((theirs, before), (ours, now)):
            settings |= _of_equal_kinds(model)
    return [
        f"model.{key}: must be {json.dumps(theirs.get(key))}, as in the checkpoint, got "
        f"{json.dumps(ours.get(key))} (restore it)"
        for key in ours | theirs
        if ours.get(key) != theirs.get(key)
    ]


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """All settings that define a model's function, in normal form."""
    settings = model.model_dump(mode="json", exclude={"init_std", "hop_bias_init"})
    if model.fold:
        settings["window"] = 0  # equal to fold[0]
    if not (model.fold or model.window or model.route):
        settings["full_every"] = 0  # all layers are full without it
    route = settings.pop("route") or {}
    return settings | {f"route.{key}": value for key, value in route.items()}


def _of_equal_kinds(model: ModelConfig) -> dict[str, Any]:
    """Normal form of the settings that choose the kinds of layers, for models with equal kinds."""
    settings: dict[str, Any] = {"full_every": 0, "route_every": 0, "layers": []}
    if "strided" not in model.layer_kinds:  # a fold only sets the window then
        has_windows = bool({"window", "routed"} & set(model.layer_kinds))
        settings |= {"fold": [], "window": model.window_size if has_windows else 0}
    return settings
