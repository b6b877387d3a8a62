"""The files of a run: where they are, and the generator among them."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .cli import UserError
from .data import Dataset
from .models import DriftingDiT
from .training.checkpoint import atomic_write


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
    def samples(self) -> Path:
        return self.path / "samples"


@dataclass(frozen=True)
class Generator:
    """A trained model and what ``model.json`` says of it."""

    model: DriftingDiT
    data: str
    pixel_range: tuple[float, float]
    step: int


def save_generator(run: RunDirectory, model: DriftingDiT, dataset: Dataset, step: int) -> None:
    """Write ``model.safetensors`` and ``model.json``, all that sampling needs."""
    description = {
        "model": model.config,
        "num_classes": model.num_classes,
        "data": dataset.name,
        "pixel_range": list(dataset.pixel_range),  # values of the model that are black and white
        "step": step,
    }
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(run.weights) as part:
        part.write_bytes(save(weights))
    with atomic_write(run.description) as part:
        part.write_text(json.dumps(description, indent=2) + "\n")


def load_generator(path: Path) -> Generator:
    """The generator of the run in ``path``, on the CPU.

    Raises:
        UserError: it is no run directory, holds no model yet, or its files cannot be read.
    """
    run = RunDirectory(path)
    if not path.is_dir():
        raise UserError(f"there is no run directory {path}")
    for file in (run.description, run.weights):
        if not file.is_file():
            raise UserError(f"{path} holds no {file.name}: expected a run directory of `python -m drifting.train`")
    try:
        description = json.loads(run.description.read_text())
        model = DriftingDiT(**description["model"])
        model.load_state_dict(load_file(run.weights))
        low, high = description["pixel_range"]
        return Generator(model.eval(), description["data"], (low, high), description["step"])
    except (ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the model in {path} cannot be read: {type(error).__name__}: {reason}") from error
