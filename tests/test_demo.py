"""The page of ``drifting.demo``: what it draws, and that a browser shows it."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from drifting import demo, train
from drifting.cli import run_command
from drifting.data import load_digits
from drifting.demo import FRAMES, Choice, between, draw, draw_path, nearest, training_images
from drifting.evaluation.drawing import draw_samples
from drifting.generation import Generator
from drifting.hub.run_directory import save_generator
from drifting.hub.sources import load_generator
from drifting.utils.images import enlarged, grid, to_uint8

CHROMIUM = "/usr/bin/chromium"
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
SMALL = ["model.patch_size=4", "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "model.num_style_tokens=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps, whose network takes labels, guidance scales and style codes, and shows that it does."""
    out = tmp_path_factory.mktemp("demo") / "<b>run"
    train.main(["--out", str(out), "model=drifting_dit", *SMALL, "train.steps=2", "step.gen_per_label=4",
                "evaluation.num_samples=20"])  # fmt: skip
    generator = load_generator(out)
    torch.manual_seed(0)
    for parameter in generator.model.parameters():  # Those that begin as zeros would hide all but the noise.
        parameter.data += 0.2 * torch.randn_like(parameter)
    save_generator(demo.RunDirectory(out), generator)
    return out


@pytest.fixture(scope="module")
def generator(run) -> Generator:
    return load_generator(run)


def test_each_choice_shows(generator):
    choice = Choice(-1, 1.0, 0, 0)
    images, milliseconds = draw(generator, choice, 20)
    assert images.shape == (20, 8, 8, 1) and images.dtype == np.uint8 and milliseconds > 0
    for change in ({"label": 3}, {"cfg_scale": 3.0}, {"seed": 1}, {"style": 1}):
        assert (draw(generator, replace(choice, **change), 20)[0] != images).any(), change
    assert choice.numbers(generator, range(8, 12)).tolist() == [8, 9, 0, 1]
    assert replace(choice, label=3).numbers(generator, range(8, 12)).tolist() == [3, 3, 3, 3]


def test_samples_are_those_of_the_command(generator):
    """Where both seeds are the same, as ``drifting.sample --seed`` has but one."""
    expected = draw_samples(generator, torch.arange(20) % 10, 1.5, seed=7).astype(int)
    assert abs(draw(generator, Choice(-1, 1.5, 7, 7), 20)[0] - expected).max() <= 1  # Batches differ by a rounding.


def test_a_path_leads_from_one_sample_to_the_other(generator):
    choice = Choice(-1, 1.0, 0, 5)
    path = draw_path(generator, choice, 13, 1).astype(int)
    assert path.shape == (FRAMES, 8, 8, 1)
    ends = [draw(generator, replace(choice, seed=seed), 20)[0][13].astype(int) for seed in (0, 1)]
    assert abs(path[0] - ends[0]).max() <= 1 and abs(path[-1] - ends[1]).max() <= 1
    assert abs(np.diff(path, axis=0)).max() < abs(ends[0] - ends[1]).max()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1,), (500,)])
def test_noise_between_is_as_long_as_noise(shape):
    start, end = torch.randn(2, 1, *shape).unbind()
    shares = torch.linspace(0, 1, 5)
    points = between(start, end, shares)
    torch.testing.assert_close(points[[0, -1]], torch.cat([start, end]))
    assert (between(start, start, shares) - start).abs().max() < 1e-6
    if points[0].numel() > 100:
        lengths = points.flatten(1).norm(dim=1)
        assert lengths.min() > 0.95 * min(lengths[0], lengths[-1])


def test_nearest_training_images(run, generator):
    dataset = load_digits()
    images = to_uint8(dataset.train.samples(), dataset.pixel_range)
    assert (training_images(str(run), generator) == images).all()
    changed = images[42].copy()
    changed[0, 0] ^= 255
    indices, distances = nearest(changed, images, 3)
    assert indices[0] == 42 and distances[0] == pytest.approx(16) and distances == sorted(distances)


def test_pictures(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    assert (np.asarray(enlarged(images[0], sharp=True))[3::6, 3::6] == images[0, ..., 0]).all()
    assert grid(images, 3, sharp=True).size == (3 * 52 + 4, 2 * 52 + 4)
    with Image.open(demo.animate(images, tmp_path / "path.gif")) as animation:
        assert animation.n_frames == 8 and animation.info["loop"] == 0


class Plane(nn.Module):
    noise_shape = (2,)

    def forward(self, z):
        return z


def test_mistakes_are_one_line(run, tmp_path, capsys, monkeypatch):
    facts = {"noise_shape": (2,), "sample_shape": (2,), "arguments": {}}
    save_generator(demo.RunDirectory(tmp_path / "plane"), Generator(Plane(), name="test_demo:Plane", **facts))
    monkeypatch.setattr(demo, "require", lambda *names: None)
    monkeypatch.setattr(demo, "build_page", Mock(**{"return_value.launch.side_effect": OSError("no empty port")}))
    for arguments, expected in (
        ([tmp_path / "none"], "there is no run directory"),
        ([run, "--port", "70000"], "--port is 70000, expected 1 to 65535"),
        ([run, "--port", "80"], "--port is 80, which cannot be had .*: choose another"),
        ([tmp_path / "plane"], "name it with --model test_demo:Plane"),
        ([tmp_path / "plane", "--model", "test_demo:Plane"], r"makes samples \[2\]: the demo shows images only"),
    ):
        with pytest.raises(SystemExit) as caught:
            run_command(lambda arguments=arguments: demo.main(list(map(str, arguments))))
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1 and re.search(expected, error), error


def test_data_that_are_not_there(run, generator, tmp_path, capsys):
    assert training_images("hf://latent_L", generator) is None
    for data in ("mnist\n  path: /nowhere", "somebody:Data"):
        (tmp_path / "config.yaml").write_text(f"data:\n  name: {data}\n", encoding="utf-8")
        assert training_images(str(tmp_path), generator) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("the nearest training images are left out: ") for line in lines)


@contextmanager
def served(run: Path):
    """The process of the command, and the address that it says."""
    command, root = [sys.executable, "-m", "drifting.demo", str(run)], str(Path(__file__).parents[1])
    environ = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, re.search(r"http://\S+", process.stdout.readline())[0]
        finally:
            process.kill()


def test_in_a_browser(run, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("gradio")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with served(run) as (process, address), playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page, told, asked = browser.new_page(), [], []
        page.set_default_timeout(120_000)  # A busy machine takes long.
        page.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)

        def source(of: str) -> str:
            return page.locator(f"#{of} img").get_attribute("src")

        def changed(of: str, before: str) -> None:
            page.wait_for_function(f"document.querySelector('#{of} img').src != '{before}'")

        page.locator("#moving img").wait_for()
        assert page.locator("h2").inner_text() == str(run)
        for label in ("guidance scale", "seed of the noise", "seed of the style codes", "images"):
            before = source("samples")
            slider = page.get_by_label(re.compile(f"range slider for {label}"))
            slider.press("ArrowLeft" if label == "images" else "ArrowRight")
            changed("samples", before)
        page.get_by_text(re.compile(r"79 images in [0-9.]+ ms")).wait_for()
        before, moving = page.locator("#nearest img").first.get_attribute("src"), source("moving")
        page.locator("#samples img").click(position={"x": 100, "y": 100})
        page.wait_for_function("document.querySelector('#sample input').value != '0'")
        changed("nearest", before)
        changed("moving", moving)
        with page.expect_download() as download:
            page.get_by_text("Download samples as .npz").click()
        download.value.save_as(tmp_path / "samples.npz")
        browser.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stderr.read() == "interrupted\n"
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (79, 8, 8, 1) and archive["arr_1"].tolist() == [n % 10 for n in range(79)]
    assert told == [] and all(url.startswith((address, "data:")) for url in asked), (told, asked)
