"""How a key of a configuration is declared; the checks of values, the messages and ``--help`` follow from it."""

import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin

from ..utils.named import is_own

WIDTH = 96  # columns of a help text
Rule = tuple[str, Callable[[Any], bool]]  # what is expected of a value, in words, and whether a value is so


def key(
    default: Any,
    sentence: str,
    *,
    least: float | None = None,
    most: float | None = None,
    positive: bool = False,
    one_of: Sequence[str] = (),
    own: bool = False,
    rule: Rule | None = None,
    resume: str | None = None,
) -> Any:
    """A field of a section's dataclass.

    Args:
        default: the value where nobody sets one. A key whose default is a list may be set to one entry of it.
        sentence: what the key does.
        least, most: the range of a number, or of each entry of a list; both ends belong to it.
        positive: a number, or each entry of a list, must be greater than 0.
        one_of: the names that a text, or each entry of a list, may have.
        own: ``module:Name`` is allowed beside these names.
        rule: what is expected of the whole value, where none of the above says it.
        resume: "free" if the value may differ when a run is resumed, "asked" if only ``--change`` may change it then,
            "never" if it cannot change within a run; None takes what the section says, which is "asked" by default.
    """
    several = isinstance(default, list)
    if rule is None:
        rule = _range(least, most, positive, one_of, own)
        rule = _of_each(*rule) if rule and several else rule
    if rule and default is None:
        rule = (f"{rule[0]}, or null", rule[1])
    metadata = {"sentence": sentence, "rule": rule, "resume": resume, "default": default}
    if several:
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type, sentence: str, resume: str = "asked") -> Any:
    """A field that holds a section; ``resume`` as for :func:`key`, for the keys that do not say it."""
    return dataclasses.field(default_factory=kind, metadata={"sentence": sentence, "resume": resume})


def _range(least: float | None, most: float | None, positive: bool, one_of: Sequence[str], own: bool) -> Rule | None:
    if one_of:
        names = ", ".join(one_of) + (", or module:Name" if own else "")
        return f"one of: {names}", lambda value: value in one_of or (own and is_own(value))
    if positive:
        return "a positive number", lambda value: 0 < value < math.inf
    if least is None:
        return None
    if most is None:
        return f"{least} or more", lambda value: least <= value < math.inf
    return f"a number from {least} to {most}", lambda value: least <= value <= most


def _of_each(text: str, holds: Callable[[Any], bool]) -> Rule:
    def all_hold(values: list[Any]) -> bool:
        return bool(values) and len(set(values)) == len(values) and all(map(holds, values))

    return f"{text}; or a list of different ones", all_hold


def keys_of(schema: type) -> dict[str, dataclasses.Field[Any]]:
    """Every key by its dotted name."""
    keys = {}
    for part in dataclasses.fields(schema):
        inner = dataclasses.fields(part.type) if dataclasses.is_dataclass(part.type) else ()
        keys |= {f"{part.name}.{field.name}": field for field in inner if field.metadata} or {part.name: part}
    return keys


def resume_of(schema: type, name: str) -> str:
    """Whether that key may differ when a run is resumed: "free", "asked" or "never", see :func:`key`."""
    part, _, inner = name.partition(".")
    its_section = {field.name: field for field in dataclasses.fields(schema)}[part]
    own = keys_of(schema).get(name)
    return (own and own.metadata["resume"]) or its_section.metadata["resume"] or "asked"


def typed(value: Any, kind: Any) -> Any:
    """``value``, as YAML gives it, as that type: a whole number serves as a float, one entry as a list.

    Raises:
        TypeError: it is of another type.
        OverflowError: it is an integer that no float can hold.
    """
    if get_origin(kind) is list:
        return [typed(entry, get_args(kind)[0]) for entry in (value if isinstance(value, list) else [value])]
    if get_args(kind):  # X | None
        return None if value is None else typed(value, get_args(kind)[0])
    if (kind is float and type(value) is int) or (kind is str and type(value) in (int, float)):
        return kind(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def type_name(kind: Any) -> str:
    """The type in words, such as ``int or null``."""
    if get_origin(kind) is list:
        return str(kind)
    return f"{get_args(kind)[0].__name__} or null" if get_args(kind) else kind.__name__


def key_help(schema: type) -> str:
    """Every key of that kind of configuration with its type, range and sentence, by section."""
    lines = ["keys of a configuration, with the defaults of what its file leaves out:"]
    heading = ""
    for name, field in keys_of(schema).items():
        part = name.partition(".")[0]
        if part != heading:
            sentence = schema.__dataclass_fields__[part].metadata["sentence"]  # type: ignore[attr-defined]
            lines += ["", *textwrap.wrap(f"{part}: {sentence}", WIDTH)] if "." in name else [""]
            heading = part
        lines += _described(name, field)
    return "\n".join(lines)


def _described(name: str, field: dataclasses.Field[Any]) -> list[str]:
    default, rule = field.metadata["default"], field.metadata["rule"]
    value = default if isinstance(default, str) else json.dumps(default).replace('"', "")
    terms = type_name(field.type) + (f", {rule[0]}" if rule else "")
    indent = {"subsequent_indent": 6 * " ", "break_on_hyphens": False}
    first = textwrap.wrap(f"{name}={value}  ({terms})", WIDTH, initial_indent="  ", **indent)  # type: ignore[arg-type]
    return first + textwrap.wrap(field.metadata["sentence"], WIDTH, initial_indent=6 * " ", **indent)  # type: ignore[arg-type]
