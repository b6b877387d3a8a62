"""A user's own network, data set or extractor, by the name ``module:Name``."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UserError, reason


def is_own(name: str) -> bool:
    """Whether ``name`` is of the form ``module:Name``, and not one of ours."""
    return ":" in name


def import_named(name: str, key: str) -> Any:
    """The object called ``module:Name``, from the current folder or the environment.

    Only names that the user gives, on the command line or in a configuration file, are ever passed here: importing
    runs the module's code.

    Args:
        name: ``module:Name``, where ``module`` may have dots.
        key: what names it, such as ``model.name``, for messages.

    Raises:
        UserError: there is no such module, it cannot be imported, or it has no such name.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # A user's module may raise anything.
        raise UserError(
            f"{key} is {name}, but the module {module_name} cannot be imported from {os.getcwd()} or the environment "
            f"({reason(error)})"
        ) from error
    if not callable(getattr(module, attribute, None)):
        names = [own for own, value in vars(module).items() if callable(value) and not own.startswith("_")]
        raise UserError(f"{key} is {name}, but {module_name} has no {attribute}; {_did_you_mean(attribute, names)}")
    return getattr(module, attribute)


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], section: str) -> None:
    """Raise :class:`UserError` unless ``target`` takes these keyword arguments, which are keys of ``section``."""
    parameters = inspect.signature(target).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            raise UserError(
                f"unknown key {section}.{name}: {getattr(target, '__name__', target)} has no argument {name}; "
                f"{_did_you_mean(name, parameters)}"
            )


def facts_taken(target: Callable[..., Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``facts``, what is known of the data, that ``target`` has arguments for."""
    parameters = inspect.signature(target).parameters
    return {name: value for name, value in facts.items() if name in parameters}


def _did_you_mean(name: str, candidates: Iterable[str]) -> str:
    names = list(candidates)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"did you mean {near[0]}?" if near else "it takes none"
