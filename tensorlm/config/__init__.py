"""The configuration of a run: a TOML file plus `key.sub=value` overrides."""

from .layer_kinds import LayerKind
from .layer_words import attention_in_words, layers_in_words, why_slow
from .load import SETTINGS, apply_override, config_toml, load_config, parse_config, read_tree
from .model import ModelConfig, RopeScaling, RouteConfig
from .schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    FusedLayers,
    GuardsConfig,
    LinearFormat,
    OptimConfig,
    PhaseConfig,
    Recompute,
    TrainConfig,
)
from .section import Section, raise_all
