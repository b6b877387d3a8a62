"""What the training commands share: their arguments, the run directory, the loop over steps, and how it ends."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from .cli import ArgumentParser, UserError
from .config import AnyConfig, changed_keys, read_config, save_config
from .config_schema import Config, PretrainConfig
from .data import Split, training_batches
from .run_directory import RunDirectory
from .training.checkpoint import load_checkpoint, save_checkpoint
from .training.metrics_log import MetricsLog, to_record

Quality = dict[str, float]


class Trainer(Protocol):
    """What takes the steps; ``step`` counts those taken."""

    step: int

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Task:
    """A trainer, its data, and what is done around its steps.

    Args:
        trainer: takes the steps.
        split: what it is given, in the order of :func:`training_batches`.
        evaluate: measures the model and leaves a picture in the run directory.
        save_model: writes the averaged weights into the run directory.
        describe: the terms of a record and of the last measures that are worth watching.
    """

    trainer: Trainer
    split: Split
    evaluate: Callable[[], Quality]
    save_model: Callable[[], None]
    describe: Callable[[dict[str, Any], Quality], str]


def parse_command(
    argv: Sequence[str] | None, command: str, purpose: str, schema: type[AnyConfig], default: str
) -> tuple[AnyConfig, Path]:
    """Configuration and run directory that a command line asks for."""
    parser = ArgumentParser(
        prog=f"python -m drifting.{command}",
        description=f"{purpose} The same command again goes on where the last one stopped.",
    )
    parser.add_argument("--config", default=default, metavar="NAME|FILE", help=f"configuration (default: {default})")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/NAME)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values over the configuration's")
    arguments = parser.parse_intermixed_args(argv)
    config = read_config(arguments.config, arguments.overrides, schema)
    return config, arguments.out or Path("runs") / Path(arguments.config).stem


def leave_a_core_free() -> None:
    """Use all cores but one, unless OMP_NUM_THREADS says how many.

    With every core in use, anything else that runs holds up each parallel region: on two cores a step then takes ten
    times as long. A small model loses little by leaving one core free.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def open_run(run: RunDirectory, config: AnyConfig) -> None:
    """Make the folder; if it holds a run, refuse a configuration that would train something else."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.samples.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot use {run.path} as a run directory: {error.strerror}") from error
    if run.config.exists():
        changed = changed_keys(read_config(str(run.config), (), type(config)), config)
        if changed:
            raise UserError(
                f"{run.path} holds a run with another configuration ({'; '.join(changed)}): "
                "choose another --out, or give the values it was started with"
            )


def run_training(config: Config | PretrainConfig, run: RunDirectory, task: Task) -> Quality | None:
    """Train to ``config.train.steps`` from the newest checkpoint, if there is one.

    Returns:
        The measures of the trained model, or None if Ctrl-C or SIGTERM ended the run early; it is saved then.

    Raises:
        UserError: the checkpoint cannot be read, or is of a later step.
    """
    trainer = task.trainer
    try:
        state = load_checkpoint(run.checkpoints)
    except ValueError as error:
        raise UserError(str(error)) from error
    if state is not None:
        trainer.load_state_dict(state)
    if trainer.step > config.train.steps:
        raise UserError(f"{run.path} is at step {trainer.step} already, expected train.steps of at least that")
    save_config(config, run.config)
    if trainer.step == config.train.steps:
        measured = task.evaluate()
        task.save_model()  # after the evaluation: it chooses among several averages
        return measured
    log = MetricsLog(run.metrics, trainer.step)
    try:
        with _interruptible() as interrupts:
            quality = _train_steps(config, run, task, log, interrupts)
    finally:
        log.close()
    if quality is None:
        print(f"interrupted at step {trainer.step}, saved in {run.checkpoints}: the same command again goes on")
    return quality


def _train_steps(
    config: Config | PretrainConfig, run: RunDirectory, task: Task, log: MetricsLog, interrupts: list[int]
) -> Quality | None:
    """The remaining steps; None if a signal ended them early."""
    trainer, every, total = task.trainer, config.train, config.train.steps
    quality: Quality = {}
    batches = training_batches(
        task.split, every.batch_size, config.seed, trainer.step * every.batch_size, config.data.workers
    )
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=total, initial=trainer.step, unit="step", mininterval=interval) as bar:
        for images, labels in islice(batches, total - trainer.step):
            metrics = trainer.train_step(images, labels)
            step = trainer.step
            evaluating = step == total or (every.eval_every and step % every.eval_every == 0)
            if evaluating:
                quality = task.evaluate()
            if evaluating or step % every.log_every == 0:
                record = {"step": step} | to_record(metrics)
                bar.set_postfix_str(task.describe(record, quality), refresh=False)
                log.write(record | (quality if evaluating else {}))
            bar.update()
            if step == total or step % every.save_every == 0 or interrupts:
                save_checkpoint(run.checkpoints, trainer.state_dict())
                task.save_model()
            if interrupts and step < total:
                return None
    return quality


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
