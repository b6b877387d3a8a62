"""``python -m drifting.demo RUN|hf://NAME`` serves a page to play with a generator, on this machine alone."""

import html
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cli import ArgumentParser, run_command
from .config import Config, read_config
from .data import open_dataset
from .errors import UserError, require
from .evaluation.archives import Samples, write_samples
from .evaluation.drawing import draw_inputs, render
from .evaluation.features import PIXEL_SCALE
from .generation import Generator, Signature, label_numbers
from .hub.run_directory import RunDirectory
from .hub.sources import load_generator
from .hub.vae import require_vae
from .utils.images import GAP, data_uri, enlarged, enlargement, grid, to_uint8
from .utils.named import import_named, is_own

HOST, SEEDS = "127.0.0.1", 1000  # Sliders have this many seeds.
SHOWN = 96  # Images are at least so high: Gradio mistakes where a picture was clicked if the page enlarges it.
FRAMES, STRIP, NEAREST = 25, 9, 7  # A path has so many images, of which a strip shows some.
MOST_VALUES = 2**28  # Training images of more values are not compared with.
KEPT = (600, 3600)  # Pictures are kept on disk for an hour, and looked through every ten minutes.
CSS = """
.gradio-container {width: 100%; max-width: 1240px !important; margin: auto !important}
.picture {padding-top: 32px !important}  /* Label and buttons would lie on the picture. */
.picture .image-container {position: static}
.picture .image-frame, .picture img {width: 100%; object-fit: contain}
#moving img {max-width: 192px}
.sharp:not(#samples) img {image-rendering: pixelated}
#nearest {display: grid; grid-template-columns: repeat(auto-fill, minmax(68px, 1fr)); gap: 8px; text-align: center}
#nearest figure {margin: 0}
#nearest img {width: 100%; aspect-ratio: 1}
"""


@dataclass(frozen=True)
class Choice:
    """What to draw: ``label`` is a class number, and -1 is all of them in turn; ``style`` seeds the style codes."""

    label: int
    cfg_scale: float
    seed: int
    style: int

    def numbers(self, generator: Generator, samples: range) -> Tensor:
        """The class numbers ``[N]`` of these samples."""
        numbers = torch.tensor(samples, device="cpu") % len(generator.class_names)
        return numbers if self.label < 0 else torch.full_like(numbers, self.label)

    def inputs(self, generator: Generator, samples: range) -> dict[str, Tensor]:
        """The noise of these samples follows from the seed, and what else they draw from ``style``."""
        return draw_inputs(generator, self.style, samples) | {"z": draw_inputs(generator, self.seed, samples)["z"]}


def draw(generator: Generator, choice: Choice, num: int) -> tuple[Samples, float]:
    """Images uint8 ``[num, H, W, C]``, and the milliseconds that the network took."""
    drawn, numbers = choice.inputs(generator, range(num)), choice.numbers(generator, range(num))
    start = time.perf_counter()
    return render(generator, drawn, numbers, choice.cfg_scale), 1000 * (time.perf_counter() - start)


def draw_path(generator: Generator, choice: Choice, sample: int, seed: int) -> Samples:
    """Images ``[FRAMES, H, W, C]`` on the way from one noise of a sample to that of another ``seed``."""
    here = range(sample, sample + 1)
    drawn = {name: value.expand(FRAMES, *value.shape[1:]) for name, value in choice.inputs(generator, here).items()}
    end = draw_inputs(generator, seed, here)["z"]
    drawn["z"] = between(drawn["z"][:1], end, torch.linspace(0, 1, FRAMES, device="cpu"))
    return render(generator, drawn, choice.numbers(generator, here).expand(FRAMES), choice.cfg_scale)


def between(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Points ``[F, …]`` at these ``shares [F]`` of the way from one noise ``[1, …]`` to another, along a great circle:
    in many dimensions Gaussian noise is near a sphere, and the middle of a straight line is not."""
    t = shares.view(-1, *[1] * (start.ndim - 1))
    angle = torch.cosine_similarity(start.flatten(), end.flatten(), dim=0).clamp(-1, 1).acos()
    if angle.sin() < 1e-3:  # They are on one line, on which there is no circle to follow.
        return start + t * (end - start)
    return (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / angle.sin()


def nearest(image: Samples, training: Samples, num: int = NEAREST) -> tuple[list[int], list[float]]:
    """Which of the ``training`` images ``[N, H, W, C]`` are nearest to one ``[H, W, C]``, and at what distance: the
    Euclidean one of pixels from 0 to 16, as ``nearest_distance`` of an evaluation is."""
    points = torch.from_numpy(training).flatten(1).float()
    found = (points - torch.from_numpy(image).flatten().float()).norm(dim=1).topk(min(num, len(points)), largest=False)
    return found.indices.tolist(), (found.values * PIXEL_SCALE).tolist()


def training_images(source: str, generator: Generator) -> Samples | None:
    """The training images ``[N, H, W, C]`` of a run, or None, and a line on stderr that says why."""
    try:
        path = RunDirectory(Path(source)).config
        if not path.is_file():
            raise UserError(f"{source} does not say what it was trained on")
        config = read_config(str(path), (), Config)
        if is_own(config.data.name):
            raise UserError(f"the data are {config.data.name}, which a run directory may not have imported")
        dataset = open_dataset(config.data, config.seed)
        if dataset.latent or dataset.pixel_range is None or dataset.sample_shape != generator.sample_shape:
            raise UserError(f"{dataset.name} has samples {list(dataset.sample_shape)}, not images like the generated")
        if len(dataset.train) * np.prod(dataset.sample_shape) > MOST_VALUES:
            raise UserError(f"{len(dataset.train)} are too many to search while you wait")
        parts = torch.arange(len(dataset.train)).split(1000)
        return np.concatenate([to_uint8(dataset.train.samples(p.tolist()), dataset.pixel_range) for p in parts])
    except UserError as error:
        print(f"the nearest training images are left out: {error}", file=sys.stderr)
        return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.demo", description="Serve a page to play with a generator.")
    parser.add_argument("source", metavar="SOURCE", help="run directory, hf://NAME, or artifact of the release")
    parser.add_argument("--port", type=int, help="where to serve it (default: the first free one from 7860 on)")
    parser.add_argument("--model", metavar="MODULE:NAME", help="the class of a network of your own")
    arguments = parser.parse_args(argv)
    source, port = arguments.source, arguments.port
    if port is not None and not 0 < port < 2**16:
        raise UserError(f"--port is {port}, expected 1 to {2**16 - 1}")
    generator = load_generator(source, arguments.model and import_named(arguments.model, "--model"))
    if not generator.makes_images:
        shape = list(generator.sample_shape)
        raise UserError(f"{source} makes samples {shape}: the demo shows images only, drifting.sample writes others")
    if generator.condition_shape is not None:
        raise UserError(f"{source} was trained by pair: drifting.sample takes conditions, the demo has no such control")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported.
    gr = require("gradio", "the demo", "demo")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if generator.latent:
        require_vae(device)
    generator.model.to(device)
    draw(generator, Choice(-1, generator.cfg_scale, 0, 0), 1)  # The first time is slow.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/cache"  # What is written beside it gets an address for each content.
        page = build_page(gr, source, generator, training_images(source, generator), Path(folder))
        try:
            _, address, _ = page.launch(
                server_name=HOST, server_port=port, share=False, ssr_mode=False, quiet=True, prevent_thread_lock=True,
                footer_links=[], css=CSS,
            )  # fmt: skip
        except OSError as error:
            taken = "another program has it, or only root may"
            raise UserError(f"--port is {port}, which cannot be had ({taken}): choose another") from error
        try:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # It tidies up then.
            print(f"{source} is at {address} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
        finally:
            page.close(verbose=False)
    return 0


def build_page(gr: Any, source: str, generator: Generator, training: Samples | None, folder: Path) -> Any:
    """The page; what it offers to download is written to ``folder``, which is there as long as the page."""
    names, taken = generator.class_names, Signature.of(generator.model, generator.noise_shape).conditions
    height, width = (side * (8 if generator.latent else 1) for side in generator.sample_shape[1:])
    columns, most, first = (10, 80, 80) if height <= SHOWN else (4, 16, 8)
    parameters = sum(parameter.numel() for parameter in generator.model.parameters())
    facts = f"{generator.data}, step {generator.step:,}, {parameters:,} parameters"
    look: dict[str, Any] = {
        "format": "png", "interactive": False, "buttons": ["download", "fullscreen"],
        "elem_classes": ["picture", "sharp" if height < SHOWN else ""],
    }  # fmt: skip

    def seeds(value: int, label: str) -> Any:
        return gr.Slider(0, SEEDS - 1, value, step=1, label=label)

    with gr.Blocks(title=f"{source}: drifting", delete_cache=KEPT, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h2>{html.escape(source)}</h2>{html.escape(facts)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                label, scale, style = gr.State(-1), gr.State(generator.cfg_scale), gr.State(0)
                if taken and len(names) > 1:
                    choices = [("all", -1), *((str(name), number) for number, name in enumerate(names))]
                    label = gr.Dropdown(choices, value=-1, label="class")
                if taken > 1:
                    most_scale = max(4, generator.cfg_scale)
                    scale = gr.Slider(1, most_scale, generator.cfg_scale, step=0.05, label="guidance scale")
                seed = seeds(0, "seed of the noise")
                if len(draw_inputs(generator, 0, range(1))) > 1:
                    style = seeds(0, "seed of the style codes")
                num = gr.Slider(1, most, first, step=1, label="images")
                told = gr.Markdown(elem_id="told")
                save = gr.Button("Download samples as .npz", size="sm", elem_id="save")
                archive = gr.DownloadButton(visible="hidden", elem_id="archive")
            with gr.Column(scale=5, min_width=320):
                samples = gr.Image(label="samples: click on one to look closer", elem_id="samples", **look)
                sample = gr.Slider(0, most - 1, 0, step=1, label="sample to look at", elem_id="sample")
                neighbours = gr.HTML(elem_classes=look["elem_classes"][1:])
                to = seeds(1, "path from its noise to that of another seed")
                with gr.Row():
                    strip = gr.Image(label="path", elem_id="strip", scale=5, min_width=300, **look)
                    look["format"] = "gif"
                    moving = gr.Image(label="animation", type="filepath", min_width=180, elem_id="moving", **look)

        def show(num: int, *choice: Any) -> tuple[Any, str]:
            images, spent = draw(generator, Choice(*choice), num)
            return grid(images, columns, SHOWN, sharp=True), f"{num} images in **{spent:.1f} ms**"

        def look_closer(sample: int, to: int, num: int, *choice: Any) -> tuple[str, Any, str]:
            images = draw_path(generator, Choice(*choice), min(sample, num - 1), to)
            shown = grid(images[:: (FRAMES - 1) // (STRIP - 1)], STRIP, sharp=True)
            return beside(images[0], training), shown, animate(images, folder / "path.gif")

        def write(num: int, *choice: Any) -> str:
            path, chosen = folder / "samples.npz", Choice(*choice)
            labels = torch.tensor(label_numbers(names))[chosen.numbers(generator, range(num))]
            write_samples(path, draw(generator, chosen, num)[0], labels.numpy())
            return str(path)

        def pick(num: int, event: gr.SelectData) -> int:
            steps = [side * enlargement(height, SHOWN) + GAP for side in (width, height)]
            column, row = (int(at) // step for at, step in zip(event.index, steps, strict=True))
            return min(num - 1, row * columns + column)

        # Of the events that come while one is served, the last is served next: images follow a slider.
        follow = {"trigger_mode": "always_last", "show_progress": "hidden", "api_visibility": "private"}
        controls = [num, label, scale, seed, style]
        moved = [control.input for control in controls if not isinstance(control, gr.State)]
        closer = {"fn": look_closer, "inputs": [sample, to, *controls], "outputs": [neighbours, strip, moving]} | follow
        gr.on([page.load, *moved], show, controls, [samples, told], **follow).then(**closer)
        gr.on([sample.change, to.input], **closer)
        samples.select(pick, num, sample, **follow)
        click = "() => document.querySelector('#archive').click()"
        save.click(write, controls, archive, **follow).then(None, js=click)
    return page


def animate(images: Samples, path: Path) -> str:
    """Write a GIF that goes to the end of a path and back."""
    first, *rest = [enlarged(image, SHOWN, sharp=True) for image in (*images, *images[-2:0:-1])]
    first.save(path, save_all=True, append_images=rest, duration=60, loop=0)
    return str(path)


def beside(image: Samples, training: Samples | None) -> str:
    """An image and the training images nearest to it with their distances, as HTML."""
    if training is None:
        return ""
    indices, distances = nearest(image, training)
    shown = [("sample", image), *((f"{far:.1f}", training[n]) for n, far in zip(indices, distances, strict=True))]
    figures = [
        f"<figure><img alt='' src='{data_uri(enlarged(image, sharp=True))}'><figcaption>{told}</figcaption></figure>"
        for told, image in shown
    ]
    return f"The nearest training images and their distances<div id='nearest'>{''.join(figures)}</div>"


if __name__ == "__main__":
    run_command(main)
