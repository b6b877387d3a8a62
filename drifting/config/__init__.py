"""Configurations: what can be set (``schema``), where it is read from (``reading``), what may change in a run."""

from .changes import apply_changes, changed_keys, changes_made, check_asked, record_changes, recorded_changes
from .reading import AnyConfig, load_config, load_pretrain_config, read_config, save_config
from .schema import Config, DataConfig, EvaluationConfig, LossConfig, PretrainConfig

__all__ = [
    "AnyConfig", "Config", "DataConfig", "EvaluationConfig", "LossConfig", "PretrainConfig", "apply_changes",
    "changed_keys", "changes_made", "check_asked", "load_config", "load_pretrain_config", "read_config",
    "record_changes", "recorded_changes", "save_config",
]  # fmt: skip
