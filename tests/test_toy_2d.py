"""The 2-D experiment: run as a module it writes its pictures; its cases learn their targets, and repeatably."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from drifting.experiments import toy_2d_drifting as toy


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "drifting.experiments.toy_2d_drifting", "--steps", "8", "--out", tmp_path / "toy"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr
    for title in ("middle", "far away", "collapsed", "checkerboard", "swiss roll"):
        assert title in run.stdout
    for name in ("progress.png", "field.png"):
        with Image.open(tmp_path / "toy" / name) as picture:
            picture.load()
            assert min(picture.size) > 500
    with Image.open(tmp_path / "toy" / "evolution.gif") as animation:
        assert animation.n_frames > 1


def trained(case: toy.Case, steps: int, seed: int = 0) -> toy.Case:
    toy.train(case, steps, seed, tqdm(disable=True))
    return case


@pytest.mark.parametrize("index", range(3), ids=["middle", "far away", "collapsed"])
def test_bimodal_is_learnt_from_every_start(index):
    """Both modes get their share, and the energy distance falls a hundredfold."""
    case = trained(toy.make_cases("bimodal")[index], steps=250)
    start, end = case.frames[0], case.frames[250]
    assert toy.energy_distance(end, case.target_points) < 0.01 * toy.energy_distance(start, case.target_points)
    share = (end[:, 0] > 0).float().mean()
    assert 0.4 < share < 0.6


def test_training_is_repeatable():
    first, again = (trained(toy.make_cases("swiss_roll")[0], steps=20, seed=3) for _ in range(2))
    other = trained(toy.make_cases("swiss_roll")[0], steps=20, seed=4)
    assert torch.equal(first.frames[20], again.frames[20])
    assert not torch.equal(first.frames[20], other.frames[20])


def test_starts_where_the_case_says():
    for case in toy.make_cases("all"):
        trained(case, steps=1)
        assert (case.frames[0].mean(0) - torch.tensor(case.start)).abs().max() < 0.5 * case.spread + 0.1
        assert 0.5 * case.spread < case.frames[0].std() < 2 * case.spread or case.start[0] != case.start[1]


def test_checkerboard_covers_its_dark_squares():
    points = toy.checkerboard(4000, torch.Generator().manual_seed(0))
    square = ((points + 3) / 1.5).floor().long()
    assert (square.sum(1) % 2 == 0).all() and square.min() == 0 and square.max() == 3
    assert square.unique(dim=0).shape[0] == 8


def test_energy_distance():
    generator = torch.Generator().manual_seed(0)
    x, same, moved = (toy.bimodal(2000, generator) + shift for shift in (0.0, 0.0, 1.0))
    assert toy.energy_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert toy.energy_distance(x, same) < 0.01 < 0.1 < toy.energy_distance(x, moved)
