"""Ours against dense PyTorch on the CPU, taking turns in one process: ``python -m benchmarks.compare [--busy]``.

With ``--verify`` nothing is timed: what would be is compared with the dense form in float64.

Prints a table of median milliseconds and ratios, each ratio beside its target, and how far memory grows for one large
problem. Times of ``drift_loss`` are forward and backward to the gradient of the generated samples; the others forward.
With ``--busy`` another process keeps a core busy meanwhile, and the cases are those with a target for that.
"""

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .cases import CASES, Case, matrix_products
from .measure import interleaved_medians, wall_seconds
from .memory import FORMS

MOST_MEMORY_GROWTH_MB = 400


def measure(case: Case, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    calls = case.contenders("cpu")
    if case.form == "drift_loss":
        calls["matmuls"] = matrix_products(case)
    for call in calls.values():
        call()  # compiles
        call()
    timed = interleaved_medians(calls, seconds, wall_seconds, min_rounds=7, max_rounds=1_000_000)
    medians = {name: median for name, (median, _) in timed.items()}
    ours = medians["ours"]
    return {
        "case": case.name,
        "milliseconds": {name: 1e3 * median for name, median in medians.items()},
        "eager / ours": medians["eager"] / ours,
        "eager / ours, at least": case.eager_ratio,
        "compile / ours": medians["compile"] / ours,
        "compile / ours, at least": case.compile_ratio,
        "ours / matmuls": ours / medians["matmuls"] if "matmuls" in medians else None,
        "ours / matmuls, at most": case.matmul_ratio,
    }


def verify(case: Case) -> str:
    """Relative errors of ours and of the dense form in float32, for some of the groups."""
    torch.manual_seed(0)
    maps = case.part(case.inputs("cpu"), min(case.G, 8))
    exact = case.call("eager", [tuple(t.double() for t in points) for points in maps])()[0]
    errors = [((case.call(name, maps)()[0] - exact).norm() / exact.norm()).item() for name in ("ours", "eager")]
    return f"{case.name:<60}" + "".join(f"{error:>12.1e}" for error in errors)


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Meanwhile another process never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def memory(form: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", form]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


TIMES = ("eager", "compile", "ours", "matmuls")
RATIOS = {"eager / ours": "at least", "compile / ours": "at least", "ours / matmuls": "at most"}


def header() -> str:
    return f"{'case':<60}" + "".join(f"{name:>10}" for name in TIMES) + "".join(f"{name:>18}" for name in RATIOS)


def row(result: dict[str, Any]) -> str:
    times = [f"{result['milliseconds'][name]:.2f}" if name in result["milliseconds"] else "" for name in TIMES]
    ratios = []
    for name, bound in RATIOS.items():
        value, target = result[name], result[f"{name}, {bound}"]
        wanted = f" ({'>=' if bound == 'at least' else '<='} {target})" if target else ""
        ratios.append(f"{value:.2f}{wanted}" if value else "")
    return f"{result['case']:<60}" + "".join(f"{time:>10}" for time in times) + "".join(f"{r:>18}" for r in ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the results there too")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument("--busy", action="store_true", help="while another process keeps a core busy")
    parser.add_argument("--verify", action="store_true", help="compare results instead of times")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each case (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.verify:
        print("relative error against the dense form in float64: of ours, and of the dense form, in float32")
        for case in [case for case in CASES if args.only in case.name]:
            print(verify(case), flush=True)
        return
    print(f"torch {torch.__version__}, {args.threads} threads, float32; median milliseconds, ratios with their targets")
    cases = [case for case in CASES if args.only in case.name]
    if args.busy:
        cases = [replace(case, eager_ratio=case.busy_ratio, compile_ratio=None) for case in cases if case.busy_ratio]
        print("while another process keeps a core busy")
    print(header())
    speed = []
    with busy_core() if args.busy else contextlib.nullcontext():
        for case in cases:
            speed.append(measure(case, args.seconds))
            print(row(speed[-1]), flush=True)
    growth = [] if args.only or args.busy else [memory(form) for form in FORMS]
    for result in growth:
        print(
            "{form} forward and backward, {counts} = {points}, D = {dim}: {seconds} s,".format(**result),
            f"peak memory grows by {result['growth_mb']} MB (<= {MOST_MEMORY_GROWTH_MB})",
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            machine = {"torch": torch.__version__, "threads": args.threads, "busy": args.busy}
            json.dump(machine | {"speed": speed, "memory": growth}, file, indent=1)


if __name__ == "__main__":
    main()
