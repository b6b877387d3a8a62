"""Run configurations: the schema's defaults, a YAML file over them, ``key=value`` of the command line over that."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import UserError, reason
from ..utils.files import atomic_write
from ..utils.named import check_arguments, import_named, is_own, nearest
from .keys import expected_of, keys_of, typed
from .schema import DATA_NAMES, DRIFTING_DIT, Config, PretrainConfig

CONFIG_DIR = Path(__file__).parents[1] / "configs"
MOST_BYTES = 2**17  # of a configuration file
NAMES = {"model": "model.name", "data": "data.name"}  # Sections that may be set like their name: `data: digits`.
OURS = {"model": ("name",), "data": ("name", "workers")}  # Their keys that are no arguments of a user's own part.

AnyConfig = TypeVar("AnyConfig", Config, PretrainConfig)


def load_config(name_or_file: str = "digits", overrides: Sequence[str] = ()) -> Config:
    """The configuration of a generator's training, see :func:`read_config`."""
    return read_config(name_or_file, overrides, Config)


def load_pretrain_config(name_or_file: str = "mae_fashion_mnist", overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration of an encoder's training, see :func:`read_config`."""
    return read_config(name_or_file, overrides, PretrainConfig)


def read_config(
    name_or_file: str, overrides: Sequence[str], schema: type[AnyConfig], trusted: bool = True
) -> AnyConfig:
    """The configuration of that name or YAML file, with ``key=value`` overrides.

    Overrides that name another network than the file start from that network's defaults, and likewise for data of the
    user's own.

    Args:
        trusted: whether the user gave this file, so that the names ``module:Name`` in it are imported to check them
            and their arguments. Those in a run directory's file are kept as text.

    Raises:
        UserError: there is no such configuration, a key is unknown or its value ill-typed or out of range, or a name
            cannot be imported or does not take its arguments.
    """
    path = _config_file(name_or_file, schema)
    file, command = _read_file(path), read_overrides(overrides)
    for section, name in NAMES.items():
        old = file.get(name, DRIFTING_DIT)
        new = command.get(name, old)
        if old != new and (section == "model" or is_own(str(old)) or is_own(str(new))):
            file = {key: value for key, value in file.items() if not key.startswith(f"{section}.")}
    config = schema()
    for values, origin in ((file, f"{path}: "), (command, "")):
        for key in sorted(values, key=lambda key: key not in NAMES.values()):  # A name says which keys there are.
            set_value(config, key, values[key], origin)
    check_values(config)
    if trusted:
        _check_own_parts(config)
    return config


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The values of ``key=value`` texts, by dotted key."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected key=value, for example train.steps=500")
        try:
            value = yaml.load(text, _Loader)
        except Exception as error:
            raise UserError(f"{override!r}: the value is not valid YAML: {reason(error)}") from error
        values |= _flat({key: value})
    return values


def save_config(config: Config | PretrainConfig, path: Path) -> None:
    """Write every key as YAML, which :func:`read_config` reads as the same configuration."""
    with atomic_write(path) as part:
        part.write_text(yaml.dump(_sections(config), Dumper=_Dumper, sort_keys=False))


def values_of(config: Config | PretrainConfig) -> dict[str, Any]:
    """Every value by its dotted key; the arguments of a user's own part are keys of its section."""
    return _flat(_sections(config))


def set_value(config: Config | PretrainConfig, key: str, value: Any, origin: str = "") -> None:
    """Set one key to a value from YAML.

    Raises:
        UserError: the key is unknown or the value of another type; the message begins with ``origin``.
    """
    keys = keys_of(type(config))
    section, _, name = key.rpartition(".")
    part: Any = getattr(config, section, None) if section else config
    if section in NAMES and name not in OURS[section] and _has_arguments(part):
        part.arguments[name] = value
    elif key in keys:
        try:
            setattr(part, name, typed(value, keys[key].type))
        except (TypeError, OverflowError) as error:
            expected = f"{expected_of(keys[key])}, for example {keys[key].metadata['default']}"
            raise UserError(f"{origin}{key} is {value!r}, expected {expected}") from error
    elif inside := [other for other in keys if other.startswith(f"{key}.")]:
        raise UserError(f"{origin}{key} is a section, set one of its keys: {', '.join(inside)}")
    else:
        raise UserError(f"{origin}unknown key {key!r}: did you mean {nearest(key, keys)!r}?")


def check_values(config: Config | PretrainConfig) -> None:
    """Raise :class:`UserError` naming the key, its value and what was expected, if a value is out of its range."""
    values = values_of(config)
    for key, field in keys_of(type(config)).items():
        value = values.get(key)
        if value is not None and not field.metadata["holds"](value):
            raise UserError(f"{key} is {value}, expected {field.metadata['expected']}")
    if isinstance(config, Config):
        model, loss = config.model, config.loss
        if model.embed_dim % math.lcm(4, 2 * model.num_heads):
            expected = f"a multiple of 4 and of 2 * model.num_heads = {2 * model.num_heads}"
            raise UserError(f"model.embed_dim is {model.embed_dim}, expected {expected}")
        if ("mae" in loss.feature_extractor) != (loss.mae is not None):
            raise UserError(
                f"loss.mae is {loss.mae} and loss.feature_extractor {loss.feature_extractor}: "
                "expected both or neither to name a masked autoencoder"
            )


class _Loader(yaml.SafeLoader):
    """YAML whose plain values are those of its version 1.2: 1e-3 is a number, a date is text."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise UserError("it has aliases (*name), a few lines of which can stand for any number of values")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for name, count in Counter(str(key.value) for key, _ in node.value).items():
            if count > 1:
                raise UserError(f"it has {name} {count} times in one section")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


for _tag, _pattern in (
    ("null", r"null|~|"),
    ("bool", r"true|True|false|False"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)"),
    ("float", r"[-+]?((0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [None])


def _read_file(path: Path) -> dict[str, Any]:
    """The values in a YAML file, by dotted key."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"it has more than {MOST_BYTES} bytes")
        values = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    except Exception as error:
        raise UserError(f"{path} is not valid YAML: {reason(error)}") from error
    if not isinstance(values, dict | None):
        raise UserError(f"{path} holds a {type(values).__name__}, expected sections of keys such as `train:`")
    return _flat(values or {})


def _flat(sections: Mapping[Any, Any]) -> dict[str, Any]:
    """Sections as one dictionary with dotted keys, which takes a section's name for its key ``name``."""
    flat: dict[str, Any] = {}
    for section, content in sections.items():
        if isinstance(content, dict) and "." not in str(section):
            flat |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            flat[NAMES.get(section, str(section))] = content
    return flat


def _sections(config: Config | PretrainConfig) -> dict[str, Any]:
    """The configuration as a YAML file has it."""
    sections = asdict(config)
    for section in NAMES:
        values = sections[section]
        arguments = values.pop("arguments", {})
        if _has_arguments(getattr(config, section)):
            sections[section] = {name: values[name] for name in OURS[section]} | arguments
    return sections


def _has_arguments(part: Any) -> bool:
    """Whether further keys of a section are arguments of the part that it names, instead of fields of its dataclass."""
    return getattr(part, "name", DRIFTING_DIT) not in (DRIFTING_DIT, *DATA_NAMES)


def _check_own_parts(config: Config | PretrainConfig) -> None:
    """Import the user's own parts, and see that networks and data take the arguments that they are given."""
    for section, key in NAMES.items():
        part = getattr(config, section)
        if is_own(getattr(part, "name", "")):
            check_arguments(import_named(part.name, key), part.arguments, section)
    for name in config.loss.feature_extractor if isinstance(config, Config) else ():
        if is_own(name):
            import_named(name, "loss.feature_extractor")


def _config_file(name_or_file: str, schema: type) -> Path:
    """That file, or the one of that name; those of encoders are called ``mae_...``."""
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"there is no configuration file {path}")
        return path
    files = [file for file in CONFIG_DIR.glob("*.yaml") if file.stem.startswith("mae_") == (schema is PretrainConfig)]
    names = sorted(file.stem for file in files)
    if name_or_file not in names:
        raise UserError(
            f"there is no configuration {name_or_file!r}: expected a .yaml file or one of: {', '.join(names)}"
        )
    return CONFIG_DIR / f"{name_or_file}.yaml"
