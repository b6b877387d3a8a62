"""Run configurations: the schema's defaults, a YAML file over them, ``key=value`` of the command line over that."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from ..errors import UserError, explained
from ..utils.files import atomic_write
from ..utils.named import nearest
from .keys import expected_of, keys_of, typed
from .schema import Config, PretrainConfig, takes_arguments

CONFIG_DIR = Path(__file__).parents[1] / "configs"
MOST_BYTES = 2**17  # A configuration file has at most so many.
NAMED = ("data", "model", "loss.field")  # These sections have a name, which `data: digits` sets.
PLAIN = {  # Plain values of YAML 1.2: 1e-3 is a number, and a date is text.
    "null": r"null|~|",
    "bool": r"true|True|false|False",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?((0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}

AnyConfig = TypeVar("AnyConfig", Config, PretrainConfig)


def load_config(name_or_file: str = "digits", overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of a generator's training, see :func:`read_config`."""
    return read_config(name_or_file, overrides, Config)


def read_config(name_or_file: str, overrides: Sequence[str], schema: type[AnyConfig]) -> AnyConfig:
    """Read the configuration of that name or YAML file, with ``key=value`` overrides; nothing is imported for it."""
    encoders = schema is PretrainConfig
    files = {file.stem: file for file in CONFIG_DIR.glob("*.yaml") if file.stem.startswith("mae_") == encoders}
    path = Path(name_or_file) if name_or_file.endswith((".yaml", ".yml")) else files.get(name_or_file)
    if path is None or not path.is_file():
        names = ", ".join(sorted(files))
        raise UserError(f"there is no configuration {name_or_file!r}: expected a .yaml file or one of: {names}")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES} bytes")
    content = _parse(path.read_bytes(), str(path)) or {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected sections of keys such as `train:`")
    file, command = flattened(content), read_overrides(overrides)
    for section in NAMED:
        name = f"{section}.name"
        old, new = str(file.get(name, "")), str(command.get(name, file.get(name, "")))
        own = section == "loss.field" or any(takes_arguments(section, part) for part in (old, new))
        if old != new and own:  # It has defaults of its own.
            file = {key: value for key, value in file.items() if not key.startswith(f"{section}.")}
    config, values = schema(), file | command
    for key in sorted(values, key=lambda key: not key.endswith(".name")):  # A name says which keys there are.
        set_value(config, key, values[key], "" if key in command else f"{path}: ")
    return config


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The values of ``key=value`` texts, by dotted key."""
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: expected key=value, for example train.steps=500")
        values |= flattened({key: _parse(text, repr(override))})
    return values


def save_config(config: Config | PretrainConfig, path: Path) -> None:
    """Write every key as YAML, which :func:`read_config` reads as the same configuration."""
    with atomic_write(path) as part:
        part.write_text(yaml.dump(_sections(config), Dumper=_Dumper, sort_keys=False), encoding="utf-8")


def values_of(config: Config | PretrainConfig) -> dict[str, Any]:
    """Every value by its dotted key; the arguments of a user's own part are keys of its section."""
    return flattened(_sections(config))


def set_value(config: Config | PretrainConfig, key: str, value: Any, origin: str = "") -> None:
    """Set one key to a value from YAML, or raise :class:`UserError` with a message that begins with ``origin``."""
    section, _, name = key.rpartition(".")
    keys, part = keys_of(type(config)), cast(Any, config)
    for place in filter(None, section.split(".")):
        part = getattr(part, place, None)
    if _is_argument(section, part, name):
        part.arguments[name] = value
    elif key in keys:
        words, holds = keys[key].metadata["rule"]
        try:
            converted = typed(value, keys[key].type)
            if converted is not None and not holds(converted):
                raise ValueError(words)
        except (TypeError, ValueError, OverflowError) as error:
            expected = f"{expected_of(keys[key])}, for example {keys[key].metadata['default']}"
            raise UserError(f"{origin}{key} is {value!r}, expected {expected}") from error
        setattr(part, name, converted)
    elif inside := [other for other in keys if other.startswith(f"{key}.")]:
        raise UserError(f"{origin}{key} is a section, set one of its keys: {', '.join(inside)}")
    else:
        raise UserError(f"{origin}unknown key {key!r}: did you mean {nearest(key, keys)!r}?")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {None: [(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{PLAIN[tag]})$")) for tag in PLAIN]}

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


def _parse(text: str | bytes, origin: str) -> Any:
    with explained(f"{origin} is not valid YAML"):
        return yaml.load(text, _Loader)


def flattened(sections: Mapping[Any, Any]) -> dict[str, Any]:
    """Values by dotted key, of sections in sections; what a user's own part takes may be a dictionary too."""
    flat: dict[str, Any] = {}
    for key, content in sections.items():
        if isinstance(content, dict) and ("." not in str(key) or key in NAMED):
            flat |= flattened({f"{key}.{name}": value for name, value in content.items()})
        else:
            flat[f"{key}.name" if key in NAMED else str(key)] = content
    return flat


def _sections(config: Config | PretrainConfig) -> dict[str, Any]:
    sections = asdict(config)
    for section in ("data", "model"):  # These can name a user's own part.
        part, arguments = getattr(config, section), sections[section].pop("arguments", {})
        ours = {name: value for name, value in sections[section].items() if not _is_argument(section, part, name)}
        sections[section] = ours | arguments
    return sections


def _is_argument(section: str, part: Any, name: str) -> bool:
    """Tell whether the key ``name`` of a section is an argument of what the section names."""
    is_ours = name in ("name", "workers") and hasattr(part, name)
    return takes_arguments(section, str(getattr(part, "name", ""))) and not is_ours
