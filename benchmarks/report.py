"""Writes the GPU section of ``docs/performance.md``, and its plots, from the results: ``python -m benchmarks.report``.

Everything between the two marker comments of the page comes from ``benchmarks/results/*.json``; ``--check`` only says,
by its exit status, whether the page is up to date.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- begin: python -m benchmarks.report -->", "<!-- end: python -m benchmarks.report -->"
NEVER_RUN = """The GPU kernels have never been run on a GPU, so there are no figures to show. On a machine with a GPU
`make gpu-check` builds, tests and times them and writes `benchmarks/results/`, from which `python -m benchmarks.report`
writes this section.
"""
DENSE, OURS = ("eager", "compile", "max-autotune"), ("triton", "cuda", "ours")
CONTENDERS = (*DENSE, "keops", *OURS)

Results = dict[str, Any]
Rows = dict[str, dict[str, Any]]  # by contender


def by_case(results: Results) -> dict[tuple[str, str], Rows]:
    """Rows by ``(case, precision)``, then by contender."""
    cases: dict[tuple[str, str], Rows] = {}
    for row in results["rows"]:
        cases.setdefault((row["case"], row["precision"]), {})[row["contender"]] = row
    return cases


def milliseconds(row: dict[str, Any]) -> float | None:
    """Of all the case's problems: of a part of them, in proportion."""
    if "milliseconds" not in row:
        return None
    return row["milliseconds"] * row["G"] / (row["scaled_G"] or row["G"])


def table(results: Results) -> str:
    """Markdown: a line for each case and precision."""
    cases = by_case(results)
    present = [name for name in CONTENDERS if any(name in rows for rows in cases.values())]
    ours = [name for name in present if name in OURS]
    header = ["case", "precision", *(f"{name} ms" for name in present)]
    header += [f"{column}, {name}" for name in ours for column in ("× eager", "× best compiled", "of floor", "memory")]
    lines = [header, ["---"] * len(header)]
    for (case, precision), rows in cases.items():
        line = [f"`{case}`", precision, *(_time(rows.get(name)) for name in present)]
        for name in ours:
            line += _merits(rows, name)
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _time(row: dict[str, Any] | None) -> str:
    if row is None or row.get("failure", "").startswith("skipped"):
        return ""
    if "failure" in row:
        return "memory" if row["failure"] == "out of memory" else "failed"
    return f"{milliseconds(row):.3g}" + (f" (G={row['scaled_G']})" if row["scaled_G"] else "")


def _merits(rows: Rows, name: str) -> list[str]:
    """How many times faster than eager and than the best of torch.compile, share of the floor, and peak memory over
    that of inputs and outputs."""
    row = rows.get(name)
    ours = milliseconds(row) if row else None
    if row is None or ours is None:
        return [""] * 4
    eager = milliseconds(rows.get("eager", {}))
    compiled = [t for n in DENSE[1:] if (t := milliseconds(rows.get(n, {}))) is not None]
    peak = row["peak_extra_bytes"]
    return [
        f"{eager / ours:.2f}" if eager else "",
        f"{min(compiled) / ours:.2f}" if compiled else "",
        f"{row['floor_milliseconds'] / row['milliseconds']:.0%}",
        f"{(row['input_bytes'] + peak) / (row['input_bytes'] + row['output_bytes']):.2f}" if peak is not None else "",
    ]


def failures(results: Results) -> str:
    lines = [
        f"- `{row['case']}`, {row['precision']}, {row['contender']}: {row['failure']}"
        for row in results["rows"]
        if "failure" in row
    ]
    if results["skipped"]:
        cases = dict.fromkeys(f"`{case}` at {precision}" for case, precision, *_ in results["skipped"])
        lines.append(f"- all or some contenders, for want of time: {', '.join(cases)}")
    return "\n".join(["Not measured:", "", *lines, ""]) if lines else ""


def section(name: str, results: Results) -> str:
    """Markdown of one device: where the figures come from, its ceilings, the table and the plot."""
    machine, ceilings = results["machine"], results["machine"]["ceilings"]
    rates = ", ".join(f"{label} {ceilings[key] / 1e12:.0f}" for key, label in _RATES.items())
    versions = (
        f"Driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"commit `{str(machine['commit'])[:12]}`, {machine['date']}"
    )
    return f"""### {machine["device"]}{", the main cases (`STAGE=quick`)" if name.endswith(".quick") else ""}

{versions}; `benchmarks/results/{name}.json`.
In the same run: copy {ceilings["copy"] / 1e12:.2f} TB/s, read plus written; products of 8192³ in Tflop/s: {rates}.

{table(results)}
{failures(results)}
![Times on {machine["device"]}](images/gpu-{name}.png)
"""


_RATES = {"ieee": "IEEE float32", "tf32": "TF32", "bf16": "bfloat16"}
_EXPLANATION = """What `make gpu-check` measured, written here by `python -m benchmarks.report`. Times are medians
between events on the GPU, the L2 cache filled with something else before each run, the contenders of a case in turns.
*eager* is `benchmarks/dense.py`, *compile* and *max-autotune* are `torch.compile` of it, *keops* is
`benchmarks/keops.py`, the rest is ours by backend. `drift_loss` and the step are forward and backward to the gradient
of the generated samples, the others forward unless they say otherwise. Counts are [generated, negatives, positives];
points are standard normal, float32; *precision* is what `torch.set_float32_matmul_precision` was given. *(G=…)*:
measured on so many of the problems (of a step: labels), as many as memory allows, and scaled up in proportion.
*of floor*: the least time that the bytes of inputs and outputs take at copy bandwidth, or the matrix products at the
matrix rate of the precision (for *highest* a third of the 16-bit rate, for *high* all of it), whichever is longer, over
the time measured. *memory*: its peak over that of inputs and outputs.
"""


def gpu_section(results: dict[str, Results]) -> str:
    """Everything between the markers."""
    if not results:
        return NEVER_RUN
    return "\n".join([_EXPLANATION, *(section(name, of_device) for name, of_device in results.items())])


def replace_section(page: str, text: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"{PAGE} must contain {BEGIN} and, after it, {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def plot(results: Results, path: Path) -> None:
    """Milliseconds of every contender, a line of bars for each case that ours was measured on."""
    from matplotlib.figure import Figure

    cases = {key: rows for key, rows in by_case(results).items() if any(milliseconds(rows.get(n, {})) for n in OURS)}
    present = [name for name in CONTENDERS if any(name in rows for rows in cases.values())]
    figure = Figure(figsize=(10, 1 + 0.12 * max(1, len(cases) * (len(present) + 1))), layout="constrained")
    axes = figure.subplots()
    for k, name in enumerate(present):
        bars = [(i, t) for i, rows in enumerate(cases.values()) if (t := milliseconds(rows.get(name, {}))) is not None]
        heights = [i + (k + 0.5) / (len(present) + 1) for i, _ in bars]
        axes.barh(heights, [t for _, t in bars], 1 / (len(present) + 1), label=name)
    labels = [f"{case}, {precision}" for case, precision in cases]
    axes.set_yticks([i + 0.4 for i in range(len(cases))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    axes.set_title(results["machine"]["device"])
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def load(folder: Path) -> dict[str, Results]:
    """Results of :mod:`benchmarks.gpu` in the folder by their names: DEVICE, and DEVICE.quick of the main cases."""
    files = [path for path in sorted(folder.glob("*.json")) if "." not in path.stem.removesuffix(".quick")]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    results = load(RESULTS)
    page = replace_section(PAGE.read_text(encoding="utf-8"), gpu_section(results))
    if args.check:
        sys.exit(
            f"{PAGE} is not what python -m benchmarks.report writes" if page != PAGE.read_text(encoding="utf-8") else 0
        )
    for name, of_device in results.items():
        plot(of_device, IMAGES / f"gpu-{name}.png")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
