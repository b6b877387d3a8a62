"""This module says where the files of a run are, and writes and reads the network among them."""

import errno
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import UserError, reason
from ..generation import Generator
from ..models import Classifier
from ..utils.files import atomic_write
from .networks import KINDS, OWN, build, kind_of, misfits, read_description, shown, stored_state

LOCK_SECONDS = 6  # Data-loader workers of a killed process may hold its lock for the five that they take to notice.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
MOST_PROBLEMS = 4  # This many of the tensors that do not fit are named.

Model = nn.Module | Callable[..., nn.Module] | None  # This is a user's own network or what builds it.


class RunDirectory:
    """Each attribute is a path inside the folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.weights = path / "model.safetensors"
        self.description = path / "model.json"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    @property
    def best(self) -> "RunDirectory":
        """This is where network and configuration are kept as they were at the best evaluation."""
        return RunDirectory(self.path / "best")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from having this lock; it is gone with the process, however that ends.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        path = self.path / ".lock"
        lock = FileLock(path)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
            path.write_text(f"process {os.getpid()} on {platform.node()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        except Timeout as error:
            raise UserError(
                f"{self.path} is being trained by another process ({_holder(path)}): "
                "wait for it, or choose another --out"
            ) from error
        except OSError as error:
            lock.release()
            if error.errno not in NO_LOCKS:
                raise UserError(f"cannot write {path}: {reason(error)}") from error
            print(f"{self.path} is on a file system without locks: take care to train one run there", file=sys.stderr)
        try:
            yield
        finally:
            lock.release()


def _holder(path: Path) -> str:
    """Return what the process that has the lock wrote there."""
    try:
        return shown(path.read_text(errors="replace")) or "just started"
    except OSError as error:
        return reason(error)


def save_generator(
    run: RunDirectory, generator: Generator, quality: dict[str, float] | None = None, **more: Any
) -> None:
    """Write ``model.safetensors`` and ``model.json``, which are all that sampling needs, with ``quality`` if measured.

    Raises:
        UserError: a file cannot be written, or the network's state has something else than tensors.
    """
    facts = {field.name: getattr(generator, field.name) for field in fields(generator)}
    network, arguments = facts.pop("model"), facts.pop("arguments")
    name = generator.name or f"{type(network).__module__}:{type(network).__qualname__}"
    more |= {} if quality is None else {"quality": quality}
    write_model(run, network, facts | {"name": name, "model": dict(arguments)} | more)


def write_model(run: RunDirectory, network: nn.Module, description: dict[str, Any]) -> None:
    """Write ``model.safetensors``, and ``model.json`` with the network's kind, its arguments and ``description``.

    The arguments of a network of ours are its ``config``, those of a user's own what ``description`` calls ``model``.
    """
    kind = kind_of(network)
    arguments: Any = description.get("model", {}) if kind == OWN else network.config
    # Views of one tensor share memory, which safetensors refuses; their copies do not.
    weights = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in stored_state(network).items()}
    with atomic_write(run.weights) as part:
        save_file(weights, part)
    with atomic_write(run.description) as part:
        content = description | {"kind": kind, "model": arguments}
        part.write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_classifier(path: Path) -> Classifier:
    """Read the classifier in ``path`` as :func:`read_any` does."""
    classifier, _ = read_any(path, None, ["classifier"])
    assert isinstance(classifier, Classifier)
    return classifier


def read_any(path: Path, model: Model = None, kinds: Sequence[str] = (*KINDS, OWN)) -> tuple[nn.Module, dict[str, Any]]:
    """Read the network of the run in ``path``, in evaluation mode, and what its ``model.json`` says.

    Args:
        path: the folder of the run.
        model: the user's own network, which gets the weights, or what builds it from the arguments in ``model.json``.
            That file names a class, but nothing is ever imported for it. Networks of ours are built on the CPU.
        kinds: the kinds of network that are expected.

    Raises:
        UserError: the folder has no network, or one of another kind; its files are damaged or do not fit the network;
            a network of the user's own is there without ``model``, or one of ours with it.
    """
    run = RunDirectory(path)
    if not path.is_dir():
        raise UserError(f"there is no run directory {path}")
    for file in (run.description, run.weights):
        if not file.is_file():
            raise UserError(f"{path} holds no {file.name}: expected a run directory of `python -m drifting.train`")
    description = read_description(run.description, kinds)
    kind, arguments = description["kind"], description.get("model")
    if kind != OWN and model is not None:
        raise UserError(f"{path} holds a {KINDS[kind].__name__}, a network of ours: leave out --model (or model=...)")
    if kind == OWN and model is None:
        name = shown(description.get("name", "module:Name"))
        raise UserError(
            f"{path} holds a network of your own, {name}: name it with --model {name} "
            "(or load_generator(folder, model=...))"
        )
    if not isinstance(model, nn.Module):
        model = build(model or KINDS[kind], arguments, "cpu" if kind == OWN else "meta")
    _load_weights(run, model, is_own=kind == OWN)
    return model.eval(), description


def _load_weights(run: RunDirectory, network: nn.Module, is_own: bool) -> None:
    try:
        weights = load_file(run.weights)
    except Exception as error:  # safetensors has errors of its own beside the system's.
        raise UserError(f"{run.weights} cannot be read: {shown(reason(error))}") from error
    # A buffer of a user's own network may hold infinities, as attention masks do.
    finite = dict(network.named_parameters(remove_duplicate=False)) if is_own else weights
    problems = misfits(weights, stored_state(network), finite)
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        named = "; ".join([shown(problem) for problem in problems[:MOST_PROBLEMS]] + more)
        raise UserError(f"{run.weights} does not fit {type(network).__name__}: {named}")
    network.load_state_dict(weights, strict=False, assign=not is_own)  # Of tied weights, one name is in the file.
