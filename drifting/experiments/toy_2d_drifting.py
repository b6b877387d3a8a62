"""Drifting in the plane: an MLP learns 2-D distributions, from good and from bad starting points.

``python -m drifting.experiments.toy_2d_drifting`` trains five cases and writes to ``outputs/toy_2d/``

- ``progress.png``: generated and target samples as training goes,
- ``field.png``: the drifting field on a grid at the start, on the way, and at the end, where it has all but vanished,
- ``evolution.gif``: all cases in motion,

and prints how far each case ended from held-out target samples. Compare figure 3 of the paper (arXiv 2602.04770).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from drift_ops import drift_field, drift_loss

NOISE_DIM = 2
BATCH = 256  # generated samples a step, and as many target samples
LEARNING_RATE = 1e-2
TEMPERATURES = (0.02, 0.05, 0.2)
NUM_KEPT = 2000  # points kept of the target and of each frame: what the field plot is computed from
NUM_SHOWN = 600  # points drawn
NUM_EVALUATED = 2000
NUM_FRAMES = 48
ARROWS = 20  # along a side of the field plot

TARGET_COLOR, GENERATED_COLOR, ARROW_COLOR = "#0072B2", "#D55E00", "#333333"  # Okabe-Ito: safe for colour-blind eyes


def bimodal(count: int, generator: torch.Generator) -> Tensor:
    """Two Gaussians of standard deviation 0.5 at (±2, 0), equally likely. ``[count, 2]``."""
    side = 2.0 * torch.randint(2, (count, 1), generator=generator) - 1
    centers = torch.cat([2 * side, torch.zeros_like(side)], 1)
    return centers + 0.5 * torch.randn(count, 2, generator=generator)


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """Uniform on the eight dark squares of a 4 × 4 board on [-3, 3]². ``[count, 2]``."""
    column = torch.randint(4, (count,), generator=generator)
    row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
    corner = torch.stack([column, row], 1)
    return 1.5 * (corner + torch.rand(count, 2, generator=generator)) - 3


def swiss_roll(count: int, generator: torch.Generator) -> Tensor:
    """A spiral of one and a half turns with a little noise, radius up to 3.2. ``[count, 2]``."""
    angle = 1.5 * torch.pi * (1 + 2 * torch.rand(count, generator=generator))
    spiral = torch.stack([angle * angle.cos(), angle * angle.sin()], 1) / 4.5
    return spiral + 0.06 * torch.randn(count, 2, generator=generator)


DATASETS = {"bimodal": bimodal, "checkerboard": checkerboard, "swiss_roll": swiss_roll}


@dataclass
class Case:
    """A target and where the generator's samples start; training fills in the rest."""

    title: str
    target: Callable[[int, torch.Generator], Tensor]
    start: tuple[float, float] = (0.0, 0.0)
    spread: float = 0.3  # standard deviation of the generator's first samples
    window: tuple[float, float] = (-4.0, 4.0)  # limits of both axes in every picture
    target_points: Tensor = field(init=False)  # [NUM_KEPT, 2]
    frames: dict[int, Tensor] = field(default_factory=dict)  # step -> generated samples [NUM_KEPT, 2]
    generator: nn.Module = field(init=False)


def make_cases(dataset: str) -> list[Case]:
    """The cases of one dataset, or of all of them."""
    cases = []
    for name in DATASETS if dataset == "all" else (dataset,):
        target, title = DATASETS[name], name.replace("_", " ")
        cases.append(Case(f"{title}, from the middle" if name == "bimodal" else title, target))
        if name == "bimodal":
            cases.append(Case("bimodal, from far away", target, start=(6.0, 6.0), window=(-4.0, 8.0)))
            cases.append(Case("bimodal, collapsed on a mode", target, start=(-2.0, 0.0), spread=0.01))
    return cases


def make_generator(case: Case) -> nn.Sequential:
    """MLP from noise ``[N, NOISE_DIM]`` to points ``[N, 2]``, its output placed where the case starts."""
    sizes = (NOISE_DIM, 128, 128, 128)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    last = nn.Linear(sizes[-1], 2)
    generator = nn.Sequential(*layers, last)
    with torch.no_grad():
        for layer in generator:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="tanh")
                layer.bias.zero_()
        last.weight.mul_(case.spread / generator(torch.randn(1000, NOISE_DIM)).std())
        last.bias.copy_(torch.tensor(case.start))
    return generator


def train(case: Case, steps: int, seed: int, progress: tqdm) -> None:
    """Train the case's generator, keeping samples of a fixed noise for the pictures."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    case.generator = make_generator(case)
    case.target_points = case.target(NUM_KEPT, random)
    frame_noise = torch.randn(NUM_KEPT, NOISE_DIM, generator=random)
    optimizer = torch.optim.Adam(case.generator.parameters(), LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.05)
    kept_steps = steps_to_keep(steps)
    progress.set_description(case.title)
    for step in range(steps + 1):
        if step in kept_steps:
            with torch.no_grad():
                case.frames[step] = case.generator(frame_noise)
        if step == steps:
            break
        x = case.generator(torch.randn(BATCH, NOISE_DIM, generator=random))
        y = case.target(BATCH, random)
        loss, _ = drift_loss(x.unsqueeze(0), y.unsqueeze(0), R_list=TEMPERATURES, affinity_floor=0.0)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        progress.update()


def steps_to_keep(steps: int) -> list[int]:
    """The first step, the last, and some between, denser at the start, where most happens."""
    return sorted({round(steps * (i / (NUM_FRAMES - 1)) ** 2) for i in range(NUM_FRAMES)})


def energy_distance(x: Tensor, y: Tensor) -> float:
    """``2 E‖x−y‖ − E‖x−x'‖ − E‖y−y'‖`` of two sets of points: 0 for the same distribution, up to sampling noise."""
    return (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()


def closing_table(cases: list[Case], seed: int) -> str:
    """Energy distances to held-out target samples, and the floor: what fresh target samples reach, a mean of four."""
    random = torch.Generator().manual_seed(seed + 1)
    lines = [f"{'energy distance to held-out data':<34}{'start':>9}{'final':>9}{'floor':>9}{'final/floor':>13}"]
    for case in cases:
        held_out = case.target(NUM_EVALUATED, random)
        with torch.no_grad():
            generated = case.generator(torch.randn(NUM_EVALUATED, NOISE_DIM, generator=random))
        start, final = energy_distance(case.frames[0], held_out), energy_distance(generated, held_out)
        floor = sum(energy_distance(case.target(NUM_EVALUATED, random), held_out) for _ in range(4)) / 4
        lines.append(f"{case.title:<34}{start:>9.4f}{final:>9.4f}{floor:>9.4f}{final / floor:>13.1f}")
    return "\n".join(lines)


def scatter(axes: Axes, case: Case, generated: Tensor) -> None:
    """One panel: target samples under generated ones."""
    for points, color, alpha, label in (
        (case.target_points, TARGET_COLOR, 0.4, "target"),
        (generated, GENERATED_COLOR, 0.7, "generated"),
    ):
        x, y = points[:NUM_SHOWN].T
        axes.scatter(x, y, s=4, c=color, alpha=alpha, linewidths=0, label=label)
    ticks = np.arange(case.window[0], case.window[1] + 1, 2)
    axes.set(xlim=case.window, ylim=case.window, xticks=ticks, yticks=ticks, aspect="equal")
    axes.tick_params(labelsize=7)


def snapshot_figure(cases: list[Case], shares: tuple[float, ...], title: str, size: float) -> Figure:
    """One row a case, one column a moment, at the given shares of the kept steps; one panel's axes like the next's."""
    shape = len(cases), len(shares)
    figure = Figure(figsize=(size * shape[1], size * shape[0] + 0.6), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False)
    for case, row in zip(cases, panels, strict=True):
        steps = sorted(case.frames)
        for share, axes in zip(shares, row, strict=True):
            step = steps[round(share * (len(steps) - 1))]
            scatter(axes, case, case.frames[step])
            axes.set_title(f"step {step}", fontsize=9)
        row[0].set_ylabel(case.title, fontsize=9)
    add_legend(figure, title)
    return figure


def add_legend(figure: Figure, title: str) -> None:
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=2, markerscale=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)


def save_progress(cases: list[Case], path: Path) -> None:
    figure = snapshot_figure(cases, (0, 0.15, 0.3, 0.5, 1), "Training progress", size=2.4)
    figure.savefig(path, dpi=100)


def save_field(cases: list[Case], path: Path) -> None:
    """The field between all kept samples, on a grid; the arrows of a row share one scale."""
    shares = (0, 0.3, 1)
    figure = snapshot_figure(cases, shares, "Drifting field V: attraction by data − repulsion by samples", size=3.4)
    panels = iter(figure.axes)
    for case in cases:
        low, high = case.window
        ticks = torch.linspace(low, high, 2 * ARROWS + 1)[1::2]
        points = torch.cartesian_prod(ticks, ticks)  # [ARROWS², 2]
        steps = sorted(case.frames)
        fields = [field_at(points, case, steps[round(share * (len(steps) - 1))]) for share in shares]
        longest = max(V.norm(dim=-1).max().item() for V in fields)
        scale = longest / (0.15 * (high - low))
        for V in fields:
            next(panels).quiver(
                *points.T, *V.T, color=ARROW_COLOR, width=0.004, angles="xy", scale_units="xy", scale=scale
            )
    figure.savefig(path, dpi=100)


def field_at(points: Tensor, case: Case, step: int) -> Tensor:
    """The field ``[N, 2]`` at ``points [N, 2]`` for the samples of one step, at the loss's largest temperature."""
    data, samples = case.target_points, case.frames[step]
    mean_distance = torch.cdist(samples, torch.cat([samples, data])).mean().item()  # the unit of the loss's R
    return drift_field(points, data, samples, temperature=TEMPERATURES[-1] * mean_distance, include_self=False)


def save_animation(cases: list[Case], path: Path) -> None:
    """All cases side by side, moving from the first step to the last."""
    figure = Figure(figsize=(2.4 * len(cases), 2.9), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for case, axes in zip(cases, panels, strict=True):
        scatter(axes, case, case.frames[0])
        axes.set_title(case.title, fontsize=9)
        axes.set(xticks=[], yticks=[])
    add_legend(figure, "step 0")
    canvas.draw()
    figure.set_layout_engine("none")  # laid out once, not for every frame
    pictures = []
    for step in sorted(cases[0].frames):
        figure.suptitle(f"step {step}", x=0.01, ha="left", fontsize=11)
        for case, axes in zip(cases, panels, strict=True):
            axes.collections[1].set_offsets(case.frames[step][:NUM_SHOWN])
        canvas.draw()
        pictures.append(Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB").quantize(64))
    durations = [80] * (len(pictures) - 1) + [1500]  # in ms; stay on the result before looping
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("outputs/toy_2d"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", choices=("all", *DATASETS), default="all")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, expected 1 or more")
    torch.set_num_threads(1)  # faster than two on matrices this small
    options.out.mkdir(parents=True, exist_ok=True)
    cases = make_cases(options.dataset)
    with tqdm(total=options.steps * len(cases), unit="step") as progress:
        for case in cases:
            train(case, options.steps, options.seed, progress)
    save_progress(cases, options.out / "progress.png")
    save_field(cases, options.out / "field.png")
    save_animation(cases, options.out / "evolution.gif")
    print(closing_table(cases, options.seed))
    print(f"pictures: {options.out}/progress.png, field.png, evolution.gif")


if __name__ == "__main__":
    main()
