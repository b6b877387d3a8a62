"""A generator's run: what is measured of it while it trains, and kept in its run directory."""

import math
import sys
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

from torch import nn
from tqdm import tqdm

from ..config import Config, read_config, save_config
from ..errors import UserError, reason
from ..evaluation import evaluator as evaluation
from ..evaluation.drawing import draw_samples, spread_labels
from ..evaluation.telling import told_measures
from ..hub.run_directory import RunDirectory, save_generator
from ..hub.vae import decode_latents
from ..utils.files import read_object
from ..utils.images import save_panels, to_uint8
from ..utils.named import is_own
from .loop import Quality, Run
from .trainer import DriftingTrainer

ROWS, COLUMNS = 10, 10  # A picture has these many classes, and images of each.


@dataclass
class GeneratorRun(Run[DriftingTrainer]):
    """Evaluates the averaged weights, keeps the best, draws pictures; refuses at once what cannot be evaluated."""

    def __post_init__(self) -> None:
        self.config, self.ranks, self.num_samples = self.trainer.config, self.trainer.ranks, 0
        self.by_class = self.config.step.groups == "classes"
        self.pictured = self.dataset.pixel_range is not None and self.by_class
        self.measured_at, self.quality = -1, Quality()
        with self.ranks.agreed():
            self.evaluator = self._open(self.trainer.ema_model)

    def _open(self, model: nn.Module) -> evaluation.Evaluator | None:
        obstacle, evaluator = "it draws by label, and pairs have conditions", None
        if self.by_class:
            try:
                evaluator = evaluation.open_evaluator(self.config.evaluation, self.dataset, self.ranks)
            except evaluation.NotMeasurable as error:
                obstacle = str(error)
        if evaluator is not None:
            self.num_samples = self.config.evaluation.num_samples or evaluator.num_samples
            evaluator.tell(self.num_samples)
            evaluation.check_evaluation(evaluator, self.trainer.generator(model))
        elif self.ranks.main:
            print(f"evaluation is left out: {obstacle}", file=sys.stderr)
        return evaluator

    def evaluate(self) -> Quality:
        """Measure every average at every guidance scale; the best two become the trainer's, and their measures return.

        The weights are left in ``directory.best``, unless those there are better and were measured alike.
        """
        quality: Quality = {}
        if self.evaluator is not None:
            qualities = []
            for decay in self.config.optimizer.ema_decay:
                generator = self.trainer.generator(self.trainer.weights.average(decay))
                numbers = spread_labels(self.num_samples, range(len(generator.class_names)))
                for scale in self.config.evaluation.cfg_scales:
                    measured = evaluation.evaluate_model(self.evaluator, generator, numbers, scale)
                    qualities.append({"ema_decay": decay} | measured)
            quality = evaluation.best_quality(qualities, self.evaluator.distance)
            self.trainer.best_decay, self.trainer.best_cfg_scale = quality["ema_decay"], quality["cfg_scale"]
        self.ranks.on_main(partial(self._keep, self.trainer.ema_model, quality))
        self.measured_at, self.quality = self.trainer.step, quality
        return quality

    def _keep(self, model: nn.Module, quality: Quality) -> None:
        if self.pictured and self.dataset.pixel_range is not None:
            self._save_picture(model, self.dataset.pixel_range)
        if self.evaluator is None:
            return
        kept, best, distance = _best_so_far(self.directory), self.directory.best, self.evaluator.distance
        alike = kept and read_config(str(best.config), (), Config).evaluation == self.config.evaluation
        if not alike or quality[distance] < kept.get(distance, math.inf):
            save_generator(best, self.trainer.generator(model), quality, **self.trainer.loss_fn.learnt())
            save_config(self.config, best.config)

    def _save_picture(self, model: nn.Module, pixel_range: tuple[float, float]) -> None:
        """Put generated images, a class a row, beside training images. Where it cannot be made, as without the VAE that
        latents need, or of images that cannot be read, say so."""
        split, generator = self.dataset.train, self.trainer.generator(model)
        present = split.labels.unique()[:ROWS].tolist()
        rows = [(split.labels == label).nonzero().flatten()[:COLUMNS].tolist() for label in present]
        try:
            real = split.samples(index for row in rows for index in islice(cycle(row), COLUMNS))
            numbers = spread_labels(len(real), present if len(generator.class_names) > 1 else [0])
            generated = draw_samples(generator, numbers)
            real = decode_latents(real.to(self.trainer.device)) if self.dataset.latent else real
        except UserError as error:
            tqdm.write(f"no picture at step {self.trainer.step}: {error}", file=sys.stderr)
            return
        path = self.directory.samples / f"step_{self.trainer.step:08d}.png"
        save_panels({"generated": generated, "real": to_uint8(real, pixel_range)}, COLUMNS, path)

    def save_model(self) -> None:
        measured = self.quality and self.measured_at == self.trainer.step
        self.trainer.save(self.directory.path, self.quality if measured else None)

    def describe(self, record: dict[str, Any], quality: Quality) -> str:
        words = [f"λ={record['lambda_mean']:.4f}"] if "lambda_mean" in record else []
        words += [f"spread={record['sample_spread']:.2f}"]
        words += [f"skipped={record['skipped_steps']}"] if record["skipped_steps"] else []
        if self.evaluator is not None and quality:
            distance = self.evaluator.distance
            words += [f"{'FID' if distance == 'fid' else 'Fréchet'}={quality[distance]:.2f}"]
            words += [f"({quality['frechet_ratio']:.2f}x train)"] if "frechet_ratio" in quality else []
            words += [f"{measure}={quality[measure]:.0%}" for measure in ("precision", "recall") if measure in quality]
        return " ".join(words)

    def report(self, quality: Quality) -> None:
        pictured, path, name = self.pictured, self.directory.path, self.config.model.name
        if self.evaluator is not None:
            distance, best = self.evaluator.distance, _best_so_far(self.directory)
            _print_measures(quality, distance, "image" if pictured else "sample")
            if len(self.config.evaluation.cfg_scales) > 1:
                print(f"\nbest guidance scale {quality['cfg_scale']}, which samples have by default")
            if best.get(distance, math.inf) < quality[distance]:
                print(f"\nbest: {best[distance]:.2f} at step {best['step']}, kept in {self.directory.best.path}")
        print(f"\nsamples: {self.directory.samples}" if pictured else "")
        options = f"--out samples.{'png' if pictured else 'npz'}" + (f" --model {name}" if is_own(name) else "")
        options += "" if self.by_class else " --conditions FILE.npy"
        print(f"more:    python -m drifting.sample {path} --num 100 {options}")


def _best_so_far(run: RunDirectory) -> Quality:
    """The measures of what ``run.best`` holds, and its step."""
    if not run.best.config.is_file():  # It is the last file that is written.
        return {}
    file = run.best.description
    try:
        description = read_object(file)
        return description["quality"] | {"step": description["step"]}
    except Exception as error:  # The file may hold anything.
        raise UserError(f"{file} cannot be read ({reason(error)}): delete {run.best.path} to go on") from error


def _print_measures(quality: Quality, distance: str, noun: str) -> None:
    print(f"\n{f'{noun}s in one step each':40} generated      real")
    for title, value, real, split in told_measures(quality, distance, noun):
        beside = f"  {real}  ({split} {noun}s)" if real else ""
        print(f"{title:40}  {value}{beside}")
