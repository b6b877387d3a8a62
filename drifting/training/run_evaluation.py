"""What is measured of a generator while it trains, and kept in its run directory."""

import math
import sys
from itertools import cycle, islice
from typing import Any

from torch import nn
from tqdm import tqdm

from ..config.reading import load_config, save_config
from ..config.schema import Config
from ..data import Dataset
from ..errors import UserError, reason
from ..evaluation.drawing import draw_samples, spread_labels
from ..evaluation.evaluator import (
    Evaluator,
    Quality,
    best_quality,
    check_evaluation,
    evaluate_model,
    open_evaluator,
    warn_of_few,
)
from ..hub.run_directory import RunDirectory, save_generator
from ..hub.vae import decode_latents
from ..utils.files import read_object
from ..utils.images import save_panels, to_uint8
from . import DriftingTrainer

ROWS, COLUMNS = 10, 10  # of a picture: classes, and images of each


class RunEvaluation:
    """Evaluates the averaged weights, keeps the best and draws pictures. All ranks call it; rank 0 does the work.

    Raises:
        UserError: the configured evaluation cannot be made of these images.
    """

    def __init__(self, config: Config, run: RunDirectory, trainer: DriftingTrainer, dataset: Dataset) -> None:
        self.config, self.run, self.trainer, self.dataset = config, run, trainer, dataset
        self.ranks, model = trainer.ranks, trainer.ema_model
        self.evaluator = self.ranks.on_main(lambda: self._open(model))

    def _open(self, model: nn.Module) -> Evaluator | None:
        evaluator = open_evaluator(self.config.evaluation, self.dataset)
        if evaluator is not None:
            warn_of_few(evaluator, self._num_samples(evaluator))
            check_evaluation(evaluator, self.trainer.generator_of(model))
        return evaluator

    def evaluate(self) -> Quality:
        """Measures of the average and the guidance scale that are best; the trainer's best average is that one from
        now. Leaves a picture, and in ``run.best`` weights that are better than those there."""
        models = self.trainer.ema_models
        quality = self.ranks.from_main(self.ranks.on_main(lambda: self._measure(models))) or {}
        self.trainer.best_decay = quality.get("ema_decay", self.trainer.best_decay)
        self.ranks.on_main(lambda: self._keep(models[self.trainer.best_decay], quality))
        return quality

    def save_model(self) -> None:
        """Write the averaged weights into the run directory."""
        model = self.trainer.ema_model
        self.ranks.on_main(lambda: save_generator(self.run, self.trainer.generator_of(model)))

    def describe(self, record: dict[str, Any], quality: Quality) -> str:
        """The terms worth watching: mean λ of each R over the feature maps, spread, Fréchet distance."""
        maps = list(record["lambda"].values())
        text = " ".join(f"λ{R}={sum(m[R] for m in maps) / len(maps):.4f}" for R in maps[0])
        text += f" spread={record['sample_spread']:.2f}"
        if record["skipped_steps"]:
            text += f" skipped={record['skipped_steps']}"
        if self.evaluator is not None and quality:
            distance = self.evaluator.distance
            text += f" {'FID' if distance == 'fid' else 'Fréchet'}={quality[distance]:.2f}"
            text += f" ({quality['frechet_ratio']:.2f}x train)" if "frechet_ratio" in quality else ""
        return text

    def report(self, quality: Quality) -> None:
        """Print the closing table, and what to do next."""
        if self.evaluator is not None:
            _print_measures(quality, self.evaluator.distance)
            best = _best_so_far(self.run)
            if best.get(self.evaluator.distance, math.inf) < quality[self.evaluator.distance]:
                distance = best[self.evaluator.distance]
                print(f"\nbest: {distance:.2f} at step {best['step']}, kept in {self.run.best.path}")
        path = self.run.path
        print(f"\nsamples: {self.run.samples}\nmore:    python -m drifting.sample {path} --num 100 --out samples.png")

    def _measure(self, models: dict[float, nn.Module]) -> Quality:
        if self.evaluator is None:
            return {}
        config = self.config.evaluation
        labels = spread_labels(self._num_samples(self.evaluator), range(self.dataset.num_classes))
        qualities: list[Quality] = []
        for decay, model in models.items():
            for cfg_scale in config.cfg_scales:
                quality = evaluate_model(self.evaluator, self.trainer.generator_of(model), labels, cfg_scale)[0]
                qualities.append({"ema_decay": decay} | quality)
        return best_quality(qualities, self.evaluator.distance)

    def _num_samples(self, evaluator: Evaluator) -> int:
        return self.config.evaluation.num_samples or evaluator.num_samples

    def _keep(self, model: nn.Module, quality: Quality) -> None:
        """A picture; and the weights in ``run.best``, unless those there are of no greater distance, measured alike."""
        self._save_picture(model)
        if self.evaluator is None:
            return
        kept, best, distance = _best_so_far(self.run), self.run.best, self.evaluator.distance
        alike = kept and load_config(str(best.config)).evaluation == self.config.evaluation
        if not alike or quality[distance] < kept.get(distance, math.inf):
            save_generator(best, self.trainer.generator_of(model), quality)
            save_config(self.config, best.config)

    def _save_picture(self, model: nn.Module) -> None:
        """Generated images, a class a row, beside training images of it; without the VAE that latents need, a note."""
        split, pixel_range = self.dataset.train, self.dataset.pixel_range
        present = split.labels.unique()[:ROWS].tolist()
        rows = [(split.labels == label).nonzero().flatten()[:COLUMNS].tolist() for label in present]
        real = split.samples(index for row in rows for index in islice(cycle(row), COLUMNS))
        try:
            generated = draw_samples(self.trainer.generator_of(model), spread_labels(len(real), present))
            real = decode_latents(real.to(self.trainer.device)) if self.dataset.latent else real
        except UserError as error:
            tqdm.write(f"no picture at step {self.trainer.step}: {error}", file=sys.stderr)
            return
        path = self.run.samples / f"step_{self.trainer.step:08d}.png"
        save_panels({"generated": generated, "real": to_uint8(real, pixel_range)}, COLUMNS, path)


def _best_so_far(run: RunDirectory) -> Quality:
    """The measures of what ``run.best`` holds, and its step."""
    if not run.best.config.is_file():  # the last that is written
        return {}
    try:
        description = read_object(run.best.description)
        return description["quality"] | {"step": description["step"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        path = run.best.path
        raise UserError(f"{run.best.description} cannot be read ({reason(error)}): delete {path} to go on") from error


def _print_measures(quality: Quality, distance: str) -> None:
    """Generated images beside real ones, of what was measured."""
    real_images = "test images" if f"{distance}_train" in quality else "reference"
    rows = [
        (f"Frechet distance to the {real_images}", distance, "8.2f", "train"),
        ("recognised as their class", "recognised_share", "8.1%", "test"),
        ("distance to the nearest training image", "nearest_distance", "8.2f", "test"),
        ("sFID", "sfid", "8.2f", "train"),
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
