"""One record a logged step, in ``metrics.jsonl``, as TensorBoard events and, if asked for, in Weights & Biases."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, stack
from torch.utils.tensorboard import SummaryWriter

from ..errors import UserError, reason
from ..utils.files import atomic_write, is_count


class MetricsLog:
    """Appends records to ``path`` and writes them beside it as events; records after ``step`` are dropped first.

    Args:
        path: ``metrics.jsonl`` in a run directory.
        step: that training goes on from.
        wandb_project: of Weights & Biases, which gets the records too, as a run of the directory's name.
        settings: that W&B shows.

    Raises:
        UserError: also by its methods: something cannot be written; wandb is not installed or refuses.
    """

    def __init__(self, path: Path, step: int, wandb_project: str | None = None, settings: Any = None) -> None:
        self.path = path
        self.wandb = None if wandb_project is None else _open_wandb(wandb_project, path.parent, settings)
        with _writing(path):
            if path.exists():
                with atomic_write(path) as part:
                    part.write_bytes(b"".join(_lines_up_to(path, step)))
            self.file = path.open("ab", buffering=0)
            self.events = SummaryWriter(str(path.parent), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        line = memoryview(f"{json.dumps(_finite(record))}\n".encode())
        with _writing(self.path):
            while line:
                line = line[self.file.write(line) :]
        scalars = {name: value for name, value in _flat(record).items() if name != "step"}
        with _writing(Path(self.events.log_dir)):
            for name, value in scalars.items():
                self.events.add_scalar(name, value, record["step"])
        if self.wandb is not None:
            self.wandb.log(scalars, step=record["step"])

    def close(self) -> None:
        self.file.close()
        with suppress(OSError):  # of events that are not written yet; ``path`` has the records, and close ends a run
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


def _open_wandb(project: str, run: Path, settings: dict[str, Any]) -> Any:
    """The run of W&B that belongs to that directory: a resumed one goes on in it."""
    try:
        import wandb
    except ImportError as error:
        raise UserError("train.wandb is set and wandb not installed: pip install 'drifting[wandb]'") from error
    identifier = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    try:
        return wandb.init(
            project=project, name=run.name, id=identifier, dir=str(run), config=settings, resume="allow"
        )
    except (wandb.Error, OSError) as error:
        raise UserError(f"train.wandb: {reason(error).rstrip('.')}; WANDB_MODE=offline needs no account") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {error.filename or path}: {reason(error)}") from error


def to_record(metrics: dict[str, Tensor]) -> dict[str, Any]:
    """0-d tensors of a training step as numbers, fetched at once.

    What belongs to a feature map is grouped: ``scale: {map: …}`` and ``lambda: {map: {R: …}}``.
    """
    values = stack([value.detach().float() for value in metrics.values()]).tolist()
    record: dict[str, Any] = {}
    for (name, tensor), value in zip(metrics.items(), values, strict=True):
        feature_map, _, statistic = name.rpartition("/")
        if not feature_map:
            record[name] = value if tensor.is_floating_point() else int(value)
        elif statistic.startswith("lambda_"):
            record.setdefault("lambda", {}).setdefault(feature_map, {})[statistic.removeprefix("lambda_")] = value
        else:
            record.setdefault(statistic, {})[feature_map] = value
    return record


def _finite(value: Any) -> Any:
    """The record with None, as JSON has nothing else, for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_up_to(path: Path, step: int) -> list[bytes]:
    """The lines of ``path`` whose step is at most ``step``; one cut short by a crash is left out."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and is_count(record.get("step")) and record["step"] <= step:
            kept.append(line)
    return kept


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
