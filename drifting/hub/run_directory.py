"""Run directories: where the files of a run are, and how its generator is written among them."""

from contextlib import AbstractContextManager
from math import isfinite
from pathlib import Path
from typing import Any

from ..generation import Generator
from ..models.network_files import DESCRIPTION, WEIGHTS, write_model
from ..utils.files import locked


class RunDirectory:
    """Each attribute is a path inside the folder of a run."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints, self.samples = path, path / "checkpoints", path / "samples"
        self.config, self.metrics = path / "config.yaml", path / "metrics.jsonl"
        self.weights, self.description = path / WEIGHTS, path / DESCRIPTION

    @property
    def best(self) -> "RunDirectory":
        """This is where network and configuration are kept as they were at the best evaluation."""
        return RunDirectory(self.path / "best")

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes from training here, see :func:`drifting.utils.files.locked`."""
        return locked(self.path, "is being trained by another process", "choose another --out")


def save_generator(run: RunDirectory, generator: Generator, quality: dict[str, Any] | None = None, **more: Any) -> None:
    """Write ``model.safetensors`` and ``model.json``, all that sampling needs, with ``quality`` if measured."""
    network, facts = generator.model, dict(vars(generator))
    facts["model"] = dict(facts.pop("arguments"))
    facts["name"] = generator.name or f"{type(network).__module__}:{type(network).__qualname__}"
    if quality is not None:  # JSON has no NaN.
        facts["quality"] = {name: value for name, value in quality.items() if isfinite(value)}
    write_model(run.path, network, facts | more)
