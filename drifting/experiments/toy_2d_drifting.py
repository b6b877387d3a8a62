"""Drifting in the plane: an MLP learns 2-D distributions, from good and from bad starting points.

It prints how far each of five cases ended from held-out samples, and writes three pictures to ``outputs/toy_2d/``:
``progress.png`` shows the samples at five moments, ``field.png`` the drifting field, which all but vanishes, and
``evolution.gif`` all cases in motion. Compare figure 3 of the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from drift_ops import drift_field, drift_loss

from ..cli import ArgumentParser, run_command
from ..errors import UserError
from ..utils.figures import new_figure
from .plane import Distribution, bimodal, checkerboard, energy_distance, swiss_roll

NOISE_DIM = 2
BATCH = 256  # A step generates this many samples and draws as many from the target.
LEARNING_RATE = 1e-2
TEMPERATURES = (0.02, 0.05, 0.2)
NUM_POINTS = 2000  # Field and energy distances are computed from this many samples, and as many of the target.
NUM_FRAMES = 48
MOMENTS = (0, 0.15, 0.3, 0.5, 1)  # The pictures show the samples after these shares of all frames.
NUM_SHOWN = 600  # A picture shows at most this many points of a set.
ARROWS = 20  # The field plot has this many arrows along a side.
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito chose these colours for colour-blind eyes.


@dataclass(frozen=True)
class Case:
    """A target distribution, and where the samples of the untrained generator lie."""

    title: str
    target: Distribution
    start: tuple[float, float] = (0.0, 0.0)  # The first samples have this mean …
    spread: float = 0.3  # … and this standard deviation.
    window: tuple[float, float] = (-4.0, 4.0)  # Both axes of every picture have these limits.

    @property
    def target_points(self) -> Tensor:
        """Samples of the target for the pictures, always the same, ``[NUM_POINTS, 2]``."""
        return self.target(NUM_POINTS, torch.Generator().manual_seed(0))


CASES = (
    Case("bimodal, from the middle", bimodal),
    Case("bimodal, from far away", bimodal, start=(6.0, 6.0), window=(-4.0, 8.0)),
    Case("bimodal, collapsed on a mode", bimodal, start=(-2.0, 0.0), spread=0.01),
    Case("checkerboard", checkerboard),
    Case("swiss roll", swiss_roll),
)


@dataclass(frozen=True)
class Frame:
    """The samples ``[NUM_POINTS, 2]`` that a generator makes of one fixed noise after a number of steps."""

    case: Case
    step: int
    samples: Tensor


def train(case: Case, steps: int, seed: int) -> list[Frame]:
    """Train a generator for the case; return frames of the first step, the last, and some between."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    last = nn.Linear(128, 2)
    generator = nn.Sequential(
        nn.Linear(NOISE_DIM, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), last
    )
    with torch.no_grad():  # The first samples lie where the case starts.
        for parameter in generator.parameters():
            nn.init.kaiming_normal_(parameter, nonlinearity="tanh") if parameter.ndim == 2 else parameter.zero_()
        last.weight.mul_(case.spread / generator(torch.randn(1000, NOISE_DIM)).std())
        last.bias.copy_(torch.tensor(case.start))
    noise = torch.randn(NUM_POINTS, NOISE_DIM, generator=random)
    optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.05)
    kept_steps = {round(steps * (i / (NUM_FRAMES - 1)) ** 2) for i in range(NUM_FRAMES)}  # More of them are early.
    frames = [Frame(case, 0, generator(noise).detach())]
    for step in tqdm(range(1, steps + 1), desc=case.title, unit="step"):
        x = generator(torch.randn(BATCH, NOISE_DIM, generator=random))
        y = case.target(BATCH, random)
        loss, _ = drift_loss(x.unsqueeze(0), y.unsqueeze(0), R_list=TEMPERATURES, affinity_floor=0.0)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
        if step in kept_steps:
            frames.append(Frame(case, step, generator(noise).detach()))
    return frames


def draw(rows: Sequence[list[Frame]], title: str, size: float) -> Any:
    """Return a figure with a panel for each frame, ``size`` inches wide."""
    figure = new_figure(size * len(rows[0]), size * len(rows) + 0.6)
    for frame, axes in zip(sum(rows, []), figure.subplots(len(rows), len(rows[0]), squeeze=False).flat, strict=True):
        axes.scatter(*frame.case.target_points[:NUM_SHOWN].T, s=4, c=BLUE, alpha=0.4, linewidths=0, label="target")
        axes.scatter(*frame.samples[:NUM_SHOWN].T, s=4, c=ORANGE, alpha=0.7, linewidths=0, label="generated")
        axes.set(xlim=frame.case.window, ylim=frame.case.window, aspect="equal")
        axes.tick_params(labelsize=7)
        axes.set_title(f"{frame.case.title}\nstep {frame.step}", fontsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, markerscale=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def draw_field(rows: Sequence[list[Frame]]) -> Any:
    """Return a figure of the field on a grid; the arrows of a row have one scale."""
    figure = draw(rows, "Drifting field V: attraction by data − repulsion by samples", size=3.4)
    panels = iter(figure.axes)
    for row in rows:
        low, high = row[0].case.window
        ticks = torch.linspace(low, high, 2 * ARROWS + 1)[1::2]
        points = torch.cartesian_prod(ticks, ticks)  # [ARROWS², 2]
        fields = []
        for frame in row:
            data, samples = frame.case.target_points, frame.samples
            unit = torch.cdist(samples, torch.cat([samples, data])).mean().item()  # The loss has its R in this unit.
            fields.append(drift_field(points, data, samples, temperature=TEMPERATURES[-1] * unit, include_self=False))
        scale = max(V.norm(dim=-1).max().item() for V in fields) / (0.15 * (high - low))
        for V in fields:
            next(panels).quiver(*points.T, *V.T, angles="xy", scale_units="xy", scale=scale, width=0.004, color="#333")
    return figure


def save_animation(results: Sequence[list[Frame]], path: Path) -> None:
    """Write a GIF of all cases side by side."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure = draw([[frames[0] for frames in results]], "Training", size=2.4)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # The first layout serves all pictures.

    def show(index: int) -> None:
        for frames, axes in zip(results, figure.axes, strict=True):
            axes.collections[1].set_offsets(frames[index].samples[:NUM_SHOWN])
            axes.set_title(f"{frames[index].case.title}\nstep {frames[index].step}", fontsize=8)

    indices = [*range(len(results[0])), *[-1] * 12]  # The last picture stays for a second.
    FuncAnimation(figure, show, indices).save(path, PillowWriter(fps=12), dpi=80)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.experiments.toy_2d_drifting", description="Drift in the plane.")
    parser.add_argument("--out", type=Path, default=Path("outputs/toy_2d"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each case (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", choices=("all", "bimodal", "checkerboard", "swiss_roll"), default="all")
    options = parser.parse_args(argv)
    for name, least in (("steps", 1), ("seed", 0)):
        if not least <= vars(options)[name] < 2**63:
            raise UserError(f"--{name} is {vars(options)[name]}, expected {least} or more, below 2**63")
    torch.set_num_threads(1)  # Two threads would be slower on matrices this small.
    new_figure()  # What keeps it from drawing is told before training.
    options.out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if options.dataset in ("all", case.target.__name__)]
    results = [train(case, options.steps, options.seed) for case in cases]
    rows = [[frames[round(moment * (len(frames) - 1))] for moment in MOMENTS] for frames in results]
    draw(rows, "Training progress", size=2.4).savefig(options.out / "progress.png")
    draw_field([row[::2] for row in rows]).savefig(options.out / "field.png")
    save_animation(results, options.out / "evolution.gif")
    random = torch.Generator().manual_seed(options.seed + 1)
    print(f"{'energy distance to held-out data':<34}{'start':>9}{'final':>9}{'floor':>9}{'final/floor':>13}")
    for case, frames in zip(cases, results, strict=True):
        held_out = case.target(NUM_POINTS, random)
        start, final = (energy_distance(frame.samples, held_out) for frame in (frames[0], frames[-1]))
        floor = sum(energy_distance(case.target(NUM_POINTS, random), held_out) for _ in range(4)) / 4
        print(f"{case.title:<34}{start:>9.4f}{final:>9.4f}{floor:>9.4f}{final / floor:>13.1f}")
    print(f"pictures: {options.out}/progress.png, field.png, evolution.gif")
    return 0


if __name__ == "__main__":
    run_command(main)
