"""Run configurations: dataclasses with the paper's values, YAML files over them, ``key=value`` overrides over those."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

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
    """Arguments of :class:`drifting.models.DriftingLoss`."""

    feature_extractor: str = "latent"
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
class Config:
    """A run."""

    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    step: StepConfig = field(default_factory=StepConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


MAY_CHANGE = (  # when a run is resumed
    "data.path", "data.workers", "train.steps", "train.log_every", "train.save_every", "train.eval_every",
)  # fmt: skip
SHORTHANDS = {"data": "data.name"}  # keys of sections that may be set like one of their values: `data: digits`

COUNTS = (  # integers of at least 1
    "model.patch_size", "model.embed_dim", "model.depth", "model.num_heads", "model.style_vocab",
    "step.labels_per_step", "step.gen_per_label", "step.pos_per_label", "step.uncond_per_label", "step.queue_size",
    "step.unconditional_queue_size", "train.steps", "train.batch_size", "train.log_every", "train.save_every",
)  # fmt: skip
NON_NEGATIVE = (
    "seed", "data.workers", "model.num_style_tokens", "model.n_cls_tokens", "loss.affinity_floor",
    "guidance.cfg_exponent", "optimizer.weight_decay", "optimizer.warmup_steps", "train.eval_every",
)  # fmt: skip
POSITIVE = ("model.mlp_ratio", "optimizer.learning_rate", "optimizer.max_grad_norm")
SHARES = ("guidance.uncond_prob", "optimizer.ema_decay")
CHOICES = {"data.name": tuple(DATASETS), "loss.feature_extractor": ("latent", "pixels", "resnet18")}


def load_config(name_or_file: str = "digits", overrides: Sequence[str] = ()) -> Config:
    """The configuration of that name or YAML file, with ``key=value`` overrides.

    Raises:
        UserError: no such configuration, an unknown or ill-typed key, or a value out of its range.
    """
    config = OmegaConf.structured(Config)
    path = _config_file(name_or_file)
    try:
        values = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise UserError(f"{path} holds a list, expected sections of keys such as `train:`")
    for key, value in flatten(OmegaConf.to_container(values)).items():
        _assign(config, key, value, f"{path}: ")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected key=value, for example train.steps=500")
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={override[len(key) + 1 :]}"]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{override!r}: the value is not valid YAML: {_one_line(error)}") from error
        for leaf, value in flatten({key: parsed["value"]}).items():  # type: ignore[index, call-overload]
            _assign(config, leaf, value)
    result: Config = OmegaConf.to_object(config)  # type: ignore[assignment]
    check_values(result)
    return result


def save_config(config: Config, path: Path) -> None:
    """Write every key as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def check_values(config: Config) -> None:
    """Raise :class:`UserError` naming the key, its value and what was expected, if a value is out of its range."""
    values = flatten(dataclasses.asdict(config))

    def require(keys: Sequence[str], holds: Any, expected: str) -> None:
        for key in keys:
            if not holds(values[key]):
                raise UserError(f"{key} is {values[key]}, expected {expected}")

    require(COUNTS, lambda v: v >= 1, "1 or more")
    require(NON_NEGATIVE, lambda v: 0 <= v < math.inf, "0 or more")
    require(POSITIVE, lambda v: 0 < v < math.inf, "a positive number")
    require(SHARES, lambda v: 0 <= v <= 1, "a number from 0 to 1")
    for key, choices in CHOICES.items():
        require([key], lambda v, choices=choices: v in choices, f"one of: {', '.join(choices)}")
    require(["data.image_size"], lambda v: v is None or v >= 1, "1 or more")
    require(["loss.temperatures"], lambda v: v and all(0 < R < math.inf for R in v), "one or more positive numbers")
    require(
        ["guidance.cfg_scale_range"],
        lambda v: len(v) == 2 and 1 <= v[0] <= v[1] < math.inf,
        "[least, greatest] with 1 <= least <= greatest",
    )
    heads = config.model.num_heads
    require(["model.embed_dim"], lambda v: v % (2 * heads) == 0, f"a multiple of 2 * model.num_heads = {2 * heads}")
    require(["model.embed_dim"], lambda v: v % 4 == 0, "a multiple of 4")


def changed_keys(old: Config, new: Config) -> list[str]:
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


def _config_file(name_or_file: str) -> Path:
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no configuration file {path}")
        return path
    path = CONFIG_DIR / f"{name_or_file}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in CONFIG_DIR.glob("*.yaml")))
        raise UserError(f"there is no configuration {name_or_file!r}: expected a .yaml file or one of: {names}")
    return path


def _assign(config: DictConfig, key: str, value: Any, origin: str = "") -> None:
    """Set one leaf of the schema, or say what is wrong with it."""
    types, key = _leaf_types(), SHORTHANDS.get(key, key)
    if key not in types:
        inside = [leaf for leaf in types if leaf.startswith(f"{key}.")]
        if inside:
            raise UserError(f"{origin}{key} is a section, set one of its keys: {', '.join(inside)}")
        raise UserError(f"{origin}unknown key {key!r}: did you mean {_nearest(key, types)!r}?")
    try:
        OmegaConf.update(config, key, value)
        OmegaConf.select(config, key, throw_on_missing=True)  # resolves interpolations
    except OmegaConfBaseException as error:
        default = flatten(dataclasses.asdict(Config()))[key]
        raise UserError(f"{origin}{key} is {value!r}, expected {types[key]}, for example {default}") from error


def _leaf_types(schema: type = Config, prefix: str = "") -> dict[str, str]:
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
