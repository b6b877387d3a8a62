"""``python -m drifting.train [--config NAME|FILE] [--out DIR] [key=value ...]``: train a generator or resume it."""

import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .cli import INTERRUPTED, UserError, run_command
from .config import load_config, save_config
from .config_schema import Config, EvaluationConfig, LossConfig
from .data import Dataset, open_dataset
from .evaluation import Evaluator, best_quality, check_evaluation, evaluate_guidance, open_evaluator
from .images import save_panels, to_uint8
from .models import DriftingDiT, FeatureStack
from .models.drifting_loss import build_extractor
from .pretrained import load_mae
from .run_directory import RunDirectory, save_generator
from .sample import draw_samples, spread_labels
from .training import DriftingTrainer, create_trainer
from .training_run import Quality, Task, leave_a_core_free, open_run, parse_command, run_training
from .vae import decode_latents

ROWS, COLUMNS = 10, 10  # of a picture: classes, and images of each


def main(argv: Sequence[str] | None = None) -> int:
    config, out = parse_command(argv, "train", "Train a generator.", Config, "digits")
    leave_a_core_free()
    return train(config, out)


def train(config: Config, out: Path) -> int:
    """Train to ``config.train.steps`` in ``out``, from its newest checkpoint if it has one; returns the exit status.

    Raises:
        UserError: ``out`` belongs to another configuration or cannot be written.
    """
    run = RunDirectory(out)
    open_run(run, config)
    dataset = open_dataset(config.data, config.seed)
    trainer = _build_trainer(config, dataset)
    evaluator = open_evaluator(config.evaluation, dataset)
    if evaluator is not None:
        check_evaluation(evaluator, trainer.ema_model, dataset.pixel_range)

    def evaluate() -> Quality:
        quality: Quality = {}
        if evaluator is not None:
            quality = _evaluate(config.evaluation, trainer, dataset, evaluator)
            _keep_best(config, run, trainer, dataset, quality, evaluator.distance)
        _save_picture(run, trainer, dataset)
        return quality

    task = Task(
        trainer=trainer,
        split=dataset.train,
        evaluate=evaluate,
        save_model=lambda: save_generator(run, trainer.ema_model, dataset, trainer.step),
        describe=partial(_describe, evaluator),
    )
    quality = run_training(config, run, task)
    if quality is None:
        return INTERRUPTED
    if evaluator is not None:
        _print_measures(quality, evaluator, run)
    print(f"\nsamples: {run.samples}\nmore:    python -m drifting.sample {run.path} --num 100 --out samples.png")
    return 0


def _build_trainer(config: Config, dataset: Dataset) -> DriftingTrainer:
    channels, size, _ = dataset.sample_shape
    torch.manual_seed(config.seed)
    try:
        model = DriftingDiT(img_size=size, in_chans=channels, num_classes=dataset.num_classes, **vars(config.model))
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    settings: dict[str, Any] = vars(config.loss) | vars(config.step) | vars(config.guidance) | vars(config.optimizer)
    del settings["mae"]
    settings["feature_extractor"] = _feature_extractor(config.loss, channels)
    decay_steps = config.train.steps if settings.pop("cosine_decay") else None
    value_range = None if dataset.latent else dataset.pixel_range
    return create_trainer(model, decay_steps=decay_steps, pixel_range=value_range, seed=config.seed, **settings)


def _feature_extractor(config: LossConfig, in_chans: int) -> nn.Module:
    """The extractors of those names: one as it is, several as a stack."""
    extractors = {name: build_extractor(name, in_chans) for name in config.feature_extractor if name != "mae"}
    if config.mae is not None:
        mae = load_mae(config.mae)
        if mae.config["in_chans"] != in_chans:
            raise UserError(f"loss.mae is {config.mae}, of {mae.config['in_chans']} channels: the data have {in_chans}")
        extractors["mae"] = mae.feature_extractor()
    return FeatureStack(extractors) if len(extractors) > 1 else next(iter(extractors.values()))


def _evaluate(config: EvaluationConfig, trainer: DriftingTrainer, dataset: Dataset, evaluator: Evaluator) -> Quality:
    """Measures of the average and the guidance scale that are best; the trainer's best average is that one from now."""
    labels = spread_labels(config.num_samples or evaluator.num_samples, range(dataset.num_classes))
    qualities: list[Quality] = []
    for decay, model in trainer.ema_models.items():
        results = evaluate_guidance(evaluator, model, labels, dataset.pixel_range, config.cfg_scales)
        qualities += [{"ema_decay": decay} | quality for quality, _ in results]
    best = best_quality(qualities, evaluator.distance)
    trainer.best_decay = best["ema_decay"]
    return best


def _keep_best(
    config: Config, run: RunDirectory, trainer: DriftingTrainer, dataset: Dataset, quality: Quality, distance: str
) -> None:
    """Write the averaged weights to ``run.best``, unless those there are of no greater ``distance``, measured alike."""
    kept = _best_so_far(run)
    alike = kept and load_config(str(run.best.config)).evaluation == config.evaluation
    if not alike or quality[distance] < kept.get(distance, math.inf):
        run.best.path.mkdir(exist_ok=True)
        save_generator(run.best, trainer.ema_model, dataset, trainer.step, quality)
        save_config(config, run.best.config)


def _best_so_far(run: RunDirectory) -> Quality:
    """The measures of what ``run.best`` holds, and its step."""
    if not run.best.config.is_file():  # the last that is written
        return {}
    description = json.loads(run.best.description.read_text())
    return description["quality"] | {"step": description["step"]}


def _save_picture(run: RunDirectory, trainer: DriftingTrainer, dataset: Dataset) -> None:
    """Generated images, a class a row, beside training images of it; without the VAE that latents need, a note."""
    present = dataset.train.labels.unique()[:ROWS].tolist()
    rows = [(dataset.train.labels == label).nonzero().flatten()[:COLUMNS].tolist() for label in present]
    real = dataset.train.samples(index for row in rows for index in islice(cycle(row), COLUMNS))
    try:
        generated = draw_samples(trainer.ema_model, spread_labels(len(real), present), dataset.pixel_range)
        real = decode_latents(real.to(trainer.device)) if dataset.latent else real
    except UserError as error:
        tqdm.write(f"no picture at step {trainer.step}: {error}", file=sys.stderr)
        return
    path = run.samples / f"step_{trainer.step:08d}.png"
    save_panels({"generated": generated, "real": to_uint8(real, dataset.pixel_range)}, COLUMNS, path)


def _describe(evaluator: Evaluator | None, record: dict[str, Any], quality: Quality) -> str:
    """The terms worth watching: mean λ of each R over the feature maps, spread, Fréchet distance."""
    maps = list(record["lambda"].values())
    text = " ".join(f"λ{R}={sum(m[R] for m in maps) / len(maps):.4f}" for R in maps[0])
    text += f" spread={record['sample_spread']:.2f}"
    if evaluator is not None and quality:
        text += f" {'FID' if evaluator.distance == 'fid' else 'Fréchet'}={quality[evaluator.distance]:.2f}"
        text += f" ({quality['frechet_ratio']:.2f}x train)" if "frechet_ratio" in quality else ""
    return text


def _print_measures(quality: Quality, evaluator: Evaluator, run: RunDirectory) -> None:
    """The closing table, generated images beside real ones, of what was measured, and where the best weights are."""
    real_images = "test images" if f"{evaluator.distance}_train" in quality else "reference"
    rows = [
        (f"Frechet distance to the {real_images}", evaluator.distance, "8.2f", "train"),
        ("recognised as their class", "recognised_share", "8.1%", "test"),
        ("distance to the nearest training image", "nearest_distance", "8.2f", "test"),
        ("Inception score", "inception_score", "8.1f", "test"),
        ("precision", "precision", "8.1%", "test"),
        ("recall", "recall", "8.1%", "test"),
    ]
    print(f"\n{'images in one step each':40} generated      real")
    for title, measure, form, split in rows:
        if measure in quality:
            real = quality.get(f"{measure}_{split}")
            beside = "" if real is None else f"  {real:{form}}  ({split} images)"
            print(f"{title:40}  {quality[measure]:{form}}{beside}")
    best = _best_so_far(run)
    if best.get(evaluator.distance, math.inf) < quality[evaluator.distance]:
        print(f"\nbest: {best[evaluator.distance]:.2f} at step {best['step']}, kept in {run.best.path}")


if __name__ == "__main__":
    run_command(main)
