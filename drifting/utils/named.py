"""A user's own network, data set or extractor, by the name ``module:Name``; and the nearest name to a mistaken one."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UserError, reason


def is_own(name: str) -> bool:
    """Tell whether ``name`` is ``module:Name`` instead of one of ours."""
    return ":" in name


def import_named(name: str, key: str) -> Any:
    """Import ``module:Name``, whose code runs: the command line or a configuration file of the user must name it."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # A user's module may raise anything.
        failure = f"cannot be imported from {os.getcwd()} or the environment ({reason(error)})"
        raise UserError(f"{key} is {name}, but the module {module_name} {failure}") from error
    target = getattr(module, attribute, None)
    if not callable(target):
        missing = f"{module_name} has no class or function {attribute}"
        raise UserError(f"{key} is {name}, but {missing}; did you mean {nearest(attribute, vars(module))}?")
    return target


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], section: str) -> None:
    """Raise :class:`UserError` unless ``target`` takes these keyword arguments, which are keys of ``section``."""
    taken, takes_all = _keywords(target)
    for name in () if takes_all else arguments:
        if name not in taken:
            title = getattr(target, "__name__", target)
            near = f"did you mean {nearest(name, taken)}?" if taken else "it has none"
            raise UserError(f"unknown key {section}.{name}: {title} has no argument {name}; {near}")


def facts_taken(target: Callable[..., Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Choose those of the ``facts`` about the data that ``target`` has arguments for."""
    return {name: facts[name] for name in facts if name in _keywords(target)[0]}


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Find the candidate most like ``name``, as a whole or after the last dot."""

    def likeness(candidate: str) -> float:  # Its time grows with the square of the length.
        pairs = ((name[:100], candidate), (name[:100].rpartition(".")[2], candidate.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(candidates, key=likeness)


def _keywords(target: Callable[..., Any]) -> tuple[list[str], bool]:
    """The keyword arguments that ``target`` names, and whether it takes any other as well."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # Some classes of extension modules do not say.
        return [], True
    names = [its.name for its in parameters if its.kind in (its.POSITIONAL_OR_KEYWORD, its.KEYWORD_ONLY)]
    return names, any(its.kind is its.VAR_KEYWORD for its in parameters)
