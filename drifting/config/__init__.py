"""Configurations: what can be set (``schema``), and where it is read from (``reading``)."""

from .reading import AnyConfig, changed_keys, flatten, load_config, load_pretrain_config, read_config, save_config
from .schema import Config, DataConfig, EvaluationConfig, LossConfig, PretrainConfig

__all__ = [
    "AnyConfig", "Config", "DataConfig", "EvaluationConfig", "LossConfig", "PretrainConfig", "changed_keys", "flatten",
    "load_config", "load_pretrain_config", "read_config", "save_config",
]  # fmt: skip
