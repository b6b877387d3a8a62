"""What tests look at in run directories."""

import json
from pathlib import Path
from typing import Any


def read_records(run: Path) -> list[dict[str, Any]]:
    """The records of its log, but for how long things took."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key != "timing"} for record in records]
