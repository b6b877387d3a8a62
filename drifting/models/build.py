"""Models from the arguments that a file names, which may be anything."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

MOST = 2**40  # of any argument; sizes cost nothing before the weights are there
MOST_MODULES = 256  # of arguments that say how many modules or parameters there are
COUNTS_OF_MODULES = ("depth", "layers", "num_style_tokens")


def build_on_meta(model: type[nn.Module], arguments: Any) -> Any:
    """``model(**arguments)`` on the meta device: without memory for weights, in bounded time.

    Raises:
        ValueError: an argument is neither a number, a list of them, nor None; one is out of any sensible range; or the
            model cannot be built of them.
    """
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the model's arguments are {type(arguments).__name__}, expected an object")
    parameters = inspect.signature(model).parameters
    for name, value in arguments.items():
        if name not in parameters:
            raise ValueError(f"the model has no argument {_short(name)}")
        values = value if isinstance(value, (list, tuple)) else [value]
        most = MOST_MODULES if name in COUNTS_OF_MODULES else MOST
        annotation = parameters[name].annotation
        if len(values) > MOST_MODULES or not all(v is None or _is_sensible(v, annotation, most) for v in values):
            raise ValueError(f"{name} is {_short(value)}, expected {annotation}, from 0 to {most}")
    try:
        with torch.device("meta"):
            return model(**arguments)
    except Exception as error:  # of wrong sizes, torch and Python make errors of many classes
        raise ValueError(f"no model of {_short(dict(arguments))}: {type(error).__name__}: {error}") from error


def check_weights(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless the weights are finite and of the dtypes and shapes of ``like``, whose names they have;
    the message lists all that differ."""
    problems = [f"missing: {name}" for name in sorted(like.keys() - weights.keys())]
    problems += [f"left over: {name}" for name in sorted(weights.keys() - like.keys())]
    for name in sorted(weights.keys() & like.keys()):
        got, expected = weights[name], like[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            problems.append(
                f"{name} is {got.dtype} {list(got.shape)}, expected {expected.dtype} {list(expected.shape)}"
            )
        elif not got.isfinite().all():
            problems.append(f"{name} has NaN or infinity")
    if problems:
        raise ValueError("; ".join(problems))


def _is_sensible(value: Any, annotation: Any, most: int) -> bool:
    """Whether ``value`` is of the type that a constructor's annotation speaks of, and in range."""
    if annotation is bool:
        return isinstance(value, bool)
    types = (int, float) if annotation is float else (int,)
    return type(value) in types and 0 <= value <= most


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 500 else f"{text[:500]}…"
