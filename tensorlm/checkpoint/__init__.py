"""Checkpoints: writing a run's state to files, and reading it back. Independent of the engine."""

from .compatible import check_resumable, config_to_read, model_differences
from .load import check_names, load_slices, load_weights, newest_checkpoint, select_checkpoint
from .manifest import Checkpoint, list_steps, manifest_text, open_checkpoint, step_folder
from .saver import Saver, check_disk_space
from .slices import STATE, ParameterSlice
