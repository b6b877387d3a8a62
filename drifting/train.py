"""``python -m drifting.train [--config NAME|FILE] [--out DIR] [key=value ...]``: train a generator or resume it."""

import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .cli import INTERRUPTED, UserError, run_command
from .config import Config, LossConfig
from .data import Dataset, open_dataset
from .evaluation import Evaluator, open_evaluator
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
    evaluator = open_evaluator(config, dataset)

    def evaluate() -> Quality:
        _save_picture(run, trainer, dataset)
        return {} if evaluator is None else _evaluate(trainer, dataset, evaluator)

    task = Task(
        trainer=trainer,
        split=dataset.train,
        evaluate=evaluate,
        save_model=lambda: save_generator(run, trainer.ema_model, dataset, trainer.step),
        describe=_describe,
    )
    quality = run_training(config, run, task)
    if quality is None:
        return INTERRUPTED
    print_summary(quality, run)
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


def _evaluate(trainer: DriftingTrainer, dataset: Dataset, evaluator: Evaluator) -> Quality:
    labels = spread_labels(evaluator.num_samples, range(dataset.num_classes))
    images = draw_samples(trainer.ema_model, labels, dataset.pixel_range)
    return evaluator(images, labels.numpy())


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


def _describe(record: dict[str, Any], quality: Quality) -> str:
    """The terms worth watching: mean λ of each R over the feature maps, spread, Fréchet distance."""
    maps = list(record["lambda"].values())
    text = " ".join(f"λ{R}={sum(m[R] for m in maps) / len(maps):.4f}" for R in maps[0])
    text += f" spread={record['sample_spread']:.2f}"
    if quality:
        text += f" Fréchet={quality['frechet_distance']:.1f} ({quality['frechet_ratio']:.2f}x train)"
    return text


def print_summary(quality: Quality, run: RunDirectory) -> None:
    """The closing table, generated images beside real ones, of what was measured, and where the results are."""
    rows = [
        ("Frechet distance to the test images", "frechet_distance", "8.1f", "train"),
        ("recognised as their class", "recognised_share", "8.1%", "test"),
        ("distance to the nearest training image", "nearest_distance", "8.2f", "test"),
    ]
    if quality:
        print(f"\n{'images in one step each':40} generated      real")
    for title, measure, form, split in rows:
        if measure in quality:
            real = quality[f"{measure}_{split}"]
            print(f"{title:40}  {quality[measure]:{form}}  {real:{form}}  ({split} images)")
    print(f"\nsamples: {run.samples}\nmore:    python -m drifting.sample {run.path} --num 100 --out samples.png")


if __name__ == "__main__":
    run_command(main)
