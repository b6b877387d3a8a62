"""Six couplings of samples and targets, and one positive a group, side by side: each trains for the same CPU time.

It prints how far the samples end from held-out ones, as a multiple of how far fresh data are, and the steps that the
time was enough for. This table and a picture go to ``outputs/couplings/``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from ..cli import ArgumentParser, run_command
from ..data import load_digits
from ..errors import UserError
from ..models import ResidualMLP
from ..training import create_trainer
from ..utils.figures import new_figure
from .plane import bimodal, checkerboard, energy_distance, swiss_roll

WEIGHTS = {"row": "kernel", "two_sided": "affinity", "sinkhorn": "marginal"}
METHODS: dict[str, dict[str, Any]] = {
    f"{coupling}, {sides}": {"field": {"coupling": coupling, "sides": sides, "weights": weights}}
    for sides in ("joint", "split")
    for coupling, weights in WEIGHTS.items()
} | {"one positive": {"groups": "pairs"}}
PER_PAIR, NUM = 16, 1000  # The generated samples of a pair, and those that are judged.


@dataclass(frozen=True)
class Problem:
    """What to learn, from so many samples of a class in each step, and a share of the samples that tells something."""

    title: str
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # (count, source of randomness) -> samples, labels
    held_out: Tensor
    per_class: int = 128
    temperatures: tuple[float, ...] = (0.05, 0.2)
    classes: int = 1
    time: int = 1  # It has so many times the seconds of the others.
    share: Callable[[Tensor, Tensor], str] = lambda samples, labels: ""

    def train(self, method: dict[str, Any], seconds: float) -> tuple[Tensor, Tensor, int]:
        """Samples of the trained network, their labels, and the steps that were taken."""
        torch.manual_seed(0)
        random = torch.Generator().manual_seed(0)
        trainer = create_trainer(
            ResidualMLP(self.held_out.shape[1:], self.classes, noise_dim=16, width=128), "input", 2e-3, "cpu",
            cfg_scale_range=(1.0, 1.0), class_names=range(self.classes), labels_per_step=self.classes,
            queue_size=2 * self.per_class, gen_per_label=self.per_class, pos_per_label=self.per_class,
            gen_per_pair=PER_PAIR, temperatures=self.temperatures, warmup_steps=20, **method,
        )  # fmt: skip
        batch = self.classes * self.per_class // (PER_PAIR if "groups" in method else 1)
        until = process_time() + seconds * self.time
        while trainer.step == 0 or process_time() < until:
            trainer.train_step(*self.draw(batch, random))
        labels = torch.arange(NUM) % self.classes
        return trainer.generate(NUM, labels, generator=random), labels, trainer.step

    def distance(self, samples: Tensor) -> float:
        return energy_distance(samples.flatten(1), self.held_out.flatten(1))


def unbalanced(count: int, generator: torch.Generator) -> Tensor:
    """Draw from two modes, of which the right one has a tenth of the points."""
    points, right = bimodal(count, generator), torch.rand(count, generator=generator) < 0.1
    return torch.stack([torch.where(right, 1, -1) * points[:, 0].abs(), points[:, 1]], 1)


def in_plane(title: str, target: Callable[[int, torch.Generator], Tensor], **settings: Any) -> Problem:
    def draw(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        return target(count, random), torch.zeros(count, dtype=torch.int64)

    return Problem(title, draw, target(NUM, torch.Generator().manual_seed(2**32)), **settings)


def digits() -> Problem:
    data = load_digits()
    x, y, test = data.train.samples(), data.train.labels, data.test.samples()
    judge = SVC(gamma=0.05).fit(x.flatten(1), y)

    def draw(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        places = torch.randint(len(y), (count,), generator=random)
        return x[places], y[places]

    def share(samples: Tensor, labels: Tensor) -> str:
        return f" {(judge.predict(samples.flatten(1)) == labels.numpy()).mean():.0%} right"

    return Problem("digits", draw, test, 32, classes=10, time=4, share=share)


def problems() -> list[Problem]:
    return [
        in_plane("checkerboard", checkerboard),
        in_plane("low temperature", checkerboard, temperatures=(0.01,)),
        in_plane("few samples", swiss_roll, per_class=16),
        in_plane("unbalanced", unbalanced, share=lambda x, y: f" {(x[:, 0] > 0).float().mean():.0%} of 10%"),
        digits(),
    ]


def picture(rows: dict[str, dict[str, Tensor]]) -> Any:
    """A row for each problem, with the data first; of digits, one of each class."""
    figure = new_figure(10.4, 1.4 * len(rows))
    for of_row, (problem, samples) in zip(figure.subplots(len(rows), 1 + len(METHODS)), rows.items(), strict=True):
        for axes, (title, x) in zip(of_row, samples.items(), strict=True):
            axes.set(xticks=[], yticks=[], aspect="equal", ylabel=problem if title == "data" else "")
            if x.ndim == 2:
                axes.scatter(*x[:500].T, s=1.5, c="C0" if title == "data" else "C1", linewidths=0)
                axes.set(xlim=(-4, 4), ylim=(-4, 4))
            else:
                axes.imshow(x[:10, 0].numpy().reshape(2, 5, 8, 8).swapaxes(1, 2).reshape(16, 40), cmap="gray")
    for axes, title in zip(figure.axes, ["data", *METHODS], strict=False):
        axes.set_title(title, fontsize=9)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.experiments.couplings", description="Compare couplings.")
    parser.add_argument("--out", type=Path, default=Path("outputs/couplings"), help="folder for table and picture")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU time of each run in the plane (default: 3)")
    options = parser.parse_args(argv)
    if not 0 <= options.seconds < 1e6:
        raise UserError(f"--seconds is {options.seconds}, expected 0 or more")
    torch.set_num_threads(1)  # Then CPU time is the time that passes.
    new_figure()  # What keeps it from drawing is told before training.
    options.out.mkdir(parents=True, exist_ok=True)
    columns, rows = [["distance (steps)", *METHODS]], {}
    for problem in problems():
        real, labels = problem.draw(NUM, torch.Generator().manual_seed(1))
        rows[problem.title] = {"data": real[labels.argsort(stable=True)[:: NUM // 10]] if problem.classes > 1 else real}
        columns.append([problem.title])
        for name, method in tqdm(METHODS.items(), desc=problem.title):
            samples, labels, steps = problem.train(method, options.seconds)
            rows[problem.title][name], ratio = samples, problem.distance(samples) / problem.distance(real)
            columns[-1].append(f"{ratio:.1f} ({steps}){problem.share(samples, labels)}")
    widths = [2 + max(map(len, column)) for column in columns]
    lines = ["".join(map(str.ljust, line, widths)).rstrip() for line in zip(*columns, strict=True)]
    (options.out / "table.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    picture(rows).savefig(options.out / "couplings.png", dpi=80)
    print(*lines, f"table and picture: {options.out}", sep="\n")
    return 0


if __name__ == "__main__":
    run_command(main)
