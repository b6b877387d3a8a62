"""One record a logged step, in ``metrics.jsonl`` and as TensorBoard events."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, stack
from torch.utils.tensorboard import SummaryWriter

from .checkpoint import atomic_write


class MetricsLog:
    """Appends records to ``path`` and writes them beside it as events; records after ``step`` are dropped first."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            with atomic_write(path) as part:
                part.write_text("".join(_lines_up_to(path, step)))
        self.file = path.open("a")
        self.events = SummaryWriter(str(path.parent), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self.file, flush=True)
        for name, value in _flat(record).items():
            if name != "step":
                self.events.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.file.close()
        self.events.close()


def to_record(metrics: dict[str, Tensor]) -> dict[str, Any]:
    """0-d tensors of a training step as numbers, fetched at once.

    What belongs to a feature map is grouped: ``scale: {map: …}`` and ``lambda: {map: {R: …}}``.
    """
    values = stack([value.detach().float() for value in metrics.values()]).tolist()
    record: dict[str, Any] = {}
    for name, value in zip(metrics, values, strict=True):
        feature_map, _, statistic = name.rpartition("/")
        if not feature_map:
            record[name] = value
        elif statistic.startswith("lambda_"):
            record.setdefault("lambda", {}).setdefault(feature_map, {})[statistic.removeprefix("lambda_")] = value
        else:
            record.setdefault(statistic, {})[feature_map] = value
    return record


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of ``path`` whose step is at most ``step``; one cut short by a crash is left out."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    return kept


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
