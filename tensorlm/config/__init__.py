"""The one form that everyone fills in: a TOML file plus `key.sub=value` overrides."""

from .schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardsConfig,
    ModelConfig,
    OptimConfig,
    RopeScaling,
    StageConfig,
    TrainConfig,
    apply_override,
    config_toml,
    load_config,
    model_differences,
    parse_config,
    read_tree,
)
from .section import Section, raise_all

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
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
    "model_differences",
    "parse_config",
    "raise_all",
    "read_tree",
]
