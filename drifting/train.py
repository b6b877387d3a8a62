"""``python -m drifting.train [--config NAME|FILE] [--out DIR] [key=value ...]``: train a generator or resume it."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .cli import INTERRUPTED, ArgumentParser, UserError, run_command
from .config import Config, changed_keys, load_config, save_config
from .data import Dataset, open_dataset, training_batches
from .evaluate import NUM_SAMPLES
from .evaluation import Evaluator, pixel_evaluator
from .images import save_comparison, to_uint8
from .models import DriftingDiT
from .run_directory import RunDirectory, save_generator
from .sample import draw_samples, spread_labels
from .training import DriftingTrainer, create_trainer
from .training.checkpoint import load_checkpoint, save_checkpoint
from .training.metrics_log import MetricsLog, to_record
from .vae import decode_latents

ROWS, COLUMNS = 10, 10  # of a picture: classes, and images of each


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m drifting.train",
        description="Train a generator. The same command again goes on where the last one stopped.",
    )
    parser.add_argument("--config", default="digits", metavar="NAME|FILE", help="configuration (default: digits)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over the configuration's")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if "OMP_NUM_THREADS" not in os.environ:
        # With every core in use, anything else that runs holds up each parallel region: on two cores a step then
        # takes ten times as long. A small model loses little by leaving one core free.
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    return train(config, arguments.out or Path("runs") / Path(arguments.config).stem)


def train(config: Config, out: Path) -> int:
    """Train to ``config.train.steps`` in ``out``, from its newest checkpoint if it has one; returns the exit status.

    Raises:
        UserError: ``out`` belongs to another configuration or cannot be written.
    """
    run = RunDirectory(out)
    _open_run(run, config)
    dataset = open_dataset(config.data, config.seed)
    trainer = _build_trainer(config, dataset)
    try:
        state = load_checkpoint(run.checkpoints)
    except ValueError as error:
        raise UserError(str(error)) from error
    if state is not None:
        trainer.load_state_dict(state)
    if trainer.step > config.train.steps:
        raise UserError(f"{out} is at step {trainer.step} already, expected train.steps of at least that")
    save_config(config, run.config)

    evaluator = pixel_evaluator(dataset)
    log = MetricsLog(run.metrics, trainer.step)
    with _interruptible() as interrupts:
        finished = _train_steps(config, run, trainer, dataset, evaluator, log, interrupts)
    log.close()
    if not finished:
        print(f"interrupted at step {trainer.step}, saved in {run.checkpoints}: the same command again goes on")
        return INTERRUPTED
    save_generator(run, trainer.ema_model, dataset, trainer.step)
    print_summary(_evaluate(trainer, dataset, evaluator), run)
    return 0


def _train_steps(
    config: Config, run: RunDirectory, trainer: DriftingTrainer, dataset: Dataset,
    evaluator: Evaluator | None, log: MetricsLog, interrupts: list[int],
) -> bool:  # fmt: skip
    """The remaining steps; False if a signal ended them early."""
    every, total = config.train, config.train.steps
    bar = tqdm(total=total, initial=trainer.step, unit="step", mininterval=0.5 if sys.stderr.isatty() else 10)
    quality: dict[str, float] = {}
    with bar:
        batches = training_batches(
            dataset.train, every.batch_size, config.seed, trainer.step * every.batch_size, config.data.workers
        )
        for images, labels in islice(batches, total - trainer.step):
            metrics = trainer.train_step(images, labels)
            step = trainer.step
            evaluating = step == total or (every.eval_every and step % every.eval_every == 0)
            if evaluating:
                quality = _evaluate(trainer, dataset, evaluator)
                _save_picture(run, trainer, dataset)
            if evaluating or step % every.log_every == 0:
                record = {"step": step} | to_record(metrics)
                bar.set_postfix_str(_progress(record, quality), refresh=False)
                log.write(record | (quality if evaluating else {}))
            bar.update()
            if step == total or step % every.save_every == 0 or interrupts:
                save_checkpoint(run.checkpoints, trainer.state_dict())
                save_generator(run, trainer.ema_model, dataset, step)
            if interrupts:
                return step == total
    return True


def _open_run(run: RunDirectory, config: Config) -> None:
    """Make the folder; if it holds a run, refuse a configuration that would train something else."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.samples.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {run.path} as a run directory: {error.strerror}") from error
    if run.config.exists():
        changed = changed_keys(load_config(str(run.config)), config)
        if changed:
            raise UserError(
                f"{run.path} holds a run with another configuration ({'; '.join(changed)}): "
                "choose another --out, or give the values it was started with"
            )


def _build_trainer(config: Config, dataset: Dataset) -> DriftingTrainer:
    channels, size, _ = dataset.sample_shape
    torch.manual_seed(config.seed)
    try:
        model = DriftingDiT(img_size=size, in_chans=channels, num_classes=dataset.num_classes, **vars(config.model))
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    settings: dict[str, Any] = vars(config.loss) | vars(config.step) | vars(config.guidance) | vars(config.optimizer)
    decay_steps = config.train.steps if settings.pop("cosine_decay") else None
    value_range = None if dataset.latent else dataset.pixel_range
    return create_trainer(model, decay_steps=decay_steps, pixel_range=value_range, seed=config.seed, **settings)


def _evaluate(trainer: DriftingTrainer, dataset: Dataset, evaluator: Evaluator | None) -> dict[str, float]:
    if evaluator is None:
        return {}
    labels = spread_labels(NUM_SAMPLES, range(dataset.num_classes))
    return evaluator(draw_samples(trainer.ema_model, labels, dataset.pixel_range), labels.numpy())


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
    save_comparison(generated, to_uint8(real, dataset.pixel_range), COLUMNS, path)


def _progress(record: dict[str, Any], quality: dict[str, float]) -> str:
    """The terms worth watching: mean λ of each R over the feature maps, spread, Fréchet distance."""
    maps = list(record["lambda"].values())
    text = " ".join(f"λ{R}={sum(m[R] for m in maps) / len(maps):.4f}" for R in maps[0])
    text += f" spread={record['sample_spread']:.2f}"
    if quality:
        text += f" Fréchet={quality['frechet_distance']:.1f} ({quality['frechet_ratio']:.2f}x train)"
    return text


def print_summary(quality: dict[str, float], run: RunDirectory) -> None:
    """The closing table, generated images beside real ones, where they were measured, and where the results are."""
    rows = [
        ("Frechet distance to the test images", "frechet_distance", "8.1f", "train"),
        ("recognised as their class", "recognised_share", "8.1%", "test"),
        ("distance to the nearest training image", "nearest_distance", "8.2f", "test"),
    ]
    if quality:
        print(f"\n{f'{NUM_SAMPLES} images in one step each':40} generated      real")
        for title, measure, form, split in rows:
            real = quality[f"{measure}_{split}"]
            print(f"{title:40}  {quality[measure]:{form}}  {real:{form}}  ({split} images)")
    print(f"\nsamples: {run.samples}\nmore:    python -m drifting.sample {run.path} --num 100 --out samples.png")


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM only fill the list, so that the step in hand ends well; a second one kills."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before = {int(number): signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_command(main)
