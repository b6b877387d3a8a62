"""``python -m drifting.evaluate RUN [--samples FILE.npz]``: how good a generator's images are, as JSON on stdout."""

import json
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from .cli import ArgumentParser, UserError, run_command
from .config import load_config
from .data import open_dataset
from .evaluation import Evaluator, open_evaluator
from .images import Pixels
from .pretrained import open_generator
from .run_directory import RunDirectory
from .sample import check_sampling, draw_samples, spread_labels


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m drifting.evaluate", description="Measure generated images, as JSON.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of drifting.train")
    parser.add_argument("--samples", type=Path, help="judge the images of this .npz (of drifting.sample), not new ones")
    parser.add_argument("--num", type=int, help="how many to generate (default: as in training)")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance scale, 1 or more (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    if arguments.num is not None and arguments.num < 2:
        raise UserError(f"--num is {arguments.num}, expected 2 or more")
    check_sampling(arguments.cfg_scale, arguments.seed)
    trained = open_generator(arguments.run)
    evaluator = _run_evaluator(arguments.run)
    if arguments.samples is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = spread_labels(arguments.num or evaluator.num_samples, range(trained.model.num_classes))
        images = draw_samples(
            trained.model.to(device), chosen, trained.pixel_range, arguments.cfg_scale, arguments.seed
        )
        labels = chosen.numpy()
        origin = {"step": trained.step, "cfg_scale": arguments.cfg_scale, "seed": arguments.seed}
    else:
        images, labels = _load_samples(arguments.samples)
        origin = {"samples": str(arguments.samples)}
    try:
        measures = evaluator(images, labels)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(json.dumps(origin | {"num_samples": len(images)} | measures, indent=2))
    return 0


def _run_evaluator(run: Path) -> Evaluator:
    """That of the data set that the run was trained on."""
    config = load_config(str(RunDirectory(run).config))
    evaluator = open_evaluator(config, open_dataset(config.data))
    if evaluator is None:
        raise UserError(f"{run} was trained on {config.data.name}, whose images are too large to be measured in pixels")
    return evaluator


def _load_samples(path: Path) -> tuple[Pixels, NDArray[np.int64]]:
    """Images and labels as :mod:`drifting.sample` writes them."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with np.load(path) as archive:
            images, labels = archive["arr_0"], archive["arr_1"]
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
        raise UserError(f"{path} is no .npz with images arr_0 and labels arr_1") from error
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)} and arr_1 {list(labels.shape)}, "
            "expected uint8 [N, H, W, C] and [N]"
        )
    return images, labels


if __name__ == "__main__":
    run_command(main)
