"""How a key of a configuration is declared; the checks of values, the messages and ``--help`` follow from it."""

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, get_args, get_origin

from ..utils.named import is_own

WIDTH = 98  # columns of a help text
Rule = tuple[str, Callable[[Any], bool]]  # what is expected of a value, in words, and whether a value is so


def key(
    default: Any, sentence: str, *, least: float | None = None, most: float | None = None, positive: bool = False,
    one_of: Sequence[str] = (), own: bool = False, rule: Rule | None = None, resume: str | None = None,
) -> Any:  # fmt: skip
    """A field of a section's dataclass. What is said of a value holds for each entry where the default is a list.

    Args:
        default: the value where nobody sets one.
        sentence: what the key does.
        least, most: the range of a number, both ends included.
        positive: a number must be greater than 0.
        one_of: the names that a text may have.
        own: ``module:Name`` is allowed beside these names.
        rule: what is expected of the whole value, where none of the above says it.
        resume: "free" if the value may differ when a run is resumed, "asked" if it needs ``--change`` for that, "never"
            if it cannot change within a run. None takes what the field that holds the section has in its metadata,
            which is "asked" if it has nothing.
    """
    several = isinstance(default, list)
    text, holds = rule or _range(least, most, positive, one_of, own)
    if several and text and not rule:
        text, holds = f"{text}; or a list of different ones", _each(holds)
    if default is None and text:
        text += ", or null"
    metadata = {"default": default, "sentence": sentence, "expected": text, "holds": holds, "resume": resume}
    if several:
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _range(least: float | None, most: float | None, positive: bool, one_of: Sequence[str], own: bool) -> Rule:
    if one_of:
        names = ", ".join(one_of) + (", or module:Name" if own else "")
        return f"one of: {names}", lambda value: value in one_of or (own and is_own(value))
    if positive:
        return "a positive number", lambda value: 0 < value < math.inf
    if least is None:
        return "", lambda value: True
    if most is None:
        return f"{least} or more", lambda value: least <= value < math.inf
    return f"a number from {least} to {most}", lambda value: least <= value <= most


def _each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: bool(values) and len(set(values)) == len(values) and all(map(holds, values))


def keys_of(schema: type) -> dict[str, Field[Any]]:
    """Every key of a kind of configuration by its dotted name."""
    keys: dict[str, Field[Any]] = {}
    for part in fields(schema):
        inner = fields(part.type) if is_dataclass(part.type) else ()
        keys |= {f"{part.name}.{its.name}": its for its in inner if its.metadata} or {part.name: part}
    return keys


def resume_of(schema: type, name: str) -> str:
    """Whether the key may differ when a run is resumed: "free", "asked" or "never", see :func:`key`."""
    section = next(part for part in fields(schema) if part.name == name.partition(".")[0])
    own = keys_of(schema).get(name, section)
    return own.metadata.get("resume") or section.metadata.get("resume") or "asked"


def typed(value: Any, kind: Any) -> Any:
    """``value``, as YAML gives it, as that type: a whole number serves as a float, one entry as a list.

    Raises:
        TypeError: it is of another type.
        OverflowError: it is an integer that no float can hold.
    """
    if get_origin(kind) is list:
        return [typed(entry, get_args(kind)[0]) for entry in (value if isinstance(value, (list, tuple)) else [value])]
    if get_args(kind):  # X | None
        return None if value is None else typed(value, get_args(kind)[0])
    if (kind is float and type(value) is int) or (kind is str and type(value) in (int, float)):
        return kind(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def expected_of(its: Field[Any]) -> str:
    """The type and range of a key as users read them, such as ``int, 1 or more, or null``."""
    kind = str(its.type) if get_args(its.type) else its.type.__name__  # type: ignore[union-attr]
    text = its.metadata["expected"] or ("or null" if its.metadata["default"] is None else "")
    return f"{kind.removesuffix(' | None')}, {text}" if text else kind


def key_help(schema: type) -> str:
    """Every key of a kind of configuration with its type, default, range and sentence, by section."""
    lines, section = ["keys, with the defaults of what a configuration leaves out:"], ""
    for name, its in keys_of(schema).items():
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            lines += ["", *textwrap.wrap(f"{section}: {getattr(schema(), section).__doc__}", WIDTH)]
        default = its.metadata["default"]
        first = f"{name}={default if isinstance(default, str) else json.dumps(default)}  ({expected_of(its)})"
        lines += textwrap.wrap(first.replace('"', ""), WIDTH, initial_indent="  ", subsequent_indent=8 * " ")
        lines += textwrap.wrap(its.metadata["sentence"], WIDTH, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join(lines)
