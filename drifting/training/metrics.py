"""The metrics of a run's steps: as numbers, on disk, and as what ends the run when they are not finite."""

import hashlib
import json
import sys
from contextlib import suppress
from math import inf, isfinite
from pathlib import Path
from typing import Any

from torch import Tensor, stack

from ..errors import UserError, explained, reason, require
from ..utils.files import atomic_write
from .checkpoint import checkpoints_in

OVERVIEW = {  # These scalars are what to look at first. TensorBoard sorts groups by name, so theirs is at the top.
    "lambda_mean": "0_overview/lambda",
    "learning_rate": "0_overview/learning_rate",
    "timing/images_per_second": "0_overview/images_per_second",
}


class MetricsLog:
    """Appends records to ``path`` in a run directory, and writes them beside it as TensorBoard events.

    The events have the scalars of ``OVERVIEW`` first, as far as a record has them. Training goes on from ``step``:
    records after it are dropped. ``wandb_project``, of Weights & Biases, gets the same scalars too, as a run of the
    directory's name with these ``settings``.
    """

    def __init__(self, path: Path, step: int, wandb_project: str | None = None, settings: Any = None) -> None:
        self.path = path
        self.wandb = None if wandb_project is None else _open_wandb(wandb_project, path.parent, settings)
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
            with atomic_write(path) as part:
                part.write_bytes(b"".join(kept))
        with explained("TensorBoard cannot be imported, which pip install --force-reinstall tensorboard may mend"):
            from torch.utils.tensorboard import SummaryWriter
        self.file = path.open("ab", buffering=0)
        self.events = SummaryWriter(str(path.parent), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record: its ``step``, and numbers or dictionaries of them."""
        valid = json.loads(json.dumps(record), parse_constant=lambda name: None)  # JSON has no NaN and no infinity.
        line = memoryview(f"{json.dumps(valid)}\n".encode())
        scalars = _flat({name: value for name, value in record.items() if name != "step"})
        scalars = {tag: scalars.pop(name) for name, tag in OVERVIEW.items() if name in scalars} | scalars
        try:
            while line:
                line = line[self.file.write(line) :]
            for name, value in scalars.items():
                self.events.add_scalar(name, value, record["step"])
        except OSError as error:  # The system does not name a file that is open.
            error.filename = error.filename or str(self.path)
            raise
        if self.wandb is not None:
            try:
                self.wandb.log(scalars, step=record["step"])
            except Exception as error:  # It is a service's, which must not end the run.
                print(f"train.wandb gets no more records, {self.path} does: {reason(error)}", file=sys.stderr)
                self.wandb = None

    def close(self) -> None:
        self.file.close()
        with suppress(OSError):  # The last events may be lost; ``path`` has their records.
            self.events.close()
        if self.wandb is not None:
            self.wandb.finish()


def _open_wandb(project: str, run: Path, settings: dict[str, Any]) -> Any:
    """The run of W&B that belongs to that directory: a resumed one goes on in it."""
    wandb = require("wandb", "train.wandb", "wandb")
    name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
    try:
        return wandb.init(project=project, name=run.name, id=name, dir=str(run), config=settings, resume="allow")
    except Exception as error:  # An installation that is in part broken raises errors of any class.
        raise UserError(f"train.wandb: {reason(error).rstrip('.')}; WANDB_MODE=offline needs no account") from error


def _step_of(line: bytes) -> float:
    """The step of a record, or infinity for a line that is none: a crash may have cut it short."""
    try:
        return float(json.loads(line)["step"])
    except Exception:  # The file may hold anything.
        return inf


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def to_record(metrics: dict[str, Tensor]) -> dict[str, Any]:
    """0-d tensors of a step as numbers, fetched at once, with ``scale: {map: …}`` and ``lambda: {map: {R: …}}``.

    The mean of all λ is ``lambda_mean``. Temperatures that learn, from R on, are ``temperature: {map: {R: …}}``.
    """
    values = stack([value.detach().float() for value in metrics.values()]).tolist()
    record: dict[str, Any] = {}
    for (name, tensor), value in zip(metrics.items(), values, strict=True):
        feature_map, _, statistic = name.rpartition("/")
        statistic, _, R = statistic.partition("_")
        if not feature_map:
            record[name] = value if tensor.is_floating_point() else int(value)
        elif R:
            record.setdefault(statistic, {}).setdefault(feature_map, {})[R] = value
        else:
            record.setdefault(statistic, {})[feature_map] = value
    if "lambda" in record:
        lambdas = [value for of_map in record["lambda"].values() for value in of_map.values()]
        record["lambda_mean"] = sum(lambdas) / len(lambdas)
    return record


def check_finite(step: int, metrics: dict[str, Tensor], allowed: int, checkpoints: Path) -> None:
    """Raise UserError once a run has skipped more than ``allowed`` steps because loss or gradient was not finite.

    It names the step, the feature maps that are not finite, and the newest file in ``checkpoints``.
    """
    if metrics["skipped_steps"] <= allowed:
        return
    record = to_record(metrics)
    scales, lambdas = record.get("scale", {}), record.get("lambda", {})
    maps = [name for name in scales if not all(map(isfinite, [scales[name], *lambdas.get(name, {}).values()]))]
    where = "behind the feature maps, which are finite" if scales else "in the model"
    if maps:
        rest = f" and {len(maps) - 3} more" if len(maps) > 3 else ""
        where = f"in the feature map{'s' * (len(maps) > 1)} {', '.join(maps[:3])}{rest}"
    newest = ["not there yet", *checkpoints_in(checkpoints).values()][-1]
    raise UserError(
        f"step {step}: the loss is {record['loss']:g} and its gradient's norm {record['grad_norm']:g}, {where}; "
        f"skipped so far: {record['skipped_steps']}. These steps left the weights as they were; the last checkpoint is "
        f"{newest}: look at the data, lower optimizer.learning_rate, or let train.max_skipped_steps such steps pass"
    )
