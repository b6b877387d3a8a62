"""What the training commands share: the run directory, the loop over steps, and how it ends."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic

import torch
from tqdm import tqdm

from ..config import AnyConfig
from ..config.changes import config_in_force, keep_config
from ..data import Split, training_batches
from ..data.dataset import telling_of_dead_workers
from ..errors import Interrupted, UserError, reason
from ..hub.run_directory import RunDirectory
from .checkpoint import load_checkpoint, save_checkpoint
from .distributed import Ranks
from .mae_trainer import MAETrainer
from .metrics import MetricsLog, check_finite, to_record
from .trainer import DriftingTrainer

Quality = dict[str, float]


@dataclass(frozen=True)
class Run(Generic[AnyConfig]):
    """A run of a training command: what takes the steps, and what is done around them.

    Args:
        directory, config: where the run is kept, and its configuration.
        trainer, split: what takes the steps, and the training samples. Each rank gets its share of every batch.
        evaluate: measures the model and leaves a picture in the run directory; all ranks call it together.
        save_model: writes the averaged weights into the run directory; all ranks call it together.
        describe: puts into words the terms of a record and of the last measures that are worth watching.
    """

    directory: RunDirectory
    config: AnyConfig
    trainer: DriftingTrainer | MAETrainer
    split: Split
    evaluate: Callable[[], Quality]
    save_model: Callable[[], None]
    describe: Callable[[dict[str, Any], Quality], str]


def leave_a_core_free() -> None:
    """Use all cores but one, unless OMP_NUM_THREADS says how many.

    With every core in use, anything else that runs holds up each parallel region: on two cores a step then takes ten
    times as long. A small model loses little by leaving one core free.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


@contextmanager
def opened_run(
    run: RunDirectory, config: AnyConfig, ranks: Ranks, asked: Collection[str] = ()
) -> Iterator[AnyConfig]:
    """The run directory is there and this run's alone, inside; gives the configuration, with changes made earlier.

    Args:
        asked: keys that the user changes within the run, by ``--change``.

    Raises:
        UserError: it is in use, or holds a run with a configuration that would train something else; or the ranks
            cannot share a batch.
    """
    with ExitStack() as stack:

        def open_and_lock() -> AnyConfig:
            if not ranks.main:
                return config
            run.samples.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run.lock())
            return config_in_force(run.config, config, asked)

        with ranks.agreed():
            if config.train.batch_size % ranks.size:
                batch = config.train.batch_size
                raise UserError(f"train.batch_size is {batch}, expected a multiple of the {ranks.size} ranks")
            opened = ranks.on_all(open_and_lock)[0]
        yield opened


def train(run: Run[AnyConfig]) -> Quality:
    """Train to ``config.train.steps`` from the newest checkpoint, if there is one.

    Returns:
        The measures of the trained model.

    Raises:
        UserError: the checkpoint cannot be read or is of a later step, or loss or gradient are not finite.
        Interrupted: Ctrl-C or SIGTERM ended the run early; it is saved.
    """
    trainer, config, directory = run.trainer, run.config, run.directory
    with trainer.ranks.agreed():
        trainer.ranks.on_all(lambda: _resume(directory, trainer))
        if trainer.step > config.train.steps:
            raise UserError(
                f"{directory.path} is at step {trainer.step} already, expected train.steps of at least that"
            )
    trainer.ranks.on_main(lambda: keep_config(directory.config, config, trainer.step))
    if trainer.step == config.train.steps:
        measured = run.evaluate()
        run.save_model()  # It comes after the evaluation, which chooses among several averages.
        return measured
    wandb, settings = config.train.wandb, dataclasses.asdict(config)
    log = trainer.ranks.on_main(lambda: MetricsLog(directory.metrics, trainer.step, wandb, settings))
    try:
        with _noting_signals(trainer.ranks) as signals:
            return _train_steps(run, log, signals)
    finally:
        if log is not None:
            log.close()


def _resume(directory: RunDirectory, trainer: DriftingTrainer | MAETrainer) -> None:
    """Bring the trainer to where the newest checkpoint is; every rank reads all of it."""
    state = load_checkpoint(directory.checkpoints)
    try:
        if state is not None:
            trainer.load_state_dict(state)
    except Exception as error:  # A state of something else makes torch and the trainer raise errors of many classes.
        raise UserError(f"the checkpoint in {directory.checkpoints} is of another trainer: {reason(error)}") from error


def _train_steps(run: Run[AnyConfig], log: MetricsLog | None, signals: list[int]) -> Quality:
    """Take the remaining steps. Only rank 0 has a log."""
    trainer, ranks, every, checkpoints = run.trainer, run.trainer.ranks, run.config.train, run.directory.checkpoints
    quality: Quality = {}
    trainer.stopwatch.take()
    trainer.stopwatch.enter("data")
    logged = trainer.step
    batches = training_batches(
        run.split, every.batch_size, run.config.seed, trainer.step * every.batch_size, run.config.data.workers,
        ranks.share(every.batch_size),
    )  # fmt: skip
    interval = 0.5 if sys.stderr.isatty() else 10
    bar = tqdm(total=every.steps, initial=trainer.step, unit="step", mininterval=interval, disable=not ranks.main)
    with bar, telling_of_dead_workers():
        for samples, labels in islice(batches, every.steps - trainer.step):
            metrics = trainer.train_step(samples, labels)
            step, last = trainer.step, trainer.step == every.steps
            received = max(ranks.on_all(lambda: max(signals, default=0)))
            evaluating = last or (every.eval_every and step % every.eval_every == 0)
            saving = last or received or step % every.save_every == 0
            logging = evaluating or step % every.log_every == 0
            if logging or saving or not metrics["skipped_steps"].is_cuda:  # A GPU is not waited for more often.
                with ranks.agreed():
                    check_finite(step, metrics, every.max_skipped_steps, checkpoints)
            timing = trainer.stopwatch.read(step - logged, trainer.images_per_step) if logging else {}
            trainer.stopwatch.enter("evaluation")
            if evaluating:
                quality = run.evaluate()
            if logging:
                logged = step
            if log is not None and logging:
                record = {"step": step} | to_record(metrics) | {"timing": timing}
                bar.set_postfix_str(run.describe(record, quality), refresh=False)
                log.write(record | (quality if evaluating else {}))
            bar.update()
            if saving:
                _save(run)
            trainer.stopwatch.enter("data")
            if received and not last:
                message = f"interrupted at step {step}, saved in {checkpoints}: the same command again goes on"
                with ranks.agreed():
                    raise Interrupted(message, received)
    return quality


def _save(run: Run[AnyConfig]) -> None:
    """Write checkpoint and model: all ranks gather their parts, and rank 0 writes."""
    state = run.trainer.state_dict()
    run.trainer.ranks.on_main(lambda: save_checkpoint(run.directory.checkpoints, state))
    run.save_model()


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
