"""``python -m drifting.evaluate RUN|hf://NAME|FILE.npz [--reference …]``: how good samples are, as JSON on stdout.

With ``torchrun --nproc_per_node=K -m drifting.evaluate ...`` K processes share the samples.
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
from .config import Config, DataConfig, EvaluationConfig, read_config
from .data import Dataset, open_dataset
from .errors import UserError, some_of
from .evaluation import evaluator as evaluation
from .evaluation.archives import Samples, read_samples, write_samples
from .evaluation.drawing import DEFAULT_SCALE, check_drawing, spread_labels
from .evaluation.real_samples import Quality
from .generation import ClassNames, label_numbers, same_classes
from .hub.run_directory import RunDirectory
from .hub.sources import HUB, load_generator
from .training.distributed import Ranks, join_ranks
from .utils.named import import_named, is_own


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    with join_ranks() as ranks, ranks.agreed():
        judge = _judge_file if arguments.source.endswith(".npz") else _judge_generator
        judge(arguments, ranks)
    return 0


def _judge_file(arguments: Any, ranks: Ranks) -> None:
    samples, labels = read_samples(Path(arguments.source))
    evaluator = _open_evaluator(arguments, ranks)
    facts = {"samples": arguments.source, "num_samples": len(samples)}
    quality = evaluator(samples, evaluator.class_numbers(labels))
    evaluator.tell(len(samples))
    if ranks.main:
        print(json.dumps(facts | quality, indent=2))


def _parse(argv: Sequence[str] | None) -> Any:
    description = "Measure generated samples, as JSON. What no option says is as in the run's training."
    parser = ArgumentParser(prog="python -m drifting.evaluate", description=description)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="run directory, hf://NAME, artifact of the release, or .npz")
    text = "a run, whose data are meant, or files of statistics (mu, sigma), images (arr_0) or both"
    add("--reference", nargs="+", metavar="RUN|FILE.npz", default=[], help=text)
    text = "inception, dinov2, Inception's weights (.pth), or a directory of a classifier, an autoencoder or a DINOv2"
    add("--features", metavar="NAME|PATH", help=text)
    add("--model", metavar="module:Name", help="the run's network, where it is your own")
    add("--data", metavar="module:Name", help="the run's data set, where it is your own")
    add("--num", type=int, help="how many samples to generate")
    text = f"guidance scales, 1 or more; of several, the best is reported (default: {DEFAULT_SCALE})"
    add("--cfg-scale", "--cfg", type=float, nargs="+", metavar="SCALE", default=[], help=text)
    add("--seed", type=int, default=0)
    add("--save-npz", type=Path, metavar="FILE.npz", help="where to write the best scale's samples")
    arguments = parser.parse_args(argv)
    source, num, path = arguments.source, arguments.num, arguments.save_npz
    if num is not None and num < 2:
        raise UserError(f"--num is {num}, expected 2 or more")
    for scale in arguments.cfg_scale or [None]:
        check_drawing(scale, arguments.seed)
    if path is not None and path.suffix != ".npz":
        raise UserError(f"--save-npz is {path}, expected a file that ends in .npz")
    if source.endswith(".npz") and any((arguments.model, num, arguments.cfg_scale, path)):
        raise UserError(f"{source} is judged as it is: --model, --num, --cfg-scale and --save-npz are for generators")
    for name in arguments.reference:
        if not Path(name).exists():
            raise UserError(f"there is no file or folder {name}, which --reference names")
    if not source.endswith(".npz") and (source.endswith(".npy") or Path(source).is_file()):
        advice = "numpy.savez('samples.npz', samples) writes what is judged as it is"
        raise UserError(f"{source} is a file, expected a run directory, hf://NAME or .npz: {advice}")
    if source.startswith(HUB) and not arguments.reference:
        raise UserError(f"{source} comes without its data: --reference must name what to compare it with")
    return arguments


def _judge_generator(arguments: Any, ranks: Ranks) -> None:
    model = None if arguments.model is None else import_named(arguments.model, "--model")
    generator = load_generator(arguments.source, model)
    if generator.condition_shape is not None:
        advice = "draw with `python -m drifting.sample --conditions FILE.npy`, and measure its .npz"
        raise UserError(f"{arguments.source} was trained by pair, which labels do not tell: {advice}")
    evaluator = _open_evaluator(arguments, ranks, generator.class_names)
    config = _config(arguments.source) or Config()
    num = arguments.num or config.evaluation.num_samples or evaluator.num_samples
    scales = arguments.cfg_scale or [generator.cfg_scale]
    numbers = spread_labels(num, range(len(generator.class_names)))
    evaluator.tell(num)
    generator.model.to("cuda" if torch.cuda.is_available() else "cpu")
    evaluation.check_evaluation(evaluator, generator)
    qualities: list[Quality] = []
    kept: list[Samples] = []
    for scale in scales:
        drawn: list[Samples] = []
        to_keep = None if arguments.save_npz is None else drawn
        quality = evaluation.evaluate_model(evaluator, generator, numbers, scale, arguments.seed, to_keep)
        qualities.append(quality)
        best = evaluation.best_quality(qualities, evaluator.distance)
        kept = drawn if best is quality else kept
        if len(scales) > 1 and ranks.main:
            print(f"cfg_scale {scale:g}: {evaluator.distance} {quality[evaluator.distance]:.4g}", file=sys.stderr)
    sweep = {"sweep": qualities} if len(scales) > 1 else {}
    facts = {"source": arguments.source, "step": generator.step, "seed": arguments.seed, "num_samples": num}
    parts = ranks.to_main(kept)
    if ranks.main:
        try:
            if arguments.save_npz is not None:
                labels = torch.tensor(label_numbers(generator.class_names))[numbers]
                samples = np.concatenate([batch for part in parts for batch in part])
                write_samples(arguments.save_npz, samples, labels.numpy())
        finally:  # Where the samples cannot be written, the measures are not lost.
            print(json.dumps(facts | best | sweep, indent=2))


def _open_evaluator(arguments: Any, ranks: Ranks, names: ClassNames | None = None) -> evaluation.Evaluator:
    """Open what compares with real samples; their classes are called as the ``names`` of the generator's are."""
    paths, source, features = arguments.reference, arguments.source, arguments.features
    if paths and all(path.endswith(".npz") for path in paths):
        settings, dataset = EvaluationConfig(features=features, reference=paths), None
    else:
        config = _config(*paths or [source]) if len(paths) < 2 else None
        if config is None and not paths and arguments.data is not None:
            config = Config(data=DataConfig(arguments.data))  # A script has saved the generator, without its data.
        if config is None:
            expected = "--reference must name a run directory of `python -m drifting.train` or .npz files"
            raise UserError(f"there is nothing to compare {source} with: {expected}, or --data data of your own")
        settings = replace(config.evaluation, features=features or config.evaluation.features)
        dataset = None if settings.reference else _open_dataset(config, arguments.data)
        if names is not None and dataset is not None and not same_classes(names, dataset.class_names):
            told = f"{source} was trained on {len(names)} classes ({some_of(names)})"
            real = f"the data to compare with have {dataset.num_classes} ({some_of(dataset.class_names)})"
            raise UserError(f"{told}, {real}: name those of the training with --reference")
    try:
        return evaluation.open_evaluator(settings, dataset, ranks)
    except evaluation.NotMeasurable as error:
        raise UserError(f"{source} cannot be measured ({error}): see --features and --reference") from error


def _open_dataset(config: Config, name: str | None) -> Dataset:
    """The data set of a run. One of the user's own is imported by the ``name`` of the command line only."""
    data = config.data
    if is_own(data.name) and name is None:
        raise UserError(f"the run's data are {data.name}: name them with --data {data.name}")
    if name is not None and not (is_own(data.name) and is_own(name)):
        raise UserError(f"--data is {name}, the run's data are {data.name}: it is for data of your own")
    return open_dataset(replace(data, name=name or data.name), config.seed)


def _config(source: str) -> Config | None:
    path = RunDirectory(Path(source)).config
    return read_config(str(path), (), Config) if path.is_file() else None


if __name__ == "__main__":
    run_command(main)
