"""The typed, validated configuration tree.

A configuration is read from YAML and changed by ``--set a.b=value``. The result, with all defaults, is
written to the workspace.
"""

from peso.config.baselines import BASELINES, BaselineOptions, baseline_label
from peso.config.data import (
    PERIOD,
    ColumnsConfig,
    DataConfig,
    ItemColumnsConfig,
    ItemTableConfig,
    SimulateConfig,
    StagesConfig,
)
from peso.config.gate import GateConfig
from peso.config.items import BehaviorConfig, ItemsConfig, RefreshConfig, RqVaeConfig
from peso.config.model import (
    AdapterConfig,
    BackboneConfig,
    DecodingConfig,
    EvaluationConfig,
    HeadConfig,
    LaterTrainingConfig,
    PromptConfig,
    ReportConfig,
    TrainingConfig,
    TrialsConfig,
)
from peso.config.reading import changed_keys, dump_config, load_config, valid_keys
from peso.config.strategy import STRATEGIES, StrategyOptions, strategy_options
from peso.config.tree import Config

__all__ = [
    "BASELINES",
    "PERIOD",
    "STRATEGIES",
    "AdapterConfig",
    "BackboneConfig",
    "BaselineOptions",
    "BehaviorConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "DecodingConfig",
    "EvaluationConfig",
    "GateConfig",
    "HeadConfig",
    "ItemColumnsConfig",
    "ItemTableConfig",
    "ItemsConfig",
    "LaterTrainingConfig",
    "PromptConfig",
    "RefreshConfig",
    "ReportConfig",
    "RqVaeConfig",
    "SimulateConfig",
    "StagesConfig",
    "StrategyOptions",
    "TrainingConfig",
    "TrialsConfig",
    "baseline_label",
    "changed_keys",
    "dump_config",
    "load_config",
    "strategy_options",
    "valid_keys",
]
