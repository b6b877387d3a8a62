"""How a key of a configuration is declared. The checks of its values and ``--help`` follow from the declaration."""

import json
import textwrap
from collections.abc import Callable
from copy import copy
from dataclasses import Field, field, fields, is_dataclass
from functools import partial
from math import inf
from typing import Any, get_args, get_origin

from ..utils.named import is_own

Rule = tuple[str, Callable[[Any], bool]]  # It says in words what is expected of a value, and whether a value is so.
ANY: Rule = "", lambda value: True
FROM_0: Rule = "0 or more", lambda value: 0 <= value < inf
FROM_1: Rule = "1 or more", lambda value: 1 <= value < inf
FROM_2: Rule = "2 or more", lambda value: 2 <= value < inf
POSITIVE: Rule = "a positive number", lambda value: 0 < value < inf
SHARE: Rule = "a number from 0 to 1", lambda value: 0 <= value <= 1


def one_of(*names: str, own: bool = False) -> Rule:
    words = f"one of: {', '.join(names)}" + (", or module:Name" if own else "")
    return words, lambda value: value in names or (own and is_own(value))


def each(rule: Rule) -> Rule:
    """The rule holds for each value of a list, which has at least one and none twice."""
    words, holds = rule
    several = f"{words}; or a list of different ones"
    return several, lambda values: 0 < len(values) == len(set(values)) and all(map(holds, values))


def key(default: Any, sentence: str, rule: Rule = ANY) -> Any:
    """A field of a configuration, which is a section where ``default`` is a dataclass, or else a key."""
    metadata = {"default": default, "sentence": sentence, "rule": rule}
    return field(default_factory=default if isinstance(default, type) else partial(copy, default), metadata=metadata)


def keys_of(schema: type) -> dict[str, Field[Any]]:
    """Every key of a kind of configuration by its dotted name."""
    keys: dict[str, Field[Any]] = {}
    for part in filter(lambda part: part.metadata, fields(schema)):
        inner = keys_of(part.type) if is_dataclass(part.type) else {}  # type: ignore[arg-type]
        keys |= {f"{part.name}.{name}": its for name, its in inner.items()} or {part.name: part}
    return keys


def typed(value: Any, kind: Any) -> Any:
    """Convert a value of YAML to a type: a whole number serves as a float, a number as text, one entry as a list."""
    if get_origin(kind) is list:
        return [typed(entry, get_args(kind)[0]) for entry in (value if isinstance(value, (list, tuple)) else [value])]
    if kinds := get_args(kind):  # X | None, or X | Y | None
        return None if value is None else typed(value, type(value) if type(value) in kinds else kinds[0])
    if (kind is float and type(value) is int) or (kind is str and type(value) in (int, float)):
        return kind(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def expected_of(its: Field[Any]) -> str:
    """The type and range of a key as users read them, such as ``int, 1 or more, or null``."""
    kind = str(its.type) if get_args(its.type) else its.type.__name__  # type: ignore[union-attr]
    null = "or null" if its.metadata["default"] is None else ""
    return ", ".join(filter(None, (kind.removesuffix(" | None"), its.metadata["rule"][0], null)))


def key_help(schema: type, width: int = 98) -> str:
    """Every key of a kind of configuration with its type, default, range and sentence, by section."""
    sections = {part.name: part.metadata["sentence"] for part in fields(schema) if is_dataclass(part.type)}
    lines = ["keys, with the defaults of what a configuration leaves out:"]
    for name, its in keys_of(schema).items():
        section, default = name.rpartition(".")[0], its.metadata["default"]
        if section in sections:
            lines += ["", *textwrap.wrap(f"{section}: {sections.pop(section)}", width)]
        first = f"{name}={default if isinstance(default, str) else json.dumps(default)}  ({expected_of(its)})"
        lines += textwrap.wrap(first.replace('"', ""), width, initial_indent="  ", subsequent_indent=8 * " ")
        lines += textwrap.wrap(its.metadata["sentence"], width, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join(lines)
