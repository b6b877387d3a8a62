"""This module knows the kinds of networks that files hold, builds them, and compares tensors of a file with theirs."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, reason
from ..models import MODELS, Classifier
from ..utils.files import is_count, read_object

OWN = "own"  # Every network that is none of ours is of this kind.
GENERATORS = ("gen", OWN)
KINDS: dict[str, type[nn.Module]] = {**MODELS, "classifier": Classifier}
NOUNS = {"gen": "generator", "mae": "masked autoencoder", "classifier": "classifier", OWN: "network of your own"}
SHOWN = 200  # This many characters of what a file says stand in a message.


def kind_of(network: nn.Module) -> str:
    """Return the kind of a network. A class derived from one of ours may compute anything: it is the user's own."""
    return next((kind for kind, ours in KINDS.items() if type(network) is ours), OWN)


def read_description(
    file: Path, kinds: Sequence[str], default_kind: Callable[[dict[str, Any]], str] = lambda description: "gen"
) -> dict[str, Any]:
    """Read what ``file`` says of the network beside it, its ``kind``, which is one of ``kinds``, and ``step`` among it.

    It raises :class:`UserError` where the file is missing, damaged, or speaks of a network of another kind.
    """
    try:
        description = read_object(file)
        description = {"kind": default_kind(description), "step": 0} | description
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read, and only it tells what the weights are of: {reason(error)}") from error
    kind, step = description["kind"], description["step"]
    if kind not in list(NOUNS) or not is_count(step):
        raise UserError(
            f"{file}: kind is {shown(kind)} and step {shown(step)}, expected {', '.join(NOUNS)} and a count"
        )
    if kind not in kinds:
        raise UserError(f"{file.parent} holds a {NOUNS[kind]}, not a {' or '.join(NOUNS[one] for one in kinds)}")
    return description


def build(network: Callable[..., nn.Module], arguments: Any, device: str = "meta") -> nn.Module:
    """Build ``network(**arguments)``, by default on the meta device, where weights of any size take no memory.

    Whatever a file may give as ``arguments``, it raises nothing but :class:`UserError`.
    """
    name = getattr(network, "__name__", type(network).__name__)
    try:
        with torch.device(device):
            built = network(**arguments)
    except Exception as error:  # Python, torch and a user's code raise errors of many classes.
        raise UserError(f"there is no {name} of the arguments {shown(arguments)}: {shown(reason(error))}") from error
    if not isinstance(built, nn.Module):
        raise UserError(f"{name} returns a {type(built).__name__}, expected a torch.nn.Module")
    return built


def stored_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of a network as its file has it: tied weights, which have several names, are there once.

    It raises :class:`UserError` where the state has something else than tensors.
    """
    first: dict[int, str] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{name} of {type(network).__name__} is a {type(tensor).__name__}, expected tensors only")
        first.setdefault(id(tensor), name)
    state = network.state_dict()
    return {name: state[name] for name in first.values()}


def misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], finite: Collection[str]) -> list[str]:
    """List what keeps the ``tensors`` of a file from being the ``expected`` ones of a network; the list may be empty.

    Tensors fit where names, shapes and dtypes are equal and those named in ``finite`` have neither NaN nor infinity.
    """
    problems = [f"missing: {name} {list(expected[name].shape)}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"left over: {name} {list(tensors[name].shape)}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        got, like = tensors[name], expected[name]
        if got.shape != like.shape:
            problems.append(f"shape: {name} is {list(got.shape)}, expected {list(like.shape)}")
        elif got.dtype != like.dtype:
            problems.append(f"dtype: {name} is {got.dtype}, expected {like.dtype}")
        elif name in finite and not got.isfinite().all():
            problems.append(f"value: {name} has NaN or infinity")
    return problems


def shown(value: Any) -> str:
    """Word a value from a file in one line of bounded length, without control characters."""
    text = "".join(filter(str.isprintable, value if isinstance(value, str) else repr(value)))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
