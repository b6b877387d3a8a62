"""The files of a run: where they are, and the model among them."""

import errno
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import UserError, reason
from ..generation import Generator
from ..models import MAE, MODELS, Classifier, DriftingDiT
from ..models.build import build_on_meta, check_weights
from ..utils.files import atomic_write
from ..utils.json_file import is_count, read_object

LOCK_SECONDS = 6  # to wait: data-loader workers of a killed process take up to five to notice, and may hold its lock
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

KINDS: dict[str, type[DriftingDiT] | type[MAE] | type[Classifier]] = {**MODELS, "classifier": Classifier}


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside the folder of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def description(self) -> Path:
        return self.path / "model.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def best(self) -> "RunDirectory":
        """The run as it was at its best evaluation: model and configuration."""
        return RunDirectory(self.path / "best")

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Inside, no other process can have this lock; it is gone with the process, however that ends.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        path = self.path / ".lock"
        lock = FileLock(path)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
            _sign(path)
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


def _sign(path: Path) -> None:
    path.write_text(f"process {os.getpid()} on {platform.node()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")


def _holder(path: Path) -> str:
    """What the process that has the lock wrote there."""
    try:
        with path.open(errors="replace") as file:
            return "".join(filter(str.isprintable, file.read(200))) or "just started"
    except OSError as error:
        return reason(error)


def save_generator(run: RunDirectory, generator: Generator, quality: dict[str, float] | None = None) -> None:
    """Write ``model.safetensors`` and ``model.json``, all that sampling needs; and ``quality`` if it was measured."""
    description = describe_generator(generator)
    write_model(run, generator.model, description | ({} if quality is None else {"quality": quality}))


def describe_generator(generator: Generator) -> dict[str, Any]:
    """What ``model.json`` says of a generator."""
    return {
        "name": generator.name,
        "noise_shape": list(generator.noise_shape),
        "sample_shape": list(generator.sample_shape),
        "num_classes": len(generator.class_names),
        "class_names": list(generator.class_names),
        "data": generator.data,
        "pixel_range": None if generator.pixel_range is None else list(generator.pixel_range),
        "latent": generator.latent,
        "step": generator.step,
    }


def write_model(run: RunDirectory, model: DriftingDiT | MAE | Classifier, description: dict[str, Any]) -> None:
    """Write ``model.safetensors``, and ``model.json`` with the model's kind, its arguments and ``description``."""
    kind = next(name for name, kind in KINDS.items() if isinstance(model, kind))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(run.weights) as part:
        save_file(weights, part)
    with atomic_write(run.description) as part:
        part.write_text(json.dumps({"kind": kind, "model": model.config} | description, indent=2) + "\n")


def read_model(path: Path) -> tuple[DriftingDiT | MAE, dict[str, Any]]:
    """The model of the run in ``path``, on the CPU and in evaluation mode, and what its ``model.json`` says.

    Raises:
        UserError: it is no run directory, holds no model yet or another kind, or its files cannot be read.
    """
    model, description = read_any(path)
    if isinstance(model, Classifier):
        raise UserError(f"{path} holds a classifier, not a generator or masked autoencoder")
    return model, description


def read_classifier(path: Path) -> Classifier:
    """The classifier in ``path``; as :func:`read_model` otherwise."""
    model, _ = read_any(path)
    if not isinstance(model, Classifier):
        raise UserError(f"{path} holds no classifier of `python -m drifting.train_classifier`")
    return model


def read_any(path: Path) -> tuple[DriftingDiT | MAE | Classifier, dict[str, Any]]:
    """As :func:`read_model`, classifiers included."""
    run = RunDirectory(path)
    if not path.is_dir():
        raise UserError(f"there is no run directory {path}")
    for file in (run.description, run.weights):
        if not file.is_file():
            raise UserError(f"{path} holds no {file.name}: expected a run directory of `python -m drifting.train`")
    try:
        description = {"kind": "gen", "step": 0} | read_object(run.description)
        if description["kind"] not in list(KINDS) or not is_count(description["step"]):
            raise ValueError(f"{run.description.name} is of a {description['kind']} at step {description['step']}")
        model = build_on_meta(KINDS[description["kind"]], description.get("model"))
        weights = load_file(run.weights)
        check_weights(weights, model.state_dict())
        model.load_state_dict(weights, assign=True)
        return model.eval(), description
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"the model in {path} cannot be read: {type(error).__name__}: {reason(error)}") from error
