"""Drifting in the plane: an MLP learns 2-D distributions, from good and from bad starting points.

``python -m drifting.experiments.toy_2d_drifting`` trains five cases, prints how far each ended from held-out samples,
and writes three pictures to ``outputs/toy_2d/``: ``progress.png`` shows the samples at five moments, ``field.png`` the
drifting field, which all but vanishes, and ``evolution.gif`` all cases in motion. Compare figure 3 of the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from drift_ops import drift_field, drift_loss

from ..cli import ArgumentParser, run_command
from ..errors import UserError, reason
from .plane import NUM_SHOWN, Distribution, bimodal, checkerboard, energy_distance, scatter, swiss_roll

NOISE_DIM = 2
BATCH = 256  # A step generates this many samples and draws as many from the target.
LEARNING_RATE = 1e-2
TEMPERATURES = (0.02, 0.05, 0.2)
NUM_POINTS = 2000  # Field and energy distances are computed from this many samples, and as many of the target.
NUM_FRAMES = 48
ARROWS = 20  # The field plot has this many arrows along a side.


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


def make_generator(case: Case) -> nn.Sequential:
    """Return an MLP from noise ``[N, NOISE_DIM]`` to points ``[N, 2]`` that lie where the case starts."""
    last = nn.Linear(128, 2)
    generator = nn.Sequential(
        nn.Linear(NOISE_DIM, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), last
    )
    with torch.no_grad():
        for parameter in generator.parameters():
            nn.init.kaiming_normal_(parameter, nonlinearity="tanh") if parameter.ndim == 2 else parameter.zero_()
        last.weight.mul_(case.spread / generator(torch.randn(1000, NOISE_DIM)).std())
        last.bias.copy_(torch.tensor(case.start))
    return generator


def train(case: Case, steps: int, seed: int) -> list[Frame]:
    """Train a generator for the case; return frames of the first step, the last, and some between."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    generator = make_generator(case)
    noise = torch.randn(NUM_POINTS, NOISE_DIM, generator=random)
    optimizer = torch.optim.Adam(generator.parameters(), LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.05)
    progress = tqdm(total=steps, desc=case.title, unit="step")
    kept_steps = sorted({round(steps * (i / (NUM_FRAMES - 1)) ** 2) for i in range(NUM_FRAMES)})  # More of them early.
    frames = []
    for step, next_step in pairwise([*kept_steps, steps]):
        with torch.no_grad():
            frames.append(Frame(case, step, generator(noise)))
        for _ in range(step, next_step):
            x = generator(torch.randn(BATCH, NOISE_DIM, generator=random))
            y = case.target(BATCH, random)
            loss, _ = drift_loss(x.unsqueeze(0), y.unsqueeze(0), R_list=TEMPERATURES, affinity_floor=0.0)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
            progress.update()
    progress.close()
    return frames


def closing_table(results: Sequence[list[Frame]], seed: int) -> str:
    """Return a table of energy distances to held-out samples; the floor is the mean of four fresh target samples."""
    random = torch.Generator().manual_seed(seed + 1)
    lines = [f"{'energy distance to held-out data':<34}{'start':>9}{'final':>9}{'floor':>9}{'final/floor':>13}"]
    for frames in results:
        target = frames[0].case.target
        held_out = target(NUM_POINTS, random)
        start, final = (energy_distance(frame.samples, held_out) for frame in (frames[0], frames[-1]))
        floor = sum(energy_distance(target(NUM_POINTS, random), held_out) for _ in range(4)) / 4
        lines.append(f"{frames[0].case.title:<34}{start:>9.4f}{final:>9.4f}{floor:>9.4f}{final / floor:>13.1f}")
    return "\n".join(lines)


def at_moments(frames: list[Frame], shares: Sequence[float]) -> list[Frame]:
    """Return the frames at these shares of them all: the first for 0, the last for 1."""
    return [frames[round(share * (len(frames) - 1))] for share in shares]


def draw(rows: Sequence[list[Frame]], title: str, size: float) -> Figure:
    """Return a figure with a panel for each frame, ``size`` inches wide."""
    shape = len(rows), len(rows[0])
    figure = Figure(figsize=(size * shape[1], size * shape[0] + 0.6), layout="constrained")
    for frame, axes in zip(sum(rows, []), figure.subplots(*shape, squeeze=False).flat, strict=True):
        scatter(axes, frame.case.target_points, frame.samples, frame.case.window)
        axes.set_title(f"{frame.case.title}\nstep {frame.step}", fontsize=8)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=2, markerscale=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def field_at(points: Tensor, frame: Frame) -> Tensor:
    """Return the field ``[N, 2]`` at ``points [N, 2]``, at the largest temperature of the loss."""
    data, samples = frame.case.target_points, frame.samples
    mean_distance = torch.cdist(samples, torch.cat([samples, data])).mean().item()  # The loss has its R in this unit.
    return drift_field(points, data, samples, temperature=TEMPERATURES[-1] * mean_distance, include_self=False)


def draw_field(rows: Sequence[list[Frame]]) -> Figure:
    """Return a figure of the field on a grid; the arrows of a row have one scale."""
    figure = draw(rows, "Drifting field V: attraction by data − repulsion by samples", size=3.4)
    panels = iter(figure.axes)
    for row in rows:
        low, high = row[0].case.window
        ticks = torch.linspace(low, high, 2 * ARROWS + 1)[1::2]
        points = torch.cartesian_prod(ticks, ticks)  # [ARROWS², 2]
        fields = [field_at(points, frame) for frame in row]
        scale = max(V.norm(dim=-1).max().item() for V in fields) / (0.15 * (high - low))
        for V in fields:
            arrows = {"angles": "xy", "scale_units": "xy", "scale": scale, "width": 0.004, "color": "#333333"}
            next(panels).quiver(*points.T, *V.T, **arrows)
    return figure


def save_animation(results: Sequence[list[Frame]], path: Path) -> None:
    """Write a GIF of all cases side by side."""
    figure = draw([[frames[0] for frames in results]], "Training", size=2.4)
    figure.set_dpi(80)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # The first layout serves all pictures.
    pictures = []
    for frames in zip(*results, strict=True):
        for frame, axes in zip(frames, figure.axes, strict=True):
            axes.collections[1].set_offsets(frame.samples[:NUM_SHOWN])
            axes.set_title(f"{frame.case.title}\nstep {frame.step}", fontsize=8)
        canvas.draw()
        pictures.append(Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB").quantize(64))
    durations = [80] * (len(pictures) - 1) + [1500]  # The last picture stays for longer, in ms.
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.experiments.toy_2d_drifting", description="Drift in the plane.")
    parser.add_argument("--out", type=Path, default=Path("outputs/toy_2d"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each case (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", choices=("all", "bimodal", "checkerboard", "swiss_roll"), default="all")
    options = parser.parse_args(argv)
    if options.steps < 1:
        raise UserError(f"--steps is {options.steps}, expected 1 or more")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed is {options.seed}, expected 0 or more, below 2**63")
    cases = [case for case in CASES if options.dataset in ("all", case.target.__name__)]
    torch.set_num_threads(1)  # Two threads would be slower on matrices this small.
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = [train(case, options.steps, options.seed) for case in cases]
        rows = [at_moments(frames, (0, 0.15, 0.3, 0.5, 1)) for frames in results]
        draw(rows, "Training progress", size=2.4).savefig(options.out / "progress.png")
        draw_field([at_moments(frames, (0, 0.3, 1)) for frames in results]).savefig(options.out / "field.png")
        save_animation(results, options.out / "evolution.gif")
    except OSError as error:
        raise UserError(f"cannot write pictures to {options.out} ({reason(error)}): choose another --out") from error
    print(closing_table(results, options.seed))
    print(f"pictures: {options.out}/progress.png, field.png, evolution.gif")
    return 0


if __name__ == "__main__":
    run_command(main)
