"""The two files of a trained network, its weights and what they are of: written, and read from files of any content."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import MOST_SHOWN, UserError, explained, shown
from ..utils.files import atomic_write, is_count, read_object, write_object

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
OWN = "own"  # Every network that is none of ours is of this kind.
KINDS: dict[str, type[nn.Module]] = {}  # Each class of ours enters itself here, by the kind that model.json names.
NOUNS = {"mae": "masked autoencoder", "classifier": "classifier", OWN: "network of your own"}  # Others are generators.

Model = nn.Module | Callable[..., nn.Module] | None  # This is a user's own network or what builds it.
Described = tuple[nn.Module, dict[str, Any]]  # This is a network and what the file beside its weights says.


def write_model(folder: Path, network: nn.Module, description: dict[str, Any]) -> None:
    """Write ``model.safetensors``, and ``model.json`` with the network's kind, its arguments and ``description``. The
    arguments of a network of ours are its ``config``, those of a user's own what ``description`` calls ``model``."""
    # A class derived from one of ours may compute anything: it is the user's own.
    kind = next((kind for kind, ours in KINDS.items() if type(network) is ours), OWN)
    arguments: Any = description.get("model", {}) if kind == OWN else network.config
    # Views of one tensor share memory, which safetensors refuses; their copies do not.
    weights = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in _stored_state(network).items()}
    with atomic_write(folder / WEIGHTS) as part:
        save_file(weights, part)
    write_object(folder / DESCRIPTION, description | {"kind": kind, "model": arguments})


def read_model(folder: Path, model: Model = None, kinds: Collection[str] = ()) -> Described:
    """Read the network in ``folder``, in evaluation mode, and what its ``model.json`` says; it must be of one of
    ``kinds``, if any are given. A user's own network is ``model``, which gets the weights, or what ``model`` builds of
    the arguments in that file. The file names a class, but nothing is ever imported for it. Networks of ours are built
    on the CPU, and remember as ``facts`` and ``folder`` what they were read from."""
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            problem = f"{folder} holds no {name}" if folder.is_dir() else f"there is no run directory {folder}"
            problem = f"{folder} is a file" if folder.is_file() else problem
            raise UserError(f"{problem}: expected a run directory of `python -m drifting.train`")
    description = read_description(folder / DESCRIPTION, kinds or (*KINDS, OWN))
    kind = description["kind"]
    if kind != OWN and model is not None:
        raise UserError(f"{folder} holds a {KINDS[kind].__name__}, a network of ours: leave out --model (or model=...)")
    if kind == OWN and model is None:
        name = shown(description.get("name", "module:Name"))
        naming = f"name it with --model {name} (or load_generator(folder, model=...))"
        raise UserError(f"{folder} holds a network of your own, {name}: {naming}")
    with explained(f"{folder / WEIGHTS} cannot be loaded"):
        weights = load_file(folder / WEIGHTS)
    if not isinstance(model, nn.Module):
        with explained(f"{folder / DESCRIPTION} cannot be read"):
            arguments = description.get("model")
            model = _build_own(model, arguments, weights) if model else build(KINDS[kind], arguments)
    with explained(f"{folder / WEIGHTS} cannot be loaded"):
        # A buffer of a user's own network may hold infinities, as attention masks do.
        finite = dict(model.named_parameters(remove_duplicate=False)) if kind == OWN else weights
        problems = misfits(weights, _stored_state(model), finite)
        if not problems:  # Of tied weights, one name is in the file, which is not strict then.
            model.load_state_dict(weights, strict=False, assign=kind != OWN)
    if problems:
        raise UserError(f"{folder / WEIGHTS} does not fit {type(model).__name__}: {problems}")
    if kind != OWN:
        vars(model).update(facts=description, folder=folder)
    return model.eval(), description


def read_description(file: Path, kinds: Collection[str]) -> dict[str, Any]:
    """Read what ``file`` says of the network beside it: its ``kind``, which is one of ``kinds``, ``step`` and more."""
    with explained(f"{file} cannot be read, and only it tells what the weights are of"):
        content = read_object(file)
    config = content.get("model_config")  # The release may leave out the kind. Every generator of it has cond_dim.
    if "kind" not in content and file.name == DESCRIPTION:
        raise UserError(f"{file} has no kind, expected the kind of a network, such as {next(iter(KINDS))!r}")
    is_mae = isinstance(config, dict) and "cond_dim" not in config
    description = {"kind": "mae" if is_mae else "gen", "step": 0} | content
    kind, step = description["kind"], description["step"]
    if not isinstance(kind, str) or kind not in kinds:
        noun = NOUNS.get(str(kind), "generator" if str(kind) in KINDS else f"network of kind {shown(kind)}")
        nouns = dict.fromkeys(NOUNS.get(kind, "generator") for kind in kinds)
        raise UserError(f"{file.parent} holds a {noun}, not a {' or '.join(nouns)}")
    if not is_count(step):
        raise UserError(f"{file}: step is {shown(step)}, expected the number of steps of the training")
    return description


def build(network: Callable[..., nn.Module], arguments: Any, device: str = "meta") -> nn.Module:
    """Build ``network(**arguments)``, by default on the meta device, where weights of any size take no memory."""
    name = getattr(network, "__name__", type(network).__name__)
    with explained(f"there is no {name} of the arguments {shown(arguments)}"), torch.device(device):
        if not isinstance(arguments, Mapping):
            raise UserError("expected an object of JSON, with a value for each")
        built = network(**arguments)
    if not isinstance(built, nn.Module):
        raise UserError(f"{name} returns a {type(built).__name__}, expected a torch.nn.Module")
    return built


def _build_own(network: Callable[..., nn.Module], arguments: Any, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build a user's own network on the CPU, unless one without memory already shows that ``weights`` do not fit it."""
    try:
        weightless = build(network, arguments)
        if misfits(weights, _stored_state(weightless), ()):
            return weightless
    except (UserError, RuntimeError):  # Not every network can be built on the meta device, nor has shapes there.
        pass
    return build(network, arguments, "cpu")


def _stored_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that the file of a network has; tied weights, which have several names, are there once."""
    state = network.state_dict(keep_vars=True)
    for name, tensor in state.items():
        kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        if not isinstance(tensor, Tensor) or kind.startswith(("torch.complex", "torch.float8", "torch.float4")):
            expected = "tensors only, of real numbers of 16 bits or more"
            raise UserError(f"{name} of {type(network).__name__} is a {kind}, expected {expected}")
    named = {id(tensor): (name, tensor) for name, tensor in reversed(state.items())}
    return dict(named.values())


def misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], finite: Collection[str]) -> str:
    """Word how ``tensors`` differ from those ``expected``, and which of those named in ``finite`` are not; else ""."""
    problems = []
    for name in sorted(expected.keys() | tensors.keys()):
        pair = tensors.get(name), expected.get(name)
        got, like = (f"{tensor.dtype} {list(tensor.shape)}" if tensor is not None else "nothing" for tensor in pair)
        if got != like:
            problems.append(f"{name} is {got}, expected {like}")
        elif name in finite and not tensors[name].isfinite().all():
            problems.append(f"{name} has NaN or infinity")
    return shown("; ".join(problems), MOST_SHOWN)
