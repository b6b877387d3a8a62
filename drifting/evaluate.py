"""``python -m drifting.evaluate RUN|hf://NAME|FILE.npz [--reference …]``: how good samples are, as JSON on stdout.

It judges a generator, or the samples of a file, by the data set of the run, by that of another run, or by the
statistics and images of ``.npz`` files, as ADM and others publish them.
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
from .config import Config, EvaluationConfig, read_config
from .data import Dataset, open_dataset
from .errors import UserError
from .evaluation.archives import Labels, Samples, read_samples, write_samples
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
from .utils.named import import_named, is_own

ARCHIVE = ".npz"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.source.endswith(ARCHIVE):
        report = _evaluate_archive(arguments)
    else:
        report, samples, labels = _evaluate_generator(arguments)
    print(json.dumps(report, indent=2))
    if arguments.save_npz is not None:
        write_samples(arguments.save_npz, samples, labels)
    return 0


def _parse(argv: Sequence[str] | None) -> Any:
    parser = ArgumentParser(prog="python -m drifting.evaluate", description="Measure generated samples, as JSON.")
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
    parser.add_argument("--model", metavar="module:Name", help="the run's network, where it is your own")
    parser.add_argument("--data", metavar="module:Name", help="the run's data set, where it is your own")
    parser.add_argument("--num", type=int, help="how many samples to generate (default: as in training; else 50000)")
    parser.add_argument(
        "--cfg-scale", "--cfg", type=float, nargs="+", metavar="SCALE",
        help="guidance scales, 1 or more; of several, the best is reported (default: as in training, or 1)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-npz", type=Path, metavar="FILE.npz", help="where to write the best scale's samples")
    arguments = parser.parse_args(argv)
    if arguments.num is not None and arguments.num < 2:
        raise UserError(f"--num is {arguments.num}, expected 2 or more")
    for scale in arguments.cfg_scale or [1.0]:
        check_sampling(scale, arguments.seed)
    if arguments.save_npz is not None and arguments.save_npz.suffix != ARCHIVE:
        raise UserError(f"--save-npz is {arguments.save_npz}, expected a file that ends in {ARCHIVE}")
    of_generators = (arguments.model, arguments.num, arguments.cfg_scale, arguments.save_npz)
    if arguments.source.endswith(ARCHIVE) and any(of_generators):
        raise UserError(
            f"{arguments.source} is judged as it is: --model, --num, --cfg-scale and --save-npz are for generators"
        )
    for path in arguments.reference:
        if not Path(path).exists():
            raise UserError(f"there is no file or folder {path}, which --reference names")
    if arguments.source.startswith(HUB) and not arguments.reference:
        raise UserError(f"{arguments.source} comes without its data: --reference must name what to compare it with")
    return arguments


def _evaluate_archive(arguments: Any) -> dict[str, Any]:
    samples, labels = read_samples(Path(arguments.source))
    evaluator = _open_evaluator(arguments)
    warn_of_few(evaluator, len(samples))
    return {"samples": arguments.source, "num_samples": len(samples)} | evaluator(samples, labels)


def _evaluate_generator(arguments: Any) -> tuple[dict[str, Any], Samples, Labels]:
    """The report, and if they are to be saved the samples of the best scale, with their labels."""
    model = None if arguments.model is None else import_named(arguments.model, "--model")
    trained = load_generator(arguments.source, model)
    evaluator = _open_evaluator(arguments)
    config = _config(arguments.source)
    evaluation = EvaluationConfig() if config is None else config.evaluation
    num = arguments.num or evaluation.num_samples or evaluator.num_samples
    warn_of_few(evaluator, num)
    numbers = spread_labels(num, range(len(trained.class_names)))
    trained.model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_evaluation(evaluator, trained)
    scales = arguments.cfg_scale or evaluation.cfg_scales
    qualities: list[Quality] = []
    best_samples: Samples = np.empty(0)
    for scale in scales:
        quality, samples = evaluate_model(evaluator, trained, numbers, scale, arguments.seed)
        qualities.append(quality)
        best = best_quality(qualities, evaluator.distance)
        if best is quality and arguments.save_npz is not None:
            best_samples = samples
        del samples
        if len(scales) > 1:
            print(f"cfg_scale {scale:g}: {evaluator.distance} {quality[evaluator.distance]:.4g}", file=sys.stderr)
    report = {"source": arguments.source, "step": trained.step, "seed": arguments.seed, "num_samples": num} | best
    if len(scales) > 1:
        report |= {"sweep": qualities}
    return report, best_samples, numbers.numpy()


def _open_evaluator(arguments: Any) -> Evaluator:
    """The evaluator that ``--reference`` and ``--features`` name; what they leave open is as in the run's training."""
    paths: list[str] = arguments.reference
    if paths and all(path.endswith(ARCHIVE) for path in paths):
        evaluation, dataset = EvaluationConfig(features=arguments.features, reference=paths), None
    else:
        config = _config(paths[0] if len(paths) == 1 else arguments.source)
        if config is None or len(paths) > 1:
            raise UserError(
                f"there is nothing to compare {arguments.source} with: --reference must name a run directory of "
                "`python -m drifting.train` or .npz files"
            )
        evaluation = replace(config.evaluation, features=arguments.features or config.evaluation.features)
        dataset = None if evaluation.reference else _open_dataset(config, arguments.data)
    evaluator = open_evaluator(evaluation, dataset)
    if evaluator is None:
        raise UserError(
            f"{arguments.source} cannot be measured as it is, its samples are latents, too large, or have too few "
            "real ones to compare with: name --features or --reference"
        )
    return evaluator


def _open_dataset(config: Config, name: str | None) -> Dataset:
    """The data set of a run. One of the user's own is imported by the ``name`` of the command line only."""
    own = is_own(config.data.name)
    if own and name is None:
        raise UserError(f"the run's data are {config.data.name}: name them with --data {config.data.name}")
    if name is not None and not (own and is_own(name)):
        raise UserError(f"--data is {name}, the run's data are {config.data.name}: it is for data of your own")
    return open_dataset(config.data if name is None else replace(config.data, name=name))


def _config(source: str) -> Config | None:
    """The configuration of the run directory ``source``, if it is one; reading it imports nothing."""
    path = RunDirectory(Path(source)).config
    return read_config(str(path), (), Config) if path.is_file() else None


if __name__ == "__main__":
    run_command(main)
