"""Whether a long run stays as it began: ``python -m benchmarks.soak [--minutes 30]``.

Trains the digits with a reading process, evaluations and checkpoints, and compares the memory of the process and the
time of its steps near the beginning with those at the end. Exits with 1 if the memory grew by 1 % or more.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = [
    "train.steps=1000000000", "train.log_every=20", "train.save_every=500", "train.eval_every=1000", "data.workers=1",
]  # fmt: skip
MOST_GROWTH = 0.01
WARM_UP = 0.1  # of the time, in which libraries fill their caches


def resident_bytes(pid: int) -> int:
    """Of the process, as Linux tells it."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"process {pid} has ended")


def watch(minutes: float, run: Path) -> list[int]:
    """The memory of the process while it trains in ``run``, every five seconds."""
    command = [sys.executable, "-m", "drifting.train", "--out", str(run), *SETTINGS]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    memory: list[int] = []
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        time.sleep(5)
        if process.poll() is not None:
            raise SystemExit(f"training ended with status {process.returncode}")
        memory.append(resident_bytes(process.pid))
    process.send_signal(signal.SIGTERM)
    if process.wait() != 128 + signal.SIGTERM:
        raise SystemExit(f"after SIGTERM, training ended with status {process.returncode}")
    return memory


def growth(values: list[float]) -> float:
    """Of the median of the last tenth over that of the first, after the warm-up."""
    values = values[int(WARM_UP * len(values)) :]
    part = max(1, len(values) // 10)
    return statistics.median(values[-part:]) / statistics.median(values[:part]) - 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args(argv).minutes
    with tempfile.TemporaryDirectory() as folder:
        memory = watch(minutes, Path(folder))
        records = [
            json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    steps = [record["timing"]["step"] for record in records]
    print(f"{records[-1]['step']} steps in {minutes:g} minutes")
    print(f"memory: {memory[-1] / 1e6:.1f} MB, {growth([float(m) for m in memory]):+.2%}")
    print(f"step: {1e3 * statistics.median(steps):.1f} ms, {growth(steps):+.1%}")
    return int(growth([float(m) for m in memory]) >= MOST_GROWTH)


if __name__ == "__main__":
    raise SystemExit(main())
