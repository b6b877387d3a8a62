"""``python -m drifting.evaluate RUN|hf://NAME|FILE.npz [--reference …]``: how good images are, as JSON on stdout.

What is judged is a generator or images of a file; what it is judged by, the data set of the run, that of another run,
or the statistics and images of ``.npz`` files, as ADM and others publish them.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cli import ArgumentParser, run_command
from .config.reading import load_config
from .config.schema import Config, EvaluationConfig
from .data import open_dataset
from .errors import UserError
from .evaluation.archives import Labels, read_images, write_images
from .evaluation.drawing import spread_labels
from .evaluation.evaluator import (
    Evaluator,
    Quality,
    best_quality,
    check_evaluation,
    evaluate_model,
    open_evaluator,
    warn_of_few,
)
from .hub.run_directory import RunDirectory
from .hub.sources import HUB, load_generator
from .sample import check_sampling
from .utils.images import Pixels

ARCHIVE = ".npz"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.source.endswith(ARCHIVE):
        report = _evaluate_archive(arguments)
    else:
        report, images, labels = _evaluate_generator(arguments)
    try:
        if arguments.save_npz is not None:
            write_images(arguments.save_npz, images, labels)
    finally:  # what was measured is told in any case
        print(json.dumps(report, indent=2))
    return 0


def _parse(argv: Sequence[str] | None) -> Any:
    parser = ArgumentParser(prog="python -m drifting.evaluate", description="Measure generated images, as JSON.")
    parser.add_argument("source", metavar="SOURCE", help="run directory, hf://NAME, artifact of the release, or .npz")
    parser.add_argument(
        "--reference", nargs="+", metavar="RUN|FILE.npz", default=[],
        help="a run directory, whose data set is meant, or files of statistics (mu, sigma), images (arr_0) or both "
        "(default: as in training)",
    )  # fmt: skip
    parser.add_argument(
        "--features", metavar="NAME|PATH",
        help="inception, dinov2, weights of Inception (.pth), or a directory of drifting.train_classifier, "
        "drifting.pretrain or transformers (default: as in training; inception with reference files)",
    )  # fmt: skip
    parser.add_argument("--num", type=int, help="how many images to generate (default: as in training; else 50000)")
    parser.add_argument(
        "--cfg-scale", "--cfg", type=float, nargs="+", metavar="SCALE",
        help="guidance scales, 1 or more; of several, the best is reported (default: as in training, or 1)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--save-npz", type=Path, metavar="FILE.npz", help="where to write the images, of the best scale"
    )
    arguments = parser.parse_args(argv)
    if arguments.num is not None and arguments.num < 2:
        raise UserError(f"--num is {arguments.num}, expected 2 or more")
    for scale in arguments.cfg_scale or [1.0]:
        check_sampling(scale, arguments.seed)
    if arguments.save_npz is not None and arguments.save_npz.suffix != ARCHIVE:
        raise UserError(f"--save-npz is {arguments.save_npz}, expected a file that ends in {ARCHIVE}")
    if arguments.source.endswith(ARCHIVE) and (arguments.num or arguments.cfg_scale or arguments.save_npz):
        raise UserError(f"{arguments.source} is judged as it is: --num, --cfg-scale and --save-npz are for generators")
    for path in arguments.reference:
        if not Path(path).exists():
            raise UserError(f"there is no file or folder {path}, which --reference names")
    if arguments.source.startswith(HUB) and not arguments.reference:
        raise UserError(f"{arguments.source} comes without its data: --reference must name what to compare it with")
    return arguments


def _evaluate_archive(arguments: Any) -> dict[str, Any]:
    images, labels = read_images(Path(arguments.source))
    evaluator = _open_evaluator(arguments)
    warn_of_few(evaluator, len(images))
    try:
        quality = evaluator(images, labels)
    except ValueError as error:
        raise UserError(str(error)) from error
    return {"samples": arguments.source, "num_samples": len(images)} | quality


def _evaluate_generator(arguments: Any) -> tuple[dict[str, Any], Pixels, Labels]:
    """The report, and if they are to be saved the images of the best scale, with their labels."""
    trained = load_generator(arguments.source)
    evaluator = _open_evaluator(arguments)
    config = _config(arguments.source)
    evaluation = EvaluationConfig() if config is None else config.evaluation
    num = arguments.num or evaluation.num_samples or evaluator.num_samples
    warn_of_few(evaluator, num)
    labels = spread_labels(num, range(len(trained.class_names)))
    trained.model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_evaluation(evaluator, trained)
    scales = arguments.cfg_scale or evaluation.cfg_scales
    qualities: list[Quality] = []
    best_images = np.empty(0, np.uint8)
    for scale in scales:
        quality, images = evaluate_model(evaluator, trained, labels, scale, arguments.seed)
        qualities.append(quality)
        best = best_quality(qualities, evaluator.distance)
        if best is quality and arguments.save_npz is not None:
            best_images = images
        del images
        if len(scales) > 1:
            print(f"cfg_scale {scale:g}: {evaluator.distance} {quality[evaluator.distance]:.4g}", file=sys.stderr)
    report = {"source": arguments.source, "step": trained.step, "seed": arguments.seed, "num_samples": num} | best
    return report | ({"sweep": qualities} if len(scales) > 1 else {}), best_images, labels.numpy()


def _open_evaluator(arguments: Any) -> Evaluator:
    """By ``--reference`` and ``--features``; what they leave open is as in the training of the run."""
    paths: list[str] = arguments.reference
    if paths and all(path.endswith(ARCHIVE) for path in paths):
        evaluation, dataset = EvaluationConfig(features=arguments.features, reference=paths), None
    else:
        run = paths[0] if len(paths) == 1 else arguments.source
        config = _config(run)
        if config is None or len(paths) > 1:
            raise UserError(
                f"there is nothing to compare {arguments.source} with: --reference must name a run directory of "
                "`python -m drifting.train` or .npz files"
            )
        evaluation = config.evaluation
        if arguments.features is not None:
            evaluation = replace(evaluation, features=arguments.features)
        dataset = None if evaluation.reference else open_dataset(config.data)
    evaluator = open_evaluator(evaluation, dataset)
    if evaluator is None:
        raise UserError(f"images of {run} are too large to be measured in pixels: name --features or --reference")
    return evaluator


def _config(source: str) -> Config | None:
    """That of the run directory ``source``, if it is one."""
    path = RunDirectory(Path(source)).config
    return load_config(str(path)) if path.is_file() else None


if __name__ == "__main__":
    run_command(main)
