"""The 2-D experiment: run as a module it writes its pictures; its cases learn their targets, and repeatably."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from drifting.errors import UserError
from drifting.experiments import plane
from drifting.experiments import toy_2d_drifting as toy


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    command = [sys.executable, "-m", "drifting.experiments.toy_2d_drifting", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_as_a_module(tmp_path):
    done = run("--steps", 8, "--out", tmp_path / "toy")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for title in ("middle", "far away", "collapsed", "checkerboard", "swiss roll"):
        assert title in done.stdout
    for name in ("progress.png", "field.png"):
        with Image.open(tmp_path / "toy" / name) as picture:
            picture.load()
            assert min(picture.size) > 500
    with Image.open(tmp_path / "toy" / "evolution.gif") as animation:
        assert animation.n_frames > 1


def test_a_mistake_ends_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = run("--steps", 8, "--out", tmp_path / "file")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path}/file: File exists\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0, expected 1 or more"),
        (["--seed", "-1"], "--seed is -1, expected 0 or more"),
        (["--dataset", "moons"], "moons"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        toy.main(arguments)


@pytest.mark.parametrize("case", toy.CASES[:3], ids=["middle", "far away", "collapsed"])
def test_bimodal_is_learnt_from_every_start(case):
    """Both modes get their share, and the energy distance falls a hundredfold."""
    frames = toy.train(case, steps=250, seed=0)
    start, end = frames[0].samples, frames[-1].samples
    assert frames[-1].step == 250
    assert plane.energy_distance(end, case.target_points) < 0.01 * plane.energy_distance(start, case.target_points)
    share = (end[:, 0] > 0).float().mean()
    assert 0.4 < share < 0.6


def test_training_is_repeatable():
    first, again, other = (toy.train(toy.CASES[-1], steps=20, seed=seed)[-1].samples for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("case", toy.CASES, ids=lambda case: case.title)
def test_starts_where_the_case_says(case):
    start = toy.train(case, steps=1, seed=0)[0].samples
    assert (start.mean(0) - torch.tensor(case.start)).abs().max() < 0.5 * case.spread + 0.1
    assert 0.5 * case.spread < start.std() < 2 * case.spread or case.start[0] != case.start[1]


def test_checkerboard_covers_its_dark_squares():
    points = plane.checkerboard(4000, torch.Generator().manual_seed(0))
    square = ((points + 3) / 1.5).floor().long()
    assert (square.sum(1) % 2 == 0).all() and square.min() == 0 and square.max() == 3
    assert square.unique(dim=0).shape[0] == 8


def test_energy_distance():
    generator = torch.Generator().manual_seed(0)
    x, same, moved = (plane.bimodal(2000, generator) + shift for shift in (0.0, 0.0, 1.0))
    assert plane.energy_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert plane.energy_distance(x, same) < 0.01 < 0.1 < plane.energy_distance(x, moved)
