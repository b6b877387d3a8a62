"""Run configurations: dataclasses with the paper's values, YAML files over them, ``key=value`` overrides over those."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .cli import UserError
from .data import DATASETS, DataConfig

CONFIG_DIR = Path(__file__).parent / "configs"


@dataclass
class ModelConfig:
    """Arguments of :class:`drifting.models.DriftingDiT`; image size, channels and classes come from the data."""

    patch_size: int = 2
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_style_tokens: int = 32
    style_vocab: int = 64
    n_cls_tokens: int = 16


@dataclass
class LossConfig:
    """Arguments of :class:`drifting.models.DriftingLoss`.

    ``feature_extractor`` is one name or a list of several, whose feature maps are taken together. ``mae`` says where
    the one of that name comes from: a source of :func:`drifting.pretrained.load_mae`.
    """

    feature_extractor: list[str] = field(default_factory=lambda: ["latent"])
    mae: str | None = None
    temperatures: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.2])
    affinity_floor: float = 0.0


@dataclass
class StepConfig:
    """What one training step draws, see :class:`drifting.training.DriftingTrainer`."""

    labels_per_step: int = 64
    gen_per_label: int = 64
    pos_per_label: int = 64
    uncond_per_label: int = 16
    queue_size: int = 128
    unconditional_queue_size: int = 1000
    labels_at_once: int | None = None


@dataclass
class GuidanceConfig:
    """Distribution of the guidance scale in training, see :func:`drifting.training.guidance.sample_cfg_scale`."""

    cfg_scale_range: list[float] = field(default_factory=lambda: [1.0, 4.0])
    cfg_exponent: float = 3.0
    uncond_prob: float = 0.0


@dataclass
class OptimizerConfig:
    """AdamW, its schedule and the average of the weights, see :func:`drifting.training.create_trainer`."""

    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_steps: int = 5000
    cosine_decay: bool = False
    ema_decay: float = 0.999
    max_grad_norm: float = 2.0


@dataclass
class TrainConfig:
    """Length of the run and what happens when. ``eval_every=0`` evaluates at the end only."""

    steps: int = 30000
    batch_size: int = 64
    log_every: int = 50
    save_every: int = 2000
    eval_every: int = 0


@dataclass
class EvaluationConfig:
    """How generated images are judged: by the features of the classifier in that directory of
    :mod:`drifting.train_classifier`, or without one in pixels, see :mod:`drifting.evaluation`."""

    classifier: str | None = None


@dataclass
class Config:
    """A run of :mod:`drifting.train`."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    step: StepConfig = field(default_factory=StepConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class MAEConfig:
    """Arguments of :class:`drifting.models.MAE`; channels and classes come from the data."""

    base_channels: int = 256
    layers: list[int] = field(default_factory=lambda: [3, 4, 6, 3])
    patch_size: int = 2
    input_patch_size: int = 1
    dropout_prob: float = 0.0


@dataclass
class MAELossConfig:
    """What is hidden and what weighs how much, see :class:`drifting.training.MAETrainer`."""

    mask_ratio_range: list[float] = field(default_factory=lambda: [0.5, 0.5])
    lambda_cls: float = 0.0
    finetune_steps: int = 0
    finetune_warmup_steps: int = 1000
    finetune_lambda_cls: float = 0.1


@dataclass
class PretrainConfig:
    """A run of :mod:`drifting.pretrain`."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: MAEConfig = field(default_factory=MAEConfig)
    loss: MAELossConfig = field(default_factory=MAELossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


AnyConfig = TypeVar("AnyConfig", Config, PretrainConfig)

MAY_CHANGE = (  # when a run is resumed
    "data.path", "data.workers", "train.steps", "train.log_every", "train.save_every", "train.eval_every",
    "evaluation.classifier",
)  # fmt: skip
SHORTHANDS = {"data": "data.name"}  # keys of sections that may be set like one of their values: `data: digits`
EXTRACTORS = ("latent", "pixels", "resnet18", "mae")

# Checks of values; either kind of configuration has some of these keys.
COUNTS = (  # integers of at least 1
    "model.patch_size", "model.embed_dim", "model.depth", "model.num_heads", "model.style_vocab",
    "model.base_channels", "model.input_patch_size",
    "step.labels_per_step", "step.gen_per_label", "step.pos_per_label", "step.uncond_per_label", "step.queue_size",
    "step.unconditional_queue_size", "train.steps", "train.batch_size", "train.log_every", "train.save_every",
)  # fmt: skip
NON_NEGATIVE = (
    "seed", "data.workers", "model.num_style_tokens", "model.n_cls_tokens", "loss.affinity_floor",
    "loss.finetune_steps", "loss.finetune_warmup_steps", "guidance.cfg_exponent", "optimizer.weight_decay",
    "optimizer.warmup_steps", "train.eval_every",
)  # fmt: skip
POSITIVE = ("model.mlp_ratio", "optimizer.learning_rate", "optimizer.max_grad_norm")
SHARES = (
    "guidance.uncond_prob", "optimizer.ema_decay", "loss.lambda_cls", "loss.finetune_lambda_cls", "model.dropout_prob",
)  # fmt: skip


def load_config(name_or_file: str = "digits", overrides: Sequence[str] = ()) -> Config:
    """The configuration of a generator's training, see :func:`read_config`."""
    return read_config(name_or_file, overrides, Config)


def load_pretrain_config(name_or_file: str = "mae_fashion_mnist", overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration of an encoder's training, see :func:`read_config`."""
    return read_config(name_or_file, overrides, PretrainConfig)


def read_config(name_or_file: str, overrides: Sequence[str], schema: type[AnyConfig]) -> AnyConfig:
    """The configuration of that name or YAML file, with ``key=value`` overrides.

    Raises:
        UserError: no such configuration, an unknown or ill-typed key, or a value out of its range.
    """
    config = OmegaConf.structured(schema)
    path = _config_file(name_or_file, schema)
    try:
        values = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise UserError(f"{path} holds a list, expected sections of keys such as `train:`")
    for key, value in flatten(OmegaConf.to_container(values)).items():
        _assign(config, schema, key, value, f"{path}: ")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected key=value, for example train.steps=500")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={override[len(key) + 1 :]}"]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{override!r}: the value is not valid YAML: {_one_line(error)}") from error
        for leaf, value in flatten({key: parsed["value"]}).items():  # type: ignore[index, call-overload]
            _assign(config, schema, leaf, value)
    result: AnyConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    check_values(result)
    return result


def save_config(config: Config | PretrainConfig, path: Path) -> None:
    """Write every key as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def check_values(config: Config | PretrainConfig) -> None:
    """Raise :class:`UserError` naming the key, its value and what was expected, if a value is out of its range."""
    values = flatten(dataclasses.asdict(config))

    def require(keys: Sequence[str], holds: Any, expected: str) -> None:
        for key in keys:
            if key in values and not holds(values[key]):
                raise UserError(f"{key} is {values[key]}, expected {expected}")

    require(COUNTS, lambda v: v >= 1, "1 or more")
    require(NON_NEGATIVE, lambda v: 0 <= v < math.inf, "0 or more")
    require(POSITIVE, lambda v: 0 < v < math.inf, "a positive number")
    require(SHARES, lambda v: 0 <= v <= 1, "a number from 0 to 1")
    require(["data.name"], lambda v: v in DATASETS, f"one of: {', '.join(DATASETS)}")
    require(
        ["loss.feature_extractor"],
        lambda v: v and set(v) <= set(EXTRACTORS) and len(set(v)) == len(v),
        f"one of: {', '.join(EXTRACTORS)}; or a list of them",
    )
    require(["data.image_size", "step.labels_at_once"], lambda v: v is None or v >= 1, "1 or more")
    require(["loss.temperatures"], lambda v: v and all(0 < R < math.inf for R in v), "one or more positive numbers")
    require(
        ["guidance.cfg_scale_range"],
        lambda v: len(v) == 2 and 1 <= v[0] <= v[1] < math.inf,
        "[least, greatest] with 1 <= least <= greatest",
    )
    require(
        ["loss.mask_ratio_range"],
        lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
        "[least, greatest] with 0 < least <= greatest <= 1",
    )
    require(["model.layers"], lambda v: len(v) == 4 and min(v) >= 1, "four numbers of 1 or more")
    if isinstance(config, Config):
        width = 2 * config.model.num_heads
        require(["model.embed_dim"], lambda v: v % width == 0, f"a multiple of 2 * model.num_heads = {width}")
        require(["model.embed_dim"], lambda v: v % 4 == 0, "a multiple of 4")
        if ("mae" in config.loss.feature_extractor) != (config.loss.mae is not None):
            raise UserError(
                f"loss.mae is {config.loss.mae} and loss.feature_extractor {config.loss.feature_extractor}: "
                "expected both or neither to name a masked autoencoder"
            )


def changed_keys(old: Config | PretrainConfig, new: Config | PretrainConfig) -> list[str]:
    """``key: old, new`` for each value that differs and must not when a run is resumed."""
    before, after = flatten(dataclasses.asdict(old)), flatten(dataclasses.asdict(new))
    differing = [key for key in before if key not in MAY_CHANGE and before[key] != after[key]]
    return [f"{key}: {before[key]}, now {after[key]}" for key in differing]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _config_file(name_or_file: str, schema: type) -> Path:
    """That file, or the one of that name; those of encoders are called ``mae_...``."""
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no configuration file {path}")
        return path
    path = CONFIG_DIR / f"{name_or_file}.yaml"
    names = sorted(
        file.stem for file in CONFIG_DIR.glob("*.yaml") if file.stem.startswith("mae_") == (schema is PretrainConfig)
    )
    if name_or_file not in names:
        raise UserError(
            f"there is no configuration {name_or_file!r}: expected a .yaml file or one of: {', '.join(names)}"
        )
    return path


def _assign(config: DictConfig, schema: type, key: str, value: Any, origin: str = "") -> None:
    """Set one leaf of the schema, or say what is wrong with it. A list of names may be given as one name."""
    types, key = _leaf_types(schema), SHORTHANDS.get(key, key)
    if key not in types:
        inside = [leaf for leaf in types if leaf.startswith(f"{key}.")]
        if inside:
            raise UserError(f"{origin}{key} is a section, set one of its keys: {', '.join(inside)}")
        raise UserError(f"{origin}unknown key {key!r}: did you mean {_nearest(key, types)!r}?")
    if types[key] == "list[str]" and isinstance(value, str):
        value = [value]
    try:
        OmegaConf.update(config, key, value)
        OmegaConf.select(config, key, throw_on_missing=True)  # resolves interpolations
    except OmegaConfBaseException as error:
        default = flatten(dataclasses.asdict(schema()))[key]
        raise UserError(f"{origin}{key} is {value!r}, expected {types[key]}, for example {default}") from error


def _leaf_types(schema: type, prefix: str = "") -> dict[str, str]:
    """Every dotted key of the schema with the name of its type."""
    types: dict[str, str] = {}
    for name, hint in get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            types |= _leaf_types(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            types[f"{prefix}{name}"] = str(hint) if get_args(hint) else hint.__name__
    return types


def _nearest(key: str, candidates: Sequence[str] | dict[str, str]) -> str:
    """The candidate most like ``key`` as a whole or in its last part."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, last)

    return max(candidates, key=likeness)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
