"""What the training commands share: their arguments, the run directory, the loop over steps, and how it ends."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..cli import ArgumentParser
from ..config.reading import AnyConfig, changed_keys, read_config, save_config
from ..config.schema import Config, PretrainConfig
from ..data import Split, training_batches
from ..data.dataset import telling_of_dead_workers
from ..errors import Interrupted, UserError
from ..hub.run_directory import RunDirectory
from ..utils.stopwatch import Stopwatch
from .checkpoint import checkpoints_in, load_checkpoint, save_checkpoint
from .distributed import Ranks
from .finite import FiniteGuard, NotFiniteError
from .meter import Meter
from .metrics_log import MetricsLog, to_record

Quality = dict[str, float]


class Trainer(Protocol):
    """What takes the steps; ``step`` counts those taken."""

    step: int
    ranks: Ranks
    stopwatch: Stopwatch

    @property
    def images_per_step(self) -> int: ...

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Task:
    """A trainer, its data, and what is done around its steps.

    Args:
        trainer: takes the steps.
        split: what it is given, in the order of :func:`training_batches`, each rank its share of a batch.
        evaluate: measures the model and leaves a picture in the run directory; all ranks call it together.
        save_model: writes the averaged weights into the run directory; so they do this.
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


def _make_directory(run: RunDirectory, config: AnyConfig) -> None:
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


@contextmanager
def opened_run(run: RunDirectory, config: AnyConfig, ranks: Ranks) -> Iterator[None]:
    """The run directory is there and this run's alone, inside.

    Raises:
        UserError: it is in use, cannot be written, or holds a run with a configuration that would train something else;
            or the ranks cannot share a batch.
    """
    batch = config.train.batch_size
    with ranks.agreed():
        if batch % ranks.size:
            raise UserError(f"train.batch_size is {batch}, expected a multiple of the {ranks.size} ranks")
    with ExitStack() as stack:

        def open_and_lock() -> None:
            _make_directory(run, config)
            stack.enter_context(run.lock())

        ranks.on_main(open_and_lock)
        yield


def run_training(config: Config | PretrainConfig, run: RunDirectory, task: Task) -> Quality:
    """Train to ``config.train.steps`` from the newest checkpoint, if there is one.

    Returns:
        The measures of the trained model.

    Raises:
        UserError: the checkpoint cannot be read or is of a later step, or loss or gradient are not finite.
        Interrupted: Ctrl-C or SIGTERM ended the run early; it is saved.
    """
    trainer, ranks = task.trainer, task.trainer.ranks
    _resume(run, trainer)
    with ranks.agreed():
        if trainer.step > config.train.steps:
            raise UserError(f"{run.path} is at step {trainer.step} already, expected train.steps of at least that")
    ranks.on_main(lambda: save_config(config, run.config))
    if trainer.step == config.train.steps:
        measured = task.evaluate()
        task.save_model()  # after the evaluation: it chooses among several averages
        return measured
    settings = dataclasses.asdict(config)
    log = ranks.on_main(lambda: MetricsLog(run.metrics, trainer.step, config.train.wandb, settings))
    try:
        with _noting_signals(ranks) as signals:
            return _train_steps(config, run, task, log, signals)
    finally:
        if log is not None:
            log.close()


def _resume(run: RunDirectory, trainer: Trainer) -> None:
    """Bring the trainer to where the newest checkpoint is."""
    with trainer.ranks.agreed():
        try:
            state = load_checkpoint(run.checkpoints, trainer.state_dict(), trainer.ranks)
        except ValueError as error:
            raise UserError(str(error)) from error
    if state is not None:
        trainer.load_state_dict(state)


def _train_steps(
    config: Config | PretrainConfig, run: RunDirectory, task: Task, log: MetricsLog | None, signals: list[int]
) -> Quality:
    """The remaining steps. Only rank 0 has a log."""
    trainer, ranks, every = task.trainer, task.trainer.ranks, config.train
    quality: Quality = {}
    guard, meter = FiniteGuard(every.max_skipped_steps), Meter(trainer.stopwatch, trainer.step)
    batches = training_batches(
        task.split, every.batch_size, config.seed, trainer.step * every.batch_size, config.data.workers,
        ranks.share(every.batch_size),
    )  # fmt: skip
    with _progress(every.steps, trainer) as bar, telling_of_dead_workers():
        for images, labels in islice(batches, every.steps - trainer.step):
            metrics = trainer.train_step(images, labels)
            step, last = trainer.step, trainer.step == every.steps
            evaluating = last or (every.eval_every and step % every.eval_every == 0)
            received = ranks.greatest(max(signals, default=0))
            saving = last or received or step % every.save_every == 0
            with ranks.agreed(), _stopping_at_not_finite(run):
                guard.check(step, metrics)
                if evaluating or saving:
                    guard.finish()
            logging = log is not None and (evaluating or step % every.log_every == 0)
            timing = meter.read(step, trainer.images_per_step) if logging else {}
            trainer.stopwatch.enter("evaluation")
            if evaluating:
                quality = task.evaluate()
            if log is not None and logging:
                record = {"step": step} | to_record(metrics) | {"timing": timing}
                bar.set_postfix_str(task.describe(record, quality), refresh=False)
                log.write(record | (quality if evaluating else {}))
            bar.update()
            if saving:
                with ranks.agreed():
                    save_checkpoint(run.checkpoints, trainer.state_dict(), ranks)
                task.save_model()
            trainer.stopwatch.enter("data")
            if received and not last:
                message = f"interrupted at step {step}, saved in {run.checkpoints}: the same command again goes on"
                with ranks.agreed():
                    raise Interrupted(message, received)
    return quality


def _progress(steps: int, trainer: Trainer) -> Any:
    """The bar over all steps, on rank 0."""
    interval = 0.5 if sys.stderr.isatty() else 10
    silent = not trainer.ranks.main
    return tqdm(total=steps, initial=trainer.step, unit="step", mininterval=interval, disable=silent)


@contextmanager
def _stopping_at_not_finite(run: RunDirectory) -> Iterator[None]:
    """What a loss or gradient that is not finite ends the run with."""
    try:
        yield
    except NotFiniteError as error:
        newest = [str(path) for path in checkpoints_in(run.checkpoints)][-1:] or ["not there yet"]
        raise UserError(
            f"{error}. These steps left the weights as they were; the last checkpoint is {newest[0]}: "
            "look at the data, lower optimizer.learning_rate, or let train.max_skipped_steps such steps pass"
        ) from error


@contextmanager
def _noting_signals(ranks: Ranks) -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM only fill the list, so that the step in hand ends well.

    A second one kills, unless torchrun is there, which passes on what a terminal has sent already.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        if ranks.size == 1:
            signal.signal(number, before[number])

    before = {int(number): signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
