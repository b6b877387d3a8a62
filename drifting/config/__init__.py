"""Configurations: what can be set (``schema``), where it is read from (``reading``), what may change in a run."""

from ..errors import libraries

with libraries():
    from .reading import AnyConfig, load_config, read_config, save_config
    from .schema import Config, DataConfig, EvaluationConfig, LossConfig, PretrainConfig

__all__ = [
    "AnyConfig", "Config", "DataConfig", "EvaluationConfig", "LossConfig", "PretrainConfig", "load_config",
    "read_config", "save_config",
]  # fmt: skip
