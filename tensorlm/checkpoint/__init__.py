"""A run's state becomes files, and files a state again; knows no engine."""

from .manifest import (
    Checkpoint,
    check_model,
    check_resumable,
    list_steps,
    manifest_text,
    open_checkpoint,
    step_folder,
)
from .saver import (
    Saver,
    check_names,
    gather_json,
    load,
    load_weights,
    newest_checkpoint,
    select_checkpoint,
)

__all__ = [
    "Checkpoint",
    "Saver",
    "check_model",
    "check_names",
    "check_resumable",
    "gather_json",
    "list_steps",
    "load",
    "load_weights",
    "manifest_text",
    "newest_checkpoint",
    "open_checkpoint",
    "select_checkpoint",
    "step_folder",
]
