"""All contenders on a GPU: ``python -m benchmarks.gpu [--quick] [--seconds 520] [--only TEXT]``.

Writes ``benchmarks/results/DEVICE.json`` (``--quick``: ``DEVICE.quick.json``, of the main cases alone) after every
trial and prints a table at the end. Trials come in the order of their importance; those that the time does not suffice
for are listed as skipped. ``--dry-run`` goes the same way on the CPU with tiny shapes, to try the code.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cases import GPU_BACKENDS, Case, Step
from .machine import ROOT, slug
from .report import table
from .trial import Row, Settings, Trial, serve

RESULTS = ROOT / "benchmarks" / "results"
LOG = ROOT / "build" / "gpu-check" / "bench-processes.log"
START_LIMIT, WARM_UP_LIMIT = 120, 120  # seconds until a process is up and has its ceilings; until a contender is warm
QUICK_WARM_UP_LIMIT = 45
LEAST_LEFT = 15  # seconds; with less no trial is begun
OUT_OF_TIME = "skipped: out of time"
MOST_ERROR = 1e-2  # of ours relative to eager at precision "highest"

LABELS, COUNTS = 64, {"N": 64, "M": 16, "P": 64}  # of the paper's ablation: [64 generated, 16 negative, 64 positive]
ABLATION_MAPS = [(1024, 256), (256, 512), (64, 1024), (16, 2048), (1, 4096)]  # (locations, D)
LARGEST = 131072
STREAMED = [(N, D) for D in (256, 64) for N in (LARGEST, 32768, 8192)]  # N = P
TOY = [(2000, 2), (1000, 2)]
IN_MEMORY = 0.35  # of the device's memory: what a case's inputs and outputs may take


def ablation_step_maps() -> tuple[tuple[int, int], ...]:
    """(locations, D) of the 86 maps of a 32×32×4 latent in the paper's ablation: ResNet width 256."""
    import torch

    from drifting.models.feature_extractor import LatentFeatureExtractor

    with torch.device("meta"):
        maps = LatentFeatureExtractor(base_channels=256)(torch.empty(1, 4, 32, 32))
    return tuple((feature.shape[1], feature.shape[2]) for feature in maps.values())


def fitting(case: Case, memory: int) -> Case:
    """``case``, or with fewer problems if its inputs and outputs would take too much of the memory."""
    of_one = replace(case, G=1).bytes
    return replace(case, G=max(1, min(case.G, int(IN_MEMORY * memory / of_one))))


def ablation_cases(memory: int) -> tuple[list[Case], Step]:
    """Maps of the paper's ablation alone, and a step of all of them."""
    losses = [
        fitting(Case("drift_loss", D=D, G=LABELS * locations, **COUNTS), memory) for locations, D in ABLATION_MAPS
    ]
    maps = ablation_step_maps()
    return losses, fitting(Step("drift_loss", D=max(D for _, D in maps), G=LABELS, maps=maps, **COUNTS), memory)


def trials(cases: Iterable[Case], precision: str, *contenders: str) -> list[Trial]:
    return [Trial(case, precision, contenders) for case in cases if contenders]


def quick_plan(machine: dict[str, Any], ours: tuple[str, ...]) -> list[Trial]:
    """The main cases: first ours beside eager, then ``torch.compile``, which may take all of the time that is left."""
    losses, step = ablation_cases(machine["memory_bytes"])
    largest = Case("drift_field", N=LARGEST, P=LARGEST, D=256)
    return [
        *trials([*losses, step, largest], "highest", "eager", *ours),
        *trials([largest], "high", *ours),
        *trials([*losses, step], "highest", "compile"),
    ]


def plan(machine: dict[str, Any], ours: tuple[str, ...]) -> list[Trial]:
    """All trials, the most important first; ``ours`` are the contenders that are judged."""
    losses, step = ablation_cases(machine["memory_bytes"])
    keops = ("keops",) if machine["keops"] else ()
    fields = [Case(form, N=N, P=N, D=D) for form in ("drift_field", "compute_V") for N, D in STREAMED]
    large, others = ([case for case in fields if (case.N == LARGEST) == is_large] for is_large in (True, False))
    toys = [Case(form, N=N, P=N, D=D) for form in ("drift_field", "compute_V") for N, D in TOY]
    backward_V = [Case("compute_V", N=N, P=N, D=64, backward=True) for N in (8192, 32768)]
    backward_field = [replace(case, form="drift_field") for case in backward_V]
    return [
        *trials(losses, "highest", "eager", "compile", *ours),
        *trials([step], "highest", "eager", "compile", *ours),
        *trials(large[:1], "highest", "eager", *ours),  # one dense matrix takes 137 GB
        *trials(large[:1], "high", *ours),
        *trials(losses, "high", "eager", *ours),
        *trials(others, "highest", "eager", "compile", *keops, *ours),
        *trials(large[1:], "highest", "eager", *ours),
        *trials(toys, "highest", "eager", "compile", *keops, *ours),
        *trials(losses, "highest", "max-autotune"),  # compiles for long
        *trials(losses, "high", "compile"),
        *trials([step], "high", "eager", "compile", *ours),
        *trials([*others, *large[1:]], "high", "eager", *ours),
        *trials(backward_V, "highest", "eager", *ours),
        *trials(backward_field, "highest", *ours),  # the dense form's backward is NaN: sqrt at the masked pairs
        *trials(losses, "high", "max-autotune"),
        *trials([step], "highest", "max-autotune"),
        *trials([case for case in fields if case.N == 8192] + toys, "highest", "max-autotune"),
    ]


def shrunk(trial: Trial) -> Trial:
    """The same trial, tiny, for a dry run."""
    case = trial.case
    small: dict[str, Any] = {"N": 6, "P": 7, "M": min(case.M, 3), "D": 2 + case.D // 256}
    small["G"] = 4 if case.form == "drift_loss" else 1
    if isinstance(case, Step):
        small["maps"] = tuple((min(locations, 2), 1 + D // 1024) for locations, D in case.maps[:8])
    return replace(trial, case=replace(case, **small))


class Worker:
    """The process that runs trials, and the conversation with it."""

    def __init__(self, settings: Settings, ceilings: dict[str, float] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, settings, ceilings))
        self.process.start()
        theirs.close()
        try:
            self.machine = self.receive(START_LIMIT)[1]
        except (TimeoutError, EOFError, ConnectionError) as error:
            self.stop()
            log = "\n".join(Path(settings.log).read_text(errors="replace", encoding="utf-8").splitlines()[-20:])
            raise RuntimeError(f"the bench process did not start; {settings.log} ends with\n{log}") from error

    def receive(self, seconds: float) -> tuple:
        """Its next message; raises TimeoutError or EOFError if none comes in time or ever."""
        if not self.connection.poll(max(seconds, 0)):
            raise TimeoutError
        return self.connection.recv()

    def stop(self) -> None:
        """Asks it to end, and ends it if it does not."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(5)
        self.process.kill()
        self.process.join()
        self.connection.close()


class Bench:
    """Runs trials in a worker, which it replaces when a contender spoils or stops it."""

    def __init__(self, settings: Settings, deadline: float, warm_up_limit: float = WARM_UP_LIMIT) -> None:
        self.settings, self.deadline, self.warm_up_limit = settings, deadline, warm_up_limit
        self.worker: Worker | None = Worker(settings)
        self.machine = self.worker.machine

    def stop(self) -> None:
        if self.worker:
            self.worker.stop()
            self.worker = None

    def run(self, trial: Trial) -> list[Row]:
        """A row for each contender. One that fails, dies or hangs has the reason in its row; the rest go on without."""
        failures: dict[str, str] = {}
        rows: list[Row] = []
        while left := tuple(name for name in trial.contenders if name not in failures):
            if time.monotonic() > self.deadline:
                failures |= dict.fromkeys(left, OUT_OF_TIME)
                break
            done, rows = self._attempt(replace(trial, contenders=left), failures)
            if done:
                break
        return rows + [
            {"case": trial.case.name, "precision": trial.precision, "contender": name, "failure": reason}
            for name, reason in failures.items()
        ]

    def _attempt(self, trial: Trial, failures: dict[str, str]) -> tuple[bool, list[Row]]:
        """Whether the trial came to its end, and its rows. Adds to ``failures``, at least one if it did not."""
        self.worker = self.worker or Worker(self.settings, self.machine["ceilings"])
        waiting_for: tuple[str, ...] = trial.contenders
        limit = self.warm_up_limit
        try:
            self.worker.connection.send(trial)
            while True:
                limit = min(limit, max(self.deadline - time.monotonic(), 1))
                message = self.worker.receive(limit)
                if message[0] == "started":
                    waiting_for, limit = (message[1],), self.warm_up_limit
                elif message[0] == "failed":
                    failures[message[1]] = message[2]
                    waiting_for = ()
                elif message[0] == "timing":
                    waiting_for = tuple(name for name in trial.contenders if name not in failures)
                    limit = self.warm_up_limit + 2 * self.settings.seconds
                else:
                    if not message[2]:
                        self.stop()
                    return True, message[1]
        except TimeoutError:
            reason = OUT_OF_TIME if time.monotonic() >= self.deadline else f"stopped: not done after {limit:.0f} s"
        except (EOFError, ConnectionError):
            self.worker.process.join(10)
            reason = f"the process died, exit code {self.worker.process.exitcode}"
        self.stop()
        failures |= {name: reason for name in waiting_for}
        return False, []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the main cases alone")
    parser.add_argument("--seconds", type=float, default=520, help="for everything (default 520)")
    parser.add_argument("--only", default="", metavar="TEXT", help="trials with TEXT in their case's name")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("", encoding="utf-8")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings("cpu", 0.01, str(LOG)) if args.dry_run else Settings("cuda", 1.0, str(LOG))
    bench = Bench(settings, deadline, QUICK_WARM_UP_LIMIT if args.quick else WARM_UP_LIMIT)
    machine = bench.machine
    usable = tuple(name for name in GPU_BACKENDS if machine["backends"][name] == "usable")
    ours = ("ours",) if args.dry_run else usable
    results: dict[str, Any] = {"machine": machine, "rows": [], "skipped": []}
    name = "dry-run" if args.dry_run else slug(machine["device"])
    path = args.out / f"{name}{'.quick' if args.quick else ''}.json"
    try:
        for trial in (quick_plan if args.quick else plan)(machine, ours):
            trial = shrunk(trial) if args.dry_run else trial
            if args.only not in trial.case.name:
                continue
            if deadline - time.monotonic() < LEAST_LEFT:
                results["skipped"].append([trial.case.name, trial.precision, *trial.contenders])
                continue
            rows = bench.run(trial)
            results["rows"] += rows
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"{deadline - time.monotonic():4.0f} s left; {trial.case.name}, {trial.precision}:", end=" ")
            print(*(summary(row) for row in rows), sep=", ", flush=True)
    finally:
        bench.stop()
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}\n\n{table(results)}")
    sys.exit("\n".join(complaints(results["rows"], ours)) or 0)


def complaints(rows: list[Row], ours: tuple[str, ...]) -> list[str]:
    """Of rows of ours that failed, or that are far from what the dense form computes; of none at all."""
    found = [] if rows else ["nothing was measured, for want of time"]
    for row in rows:
        where = f"{row['case']}, {row['precision']}, {row['contender']}"
        if row["contender"] in ours and row.get("failure", OUT_OF_TIME) != OUT_OF_TIME:
            found.append(f"{where}: {row['failure']}")
        elif (
            row["contender"] in ours and row["precision"] == "highest" and (row.get("error_to_eager") or 0) > MOST_ERROR
        ):
            found.append(f"{where}: differs from eager by {row['error_to_eager']:.1e}")
    return found


def summary(row: Row) -> str:
    return f"{row['contender']} {row.get('failure') or format(row['milliseconds'], '.3g') + ' ms'}"


if __name__ == "__main__":
    main()
