"""A policy that may pass an obstacle on either side, and learns both by pair.

Each pair has where start and goal lie as its condition, and one path between them, left or right of the obstacle, for
its sample. It prints how the drawn paths pass, and writes a picture of them to ``outputs/policy/``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..cli import ArgumentParser, run_command
from ..errors import UserError
from ..training import create_trainer
from ..utils.figures import new_figure

TIMES = torch.linspace(0, 1, 12)
QUESTIONS = torch.tensor([[0.5, -0.5], [-0.8, -0.8], [0.0, 0.8]])  # Paths are drawn for these starts and goals.
PAIRS, DRAWN = 128, 60  # Those of a step, and the paths that are drawn for each question.


class Policy(nn.Module):
    """Paths ``[B, 12]`` of noise ``[B, 4]`` and conditions ``[B, 2]``."""

    noise_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 12))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        return self.net(torch.cat([z, condition], 1))


def straight(condition: Tensor) -> Tensor:
    """The paths through the obstacle, ``[B, 12]``."""
    return condition[:, :1] * (1 - TIMES) + condition[:, 1:] * TIMES


def demonstrate(condition: Tensor, random: torch.Generator) -> Tensor:
    """One path for each condition, on a side of the obstacle that is chosen at random."""
    side = 2.0 * torch.randint(2, (len(condition), 1), generator=random) - 1
    return straight(condition) + side * torch.sin(torch.pi * TIMES)


def draw(paths: dict[str, Tensor]) -> Any:
    """A figure with a panel for each of these sets of paths."""
    figure = new_figure(6.4, 3)
    for axes, (title, of_questions) in zip(figure.subplots(1, len(paths), sharey=True), paths.items(), strict=True):
        for drawn, line, colour in zip(of_questions.split(DRAWN), straight(QUESTIONS), ("C0", "C1", "C2"), strict=True):
            axes.plot(TIMES, drawn.T, c=colour, alpha=0.25, linewidth=1)
            axes.plot(0.5, line[5:7].mean(), "X", c=colour, markeredgecolor="k", markersize=10)  # It is the obstacle.
        axes.set(title=title, xlabel="time")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.experiments.policy", description="Learn to pass an obstacle.")
    parser.add_argument("--out", type=Path, default=Path("outputs/policy"), help="folder for the picture")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: 3000)")
    options = parser.parse_args(argv)
    if not 1 <= options.steps < 2**63:
        raise UserError(f"--steps is {options.steps}, expected 1 or more")
    new_figure()  # What keeps it from drawing is told before training.
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    trainer = create_trainer(Policy(), "input", 1e-3, "cpu", groups="pairs", gen_per_pair=16, warmup_steps=50)
    for _ in tqdm(range(options.steps), unit="step"):
        condition = 2 * torch.rand(PAIRS, 2, generator=random) - 1
        trainer.train_step(demonstrate(condition, random), condition)
    asked = QUESTIONS.repeat_interleave(DRAWN, 0)
    paths = trainer.generate(len(asked), asked, generator=random)
    middle = (paths - straight(asked))[:, 5:7].mean(1)
    left, right = ((side * middle > 0.5).float().mean().item() for side in (-1, 1))
    draw({"demonstrated": demonstrate(asked, random), "drawn": paths}).savefig(options.out / "policy.png", dpi=80)
    print(f"passes left {left:.2f}, right {right:.2f}, through the obstacle {1 - left - right:.2f}")
    print(f"picture: {options.out / 'policy.png'}")
    return 0


if __name__ == "__main__":
    run_command(main)
