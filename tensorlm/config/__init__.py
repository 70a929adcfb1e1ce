"""The one form that everyone fills in: a TOML file plus `key.sub=value` overrides."""

from .load import apply_override, config_toml, load_config, parse_config, read_tree
from .schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    FusedLayers,
    GuardsConfig,
    ModelConfig,
    OptimConfig,
    RopeScaling,
    StageConfig,
    TrainConfig,
)
from .section import Section, raise_all

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "FusedLayers",
    "GuardsConfig",
    "ModelConfig",
    "OptimConfig",
    "RopeScaling",
    "Section",
    "StageConfig",
    "TrainConfig",
    "apply_override",
    "config_toml",
    "load_config",
    "parse_config",
    "raise_all",
    "read_tree",
]
