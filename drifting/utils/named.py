"""A user's own network, data set or extractor, by the name ``module:Name``; and the nearest name to a mistaken one."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UserError, reason

KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def is_own(name: str) -> bool:
    """Whether ``name`` is of the form ``module:Name``, and not one of ours."""
    return ":" in name


def import_named(name: str, key: str) -> Any:
    """The class or function called ``module:Name``, from the current folder or the environment.

    Importing runs the module's code. So only names that the user gives, on the command line or in a configuration
    file, are ever passed here.

    Args:
        name: ``module:Name``, where ``module`` may have dots.
        key: the key or option that names it, such as ``model.name``, for messages.

    Raises:
        UserError: there is no such module, it cannot be imported, or it has no such class or function.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # A user's module may raise anything.
        raise UserError(
            f"{key} is {name}, but the module {module_name} cannot be imported from {os.getcwd()} or the environment "
            f"({reason(error)})"
        ) from error
    if not callable(getattr(module, attribute, None)):
        names = [own for own, value in vars(module).items() if callable(value) and not own.startswith("_")]
        near = _did_you_mean(attribute, names)
        raise UserError(f"{key} is {name}, but {module_name} has no class or function {attribute}; {near}")
    return getattr(module, attribute)


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], section: str) -> None:
    """Raise :class:`UserError` unless ``target`` takes these keyword arguments, which are keys of ``section``."""
    taken, takes_all = _keywords(target)
    for name in () if takes_all else arguments:
        if name not in taken:
            title, near = getattr(target, "__name__", target), _did_you_mean(name, taken)
            raise UserError(f"unknown key {section}.{name}: {title} has no argument {name}; {near}")


def facts_taken(target: Callable[..., Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``facts``, what is known of the data, that ``target`` has arguments for."""
    taken, _ = _keywords(target)
    return {name: value for name, value in facts.items() if name in taken}


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The candidate most like ``name``, as a whole or after the last dot."""
    name = name[:100]  # The time grows with the square of the length.

    def likeness(candidate: str) -> float:
        pairs = ((name, candidate), (name.rpartition(".")[2], candidate.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(candidates, key=likeness)


def _keywords(target: Callable[..., Any]) -> tuple[list[str], bool]:
    """The keyword arguments that ``target`` names, and whether it takes any other as well."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # Some classes of extension modules do not say.
        return [], True
    names = [parameter.name for parameter in parameters if parameter.kind in KEYWORDS]
    return names, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _did_you_mean(name: str, candidates: list[str]) -> str:
    return f"did you mean {nearest(name, candidates)}?" if candidates else "it has none"
