"""Run configurations: the schema's defaults, YAML files over them, ``key=value`` overrides over those."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError, reason
from ..utils.files import atomic_write
from .schema import DATA_NAMES, Config, PretrainConfig

MOST_BYTES = 2**20  # of a configuration file
# What reading YAML of anything else ends in: its dates and numbers raise ValueError, for one.
NOT_YAML = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, KeyError, RecursionError)
CONFIG_DIR = Path(__file__).parents[1] / "configs"

AnyConfig = TypeVar("AnyConfig", Config, PretrainConfig)

MAY_CHANGE = (  # when a run is resumed
    "data.path", "data.workers", "step.queue_device", "step.labels_at_once", "step.images_at_once", "step.compile",
    "step.activation_checkpointing", "step.fsdp", "train.steps", "train.log_every", "train.save_every",
    "train.eval_every", "train.max_skipped_steps", "train.wandb",
    "evaluation.features", "evaluation.reference", "evaluation.num_samples", "evaluation.cfg_scales",
)  # fmt: skip
SHORTHANDS = {"data": "data.name"}  # keys of sections that may be set like one of their values: `data: digits`
EXTRACTORS = ("latent", "pixels", "resnet18", "convnext_v2", "mae")

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
    "optimizer.warmup_steps", "train.eval_every", "train.max_skipped_steps",
)  # fmt: skip
POSITIVE = ("model.mlp_ratio", "optimizer.learning_rate", "optimizer.max_grad_norm")
SHARES = (
    "guidance.uncond_prob", "loss.lambda_cls", "loss.finetune_lambda_cls", "model.dropout_prob",
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
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(path.read_text(), yaml.SafeLoader)):
            raise ValueError("aliases (*name), a few lines of which can stand for any number of values")
        values = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    except NOT_YAML as error:
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
        except NOT_YAML as error:
            raise UserError(f"{override!r}: the value is not valid YAML: {_one_line(error)}") from error
        for leaf, value in flatten({key: parsed["value"]}).items():  # type: ignore[index, call-overload]
            _assign(config, schema, leaf, value)
    try:
        result: AnyConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # an interpolation inside of a list, of another type
        raise UserError(f"{path}: {_one_line(error)}") from error
    check_values(result)
    return result


def save_config(config: Config | PretrainConfig, path: Path) -> None:
    """Write every key as YAML."""
    with atomic_write(path) as part:
        part.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def check_values(config: Config | PretrainConfig) -> None:
    """Raise :class:`UserError` naming the key, its value and what was expected, if a value is out of its range."""
    values = flatten(dataclasses.asdict(config))

    def is_share(value: float) -> bool:
        return 0 <= value <= 1

    def require(keys: Sequence[str], holds: Any, expected: str) -> None:
        for key in keys:
            if key in values and not holds(values[key]):
                raise UserError(f"{key} is {values[key]}, expected {expected}")

    require(COUNTS, lambda v: v >= 1, "1 or more")
    require(NON_NEGATIVE, lambda v: 0 <= v < math.inf, "0 or more")
    require(POSITIVE, lambda v: 0 < v < math.inf, "a positive number")
    require(SHARES, is_share, "a number from 0 to 1")
    require(["data.name"], lambda v: v in DATA_NAMES, f"one of: {', '.join(DATA_NAMES)}")
    require(
        ["loss.feature_extractor"],
        lambda v: v and set(v) <= set(EXTRACTORS) and len(set(v)) == len(v),
        f"one of: {', '.join(EXTRACTORS)}; or a list of them",
    )
    require(["step.queue_device"], lambda v: v in (None, "cpu", "cuda"), "cpu, cuda, or null for where the model is")
    optional_counts = ["data.image_size", "step.labels_at_once", "step.images_at_once"]
    require(optional_counts, lambda v: v is None or v >= 1, "1 or more")
    require(["evaluation.num_samples"], lambda v: v is None or v >= 2, "2 or more")
    require(["evaluation.cfg_scales"], lambda v: v and all(1 <= s < math.inf for s in v), "one or more of at least 1")
    require(["loss.temperatures"], lambda v: v and all(0 < R < math.inf for R in v), "one or more positive numbers")
    require(
        ["optimizer.ema_decay"],
        lambda v: is_share(v) if isinstance(v, float) else v and all(map(is_share, v)) and len(set(v)) == len(v),
        "a number from 0 to 1, or of a generator several different ones",
    )
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
    """Set one leaf of the schema, or say what is wrong with it. A list of one entry may be given as that entry."""
    types, key = _leaf_types(schema), SHORTHANDS.get(key, key)
    if key not in types:
        inside = [leaf for leaf in types if leaf.startswith(f"{key}.")]
        if inside:
            raise UserError(f"{origin}{key} is a section, set one of its keys: {', '.join(inside)}")
        raise UserError(f"{origin}unknown key {key!r}: did you mean {_nearest(key, types)!r}?")
    entries = [value] if types[key].startswith("list") and not isinstance(value, list) else value
    try:
        if any(isinstance(part, (dict, list)) for part in (value if isinstance(value, list) else [value])):
            raise TypeError("nested values where one, or a list of them, is expected")
        OmegaConf.update(config, key, entries)
        OmegaConf.select(config, key, throw_on_missing=True)  # resolves interpolations
    except (OmegaConfBaseException, TypeError, OverflowError) as error:
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
