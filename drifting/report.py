"""``python -m drifting.report RUN [RUN …] --out report.html``: what runs train and how well, side by side."""

import html
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress, count
from math import prod
from pathlib import Path
from statistics import fmean, median
from string import Template
from typing import Any

from PIL import Image
from safetensors import safe_open

from .cli import ArgumentParser, run_command
from .config import Config, PretrainConfig, read_config
from .config.reading import CONFIG_DIR, values_of
from .errors import UserError, reason, require, shown
from .evaluation.telling import DISTANCES, told_measures
from .hub.run_directory import RunDirectory
from .utils.figures import new_figure
from .utils.files import atomic_write, read_object
from .utils.images import data_uri

PAGE = Path(__file__).parent / "templates" / "report.html"
COLOURS = [f"#a0b0c{n}" for n in range(8)]  # The page has others in their places, which depend on light and dark.
STYLE = {"svg.fonttype": "none", "font.size": 9, "text.parse_math": False, "axes.spines.top": False,
         "axes.spines.right": False, "lines.linewidth": 1.4}  # fmt: skip
MOST_POINTS, FEW_POINTS, MOST_PICTURES, MOST_PIXELS = 300, 15, 8, 1200  # Few points are marked.
MOST = 10**12  # No number of a run is as great.
LOG_FROM = 100  # Where most values are not within this factor of the greatest, the scale is logarithmic.
NO_PHASES = {"step", "images_per_second", "memory_gb"}
CURVES = {  # Numbers of a record, and what they are called.
    "sample_spread": "spread of samples over that of real ones (1 is right)",
    "distance": "Fréchet distance (dotted: real samples)",
    "recon_loss": "reconstruction loss",
    "cls_loss": "classification loss",
    "learning_rate": "learning rate",
}

Series = tuple[list[float], list[float]]  # Steps, and a value at each.


@dataclass
class Recorded:
    """What there is in a run directory; ``missing`` says what is not."""

    name: str
    directory: RunDirectory
    schema: Any  # Config or PretrainConfig
    values: dict[str, Any]  # The configuration, by dotted key.
    description: dict[str, Any]
    records: list[dict[str, Any]]
    pictures: list[Path]
    missing: list[str]

    @property
    def quality(self) -> dict[str, float]:
        """The numbers of the last evaluation, with the Fréchet distance as ``distance`` too."""
        numbers = ({key: n for key in r if (n := _number(r, [key])) is not None} for r in reversed(self.records))
        return next((found for found in numbers if "distance" in found or "recon_loss_test" in found), {})

    def series(self, *place: str) -> Series:
        """The numbers at a place in the records, such as ``timing``, ``step``; of a dictionary there, their mean."""
        found = [(record["step"], _number(record, place)) for record in self.records]
        there = [(step, value) for step, value in found if value is not None]
        return [step for step, _ in there], [value for _, value in there]

    def names(self, key: str) -> list[str]:
        """The keys of the dictionaries that records have there."""
        return list(dict.fromkeys(name for record in self.records for name in _dict(record.get(key))))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(record: Any, place: Sequence[str]) -> float | None:
    for key in place:
        record = _dict(record).get(key)
    values = record.values() if isinstance(record, dict) else [record]
    numbers = [value for value in values if type(value) in (int, float) and abs(value) < MOST]
    return fmean(numbers) if numbers else None


def read_run(path: Path, name: str) -> Recorded:
    """Read what there is of a run, which may be in progress; UserError where there is no configuration nor metrics."""
    run, missing = RunDirectory(path), []
    if not run.config.is_file() and not run.metrics.is_file():
        raise UserError(f"{path} has no config.yaml and no metrics.jsonl: expected a run of `python -m drifting.train`")
    description: dict[str, Any] = {}
    try:
        description = read_object(run.description)
    except (OSError, UserError) as error:
        missing.append(f"no model.json ({reason(error)})")
    schema, values, problem = _read_values(run.config)
    if problem:
        missing.append(f"no configuration ({problem})")
    lines = run.metrics.read_bytes().splitlines() if run.metrics.is_file() else []
    records = [record for line in lines if (record := _record(line)) is not None]
    if len(records) < len(lines):
        missing.append(f"{len(lines) - len(records)} lines of metrics.jsonl that are no records")
    pictures = sorted(run.samples.glob("step_*.png"))
    recorded = Recorded(name, run, schema, values, description, records, pictures, missing)
    there = {"metrics": records, "evaluation": recorded.quality, "pictures": pictures}
    missing += [f"no {what} yet" for what, content in there.items() if not content]
    return recorded


def _read_values(path: Path) -> tuple[Any, dict[str, Any], str]:
    """What a configuration is of, its values, and what is wrong with it instead."""
    schemas: tuple[Any, ...] = (Config, PretrainConfig)
    problems = []
    for schema in schemas:
        try:
            return schema, values_of(read_config(str(path), (), schema)), ""
        except UserError as error:
            problems.append(str(error))
    return Config, {}, problems[0]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        distance = next((record[name] for name in DISTANCES if name in record), None)
        return record | {"step": min(int(record["step"]), MOST), "distance": distance}
    except Exception:  # A line may be cut short, or be anything.
        return None


# Tables


def facts(run: Recorded) -> dict[str, str]:
    """What was trained, in words by their titles."""
    description, values, records = run.description, run.values, run.records
    told = {"data": str(values.get("data.name", description.get("data", "")))}
    if isinstance(names := description.get("class_names"), list):
        told["data"] += f", {len(names)} classes: {shown(', '.join(map(str, names)), 80)}"
    told["network"] = str(values.get("model.name", description.get("kind", "")))
    try:
        with safe_open(run.directory.weights, "np") as file:
            told["parameters"] = f"{sum(prod(file.get_slice(name).get_shape()) for name in file.keys()):,}"
    except Exception:  # It may not be there yet, or be anything.
        run.missing.append("no weights that can be read")
    told["compared in"] = ", ".join(values.get("loss.feature_extractor", []))
    if records:
        of_all = f" of {values['train.steps']:,}" if values else ""
        told["steps"] = f"{records[-1]['step']:,.0f}{of_all}"
        steps, seconds = run.series("timing", "step")
        spent = sum(s * (step - last) for last, step, s in zip([0.0, *steps], steps, seconds, strict=False))
        told["time of all steps"] = f"{spent // 3600:.0f}:{spent // 60 % 60:02.0f}:{spent % 60 // 1:02.0f}"
        for title, key, form in (("images a second", "images_per_second", ",.0f"), ("memory", "memory_gb", ".2f")):
            of_steps = run.series("timing", key)[1]
            told[title] = f"{median(of_steps):{form}}" + " GB" * (title == "memory") if of_steps else ""
    told["device"] = str(description.get("device", ""))
    return told


def measures(run: Recorded) -> dict[str, str]:
    """The last measures in words, with those of real samples, which say what can be had."""
    quality, told = run.quality, {}
    if "distance" in quality:
        name = next(name for name in DISTANCES if name in quality)
        for title, value, real, split in told_measures(quality, name, "sample"):
            told[title] = value.strip() + (f" ({split} samples: {real.strip()})" if real else "")
        steps, distances = run.series("distance")
        told["lowest Fréchet distance"] = f"{min(distances):.2f} at step {steps[distances.index(min(distances))]:,.0f}"
    return told | {key: f"{quality[key]:.4g}" for key in ("recon_loss_test", "cls_loss_test") if key in quality}


def settings(runs: Sequence[Recorded]) -> tuple[str, dict[str, list[str]]]:
    """The named configuration to which a run, the first that has any, is nearest, and each key in which runs differ
    from it or each other: the value there and that of each run, which is nothing where a run has no configuration."""
    schema, first = next(((run.schema, run.values) for run in runs if run.values), (Config, {}))
    names = sorted(file.stem for file in CONFIG_DIR.glob("*.yaml"))
    names = [name for name in names if name.startswith("mae_") == (schema is PretrainConfig)]
    named = {name: values_of(read_config(name, (), schema)) for name in names}

    def distance(name: str) -> int:
        return sum(named[name].get(key) != first.get(key) for key in named[name] | first)

    nearest = min(named, key=distance)
    columns = [named[nearest], *(run.values for run in runs)]
    keys = dict.fromkeys(key for column in columns[1:] for key in (named[nearest] if column else {}) | column)
    rows = {key: [_setting(column.get(key, "")) for column in columns] for key in keys}
    there = [bool(column) for column in columns]
    return nearest, {key: row for key, row in rows.items() if len({*compress(row, there)}) > 1}


def _setting(value: Any) -> str:
    return shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def table(runs: Sequence[Recorded]) -> str:
    """All that is told in words, a run a column."""
    name, differences = settings(runs)
    rows = [_row("th", ["", "", *(run.name for run in runs)])]
    for told in ([facts(run) for run in runs], [measures(run) for run in runs]):
        for title in dict.fromkeys(title for of_run in told for title, text in of_run.items() if text):
            rows.append(_row("td", [title, "", *(of_run.get(title, "") for of_run in told)]))
    rows.append(_row("th", ["configuration", name, *("" for run in runs)]))
    rows += [_row("td", [key, *row]) for key, row in differences.items()]
    return "".join(rows)


def _row(cell: str, texts: Sequence[str]) -> str:
    first, *others = map(html.escape, texts)
    return f"<tr><th>{first}</th>" + "".join(f"<{cell}>{text}</{cell}>" for text in others) + "</tr>"


# Curves


def charts(runs: Sequence[Recorded]) -> Iterator[str]:
    """Each curve that some run has, with all runs in it; then the phases of each run's steps."""
    yield lambdas(runs)
    for key, title in CURVES.items():
        chart = Chart()
        for number, run in enumerate(runs):
            chart.plot(run.series(key), number)
            floor = next((run.quality[f"{name}_train"] for name in DISTANCES if f"{name}_train" in run.quality), None)
            if key == "distance" and floor is not None:
                chart.axes.axhline(floor, color=_colour(number), linestyle=":", linewidth=1)
        yield chart.html(title)
    for run in runs:
        yield phases(run, f": {run.name}" if len(runs) > 1 else "")


def lambdas(runs: Sequence[Recorded]) -> str:
    """λ of each feature map, thin, and their mean; the maps of a single run have colours where they are few."""
    chart, maps = Chart(), runs[0].names("lambda")
    if len(runs) == 1 and 1 < len(maps) <= len(COLOURS):
        for number, name in enumerate(maps):
            chart.plot(runs[0].series("lambda", name), number)
        return chart.html("λ of each feature map", maps)
    for number, run in enumerate(runs):
        for name in run.names("lambda"):
            chart.plot(run.series("lambda", name), number, linewidth=0.5, alpha=0.4)
        chart.plot(run.series("lambda_mean"), number)
    return chart.html("λ: mean, and thin of each feature map")


def phases(run: Recorded, of_run: str) -> str:
    """How long the phases of a step took, one on another."""
    chart, names = Chart(), sorted({*run.names("timing")} - NO_PHASES)
    steps = run.series("timing", "step")[0]
    parts = [dict(zip(*run.series("timing", name), strict=True)) for name in names]
    if steps and parts:
        steps, *values = _thinned([steps, *([1000 * part.get(step, 0.0) for step in steps] for part in parts)])
        chart.axes.stackplot(steps, values, colors=COLOURS)
    return chart.html(f"milliseconds of a step by phase{of_run}", names)


class Chart:
    """Curves over steps, as HTML in the colours of the page."""

    def __init__(self) -> None:
        self.figure = new_figure(4.4, 2.6)
        self.axes = self.figure.subplots()

    def plot(self, series: Series, number: int, **style: Any) -> None:
        if series[0]:
            style |= {"marker": "o", "markersize": 3} if len(series[0]) < FEW_POINTS else {}
            self.axes.plot(*_thinned(series), color=_colour(number), **style)

    def html(self, title: str, names: Sequence[str] = ()) -> str:
        """Nothing, where nothing was drawn; ``names`` are what the colours mean."""
        axes = self.axes
        if not axes.lines and not axes.collections:
            return ""
        values = sorted(value for line in axes.lines for value in line.get_ydata())
        if values and values[0] > 0 and values[-1] > LOG_FROM * values[len(values) // 10]:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("step")
        axes.margins(x=0.01)
        file = io.StringIO()
        self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue().partition("<svg")[2].replace("#000000", "currentColor")
        text = re.sub(r"<metadata>.*?</metadata>", "", re.sub(r'<g id="[^"]*">', "<g>", text), flags=re.DOTALL)
        text = re.sub(r"#a0b0c(\d)", r"var(--c\1)", text)
        caption = f"<figcaption>{html.escape(title)}</figcaption>"
        return f"<figure>{caption}<svg{text}<div>{legend(names)}</div></figure>"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _spread_out(values: Sequence[Any], most: int) -> Any:
    """The last of many values, and of those before it evenly spaced ones."""
    return values[::-1][:: -(-len(values) // most) or 1][::-1]


def _thinned(columns: Sequence[list[float]]) -> list[list[float]]:
    return [_spread_out(column, MOST_POINTS) for column in columns]


def legend(names: Iterable[str]) -> str:
    colours = (f"var(--c{number % len(COLOURS)})" for number in count())
    keys = zip(names, colours, strict=False)
    return "".join(f'<span class="key" style="--colour: {its}">{html.escape(name)}</span>' for name, its in keys)


# Pictures


def strip(run: Recorded) -> str:
    """Pictures through the steps side by side, then the real samples that a generator's have on the right."""
    parts = dict[str, Image.Image]()
    for path in _spread_out(run.pictures, MOST_PICTURES):
        try:
            picture, step = Image.open(path).convert("RGB"), int(path.stem.removeprefix("step_"))
        except Exception:  # The file may hold anything.
            run.missing.append(f"{path.name} is no picture")
            continue
        half = -(-picture.width // (2 if run.schema is Config else 1))
        parts.pop("real", None)
        parts[f"step {step:,}"] = picture.crop((0, 0, half, picture.height))
        if half < picture.width:
            parts["real"] = picture.crop((half, 0, picture.width, picture.height))
    figures = []
    for title, part in parts.items():
        part.thumbnail((MOST_PIXELS, MOST_PIXELS))
        image = f'<img alt="{title}" src="{data_uri(part, "JPEG", quality=85)}">'
        figures.append(f"<figure>{image}<figcaption>{title}</figcaption></figure>")
    heading = f"<h2>Samples: {html.escape(run.name)}</h2>"
    return f'{heading}<div class="strip">{"".join(figures)}</div>' if figures else ""


def report(paths: Sequence[Path]) -> str:
    """The page of these runs, which needs no other file and no network."""
    paths = list(dict.fromkeys(paths))
    names = [path.resolve().name for path in paths]
    names = names if len({*names}) == len(names) else list(map(str, paths))
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    matplotlib = require("matplotlib", "the report")
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "drifting"}):
        drawn = "".join(charts(runs))
    parts = {"title": html.escape(" and ".join(names)), "table": table(runs), "charts": drawn}
    parts |= {"legend": legend(names) if len(runs) > 1 else "", "samples": "".join(map(strip, runs))}
    missing = [f"<li>{html.escape(f'{run.name}: {words}')}</li>" for run in runs for words in run.missing]
    parts["missing"] = f'<ul class="faint">{"".join(missing)}</ul>' if missing else ""
    return Template(PAGE.read_text(encoding="utf-8")).substitute(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.report", description="Write a page about one run or several.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directory of drifting.train or pretrain")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default: report.html")
    arguments = parser.parse_args(argv)
    if arguments.out.suffix != ".html":
        raise UserError(f"--out is {arguments.out}, expected a file that ends in .html")
    page = report(arguments.runs)
    with atomic_write(arguments.out) as part:
        part.write_text(page, encoding="utf-8")
    print(f"wrote {arguments.out}: {len(page) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_command(main)
