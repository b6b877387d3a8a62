"""What the training commands share: the run directory, the loop over steps, and how it ends."""

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from torch import Tensor
from tqdm import tqdm

from ..config import AnyConfig
from ..config.changes import config_in_force, keep_config
from ..data import Dataset, training_batches
from ..errors import Interrupted, UserError, reason, some_of
from ..hub.run_directory import RunDirectory
from .checkpoint import load_checkpoint, save_checkpoint
from .distributed import Ranks
from .mae_trainer import MAETrainer
from .metrics import MetricsLog, check_finite, to_record
from .trainer import DriftingTrainer

Quality = dict[str, float]
AnyTrainer = TypeVar("AnyTrainer", bound=DriftingTrainer | MAETrainer)


@dataclass
class Run(ABC, Generic[AnyTrainer]):
    """A run of a training command: where it is kept, what takes the steps, and what is done around them.

    ``evaluate`` measures the averaged weights and leaves a picture, ``save_model`` writes them: all ranks call these
    together. ``describe`` words the terms of a record and of the last measures that are worth watching, and ``report``
    prints the closing measures and what to do next.
    """

    directory: RunDirectory
    trainer: AnyTrainer
    dataset: Dataset

    @abstractmethod
    def evaluate(self) -> Quality: ...

    @abstractmethod
    def save_model(self) -> None: ...

    @abstractmethod
    def describe(self, record: dict[str, Any], quality: Quality) -> str: ...

    @abstractmethod
    def report(self, quality: Quality) -> None: ...


@contextmanager
def opened_run(run: RunDirectory, config: AnyConfig, ranks: Ranks, asked: Collection[str] = ()) -> Iterator[AnyConfig]:
    """The run directory is there and this run's alone, inside; gives the configuration, with changes made earlier.

    The user changes the keys in ``asked`` within the run. It raises UserError where the directory is in use or holds a
    run with a configuration that would train something else, or the ranks cannot share a batch.
    """
    batch = config.train.batch_size
    with ExitStack() as stack:
        with ranks.agreed():
            if batch % ranks.size:
                raise UserError(f"train.batch_size is {batch}, expected a multiple of the {ranks.size} ranks")
            ranks.on_main(lambda: run.samples.mkdir(parents=True, exist_ok=True))
            ranks.on_main(lambda: stack.enter_context(run.lock()))
            in_force = ranks.on_all(lambda: config_in_force(run.config, config, asked) if ranks.main else config)
        yield in_force[0]


def train(run: Run[AnyTrainer]) -> None:
    """Take the steps of a run from its newest checkpoint to the end: evaluate, log and save on the way, then report.

    A run that is at its end is evaluated again. It raises UserError where the checkpoint cannot be read, or is of a
    later step or of other classes, or loss or gradient are not finite. Where the data cannot be read, or a signal ends
    the run early, it is saved first; then that raises UserError or Interrupted.
    """
    trainer, directory, ranks = run.trainer, run.directory, run.trainer.ranks
    config: Any = trainer.config
    ranks.together(partial(_resume, run))
    ranks.on_main(lambda: keep_config(directory.config, config, trainer.step))
    if trainer.step == config.train.steps:
        quality = run.evaluate()
        run.save_model()  # It comes after the evaluation, which chooses among several averages.
    else:
        log = ranks.on_main(lambda: MetricsLog(directory.metrics, trainer.step, config.train.wandb, asdict(config)))
        with closing(log) if log else nullcontext(), _noting_signals(ranks) as signals:
            quality = _train_steps(run, log, signals)
    ranks.on_main(lambda: run.report(quality))


def _resume(run: Run[AnyTrainer]) -> None:
    """Bring the trainer to where the newest checkpoint is; every rank reads all of it."""
    trainer, checkpoints, names = run.trainer, run.directory.checkpoints, list(run.dataset.class_names)
    state = load_checkpoint(checkpoints)
    if state is not None and (kept := state.get("class_names", names)) != names:  # Earlier checkpoints have no names.
        trained = f"{run.directory.path} was trained on {len(kept)} classes ({some_of(kept)})"
        raise UserError(f"{trained}, the data now have {len(names)} ({some_of(names)}): choose another --out")
    try:
        if state is not None:
            trainer.load_state_dict(state)
    except Exception as error:  # A state of something else makes torch and the trainer raise errors of many classes.
        raise UserError(f"the checkpoint in {checkpoints} is of another trainer: {reason(error)}") from error
    if trainer.step > trainer.config.train.steps:
        at = f"{run.directory.path} is at step {trainer.step} already"
        raise UserError(f"{at}, expected train.steps of at least that")


def _train_steps(run: Run[AnyTrainer], log: MetricsLog | None, signals: list[int]) -> Quality:
    """Take the remaining steps. Only rank 0 has a log."""
    trainer, ranks, checkpoints = run.trainer, run.trainer.ranks, run.directory.checkpoints
    config, every = trainer.config, trainer.config.train
    quality: Quality = {}
    groups = trainer.groups if isinstance(trainer, DriftingTrainer) else None
    if groups is not None:
        groups.refill(trainer.step)
    trainer.stopwatch.take()
    trainer.stopwatch.enter("data")
    logged, size = trainer.step, every.batch_size
    batches = training_batches(
        run.dataset.train, size, config.seed, trainer.step * size, config.data.workers, ranks.share(size),
        stored=groups is not None and groups.split is not None,
    )  # fmt: skip
    interval = 0.5 if sys.stderr.isatty() else 10
    bar = tqdm(total=every.steps, initial=trainer.step, unit="step", mininterval=interval, disable=not ranks.main)
    saved = trainer.step
    with bar:
        while trainer.step < every.steps:
            with _saved_before_errors(run, saved):
                samples, labels = _next_batch(run, batches, signals)
            metrics = trainer.train_step(samples, labels)
            step, last = trainer.step, trainer.step == every.steps
            evaluating = last or (every.eval_every and step % every.eval_every == 0)
            saving = last or step % every.save_every == 0
            logging = evaluating or step % every.log_every == 0
            if logging or saving or not metrics["skipped_steps"].is_cuda:  # A GPU is not waited for more often.
                with ranks.agreed():
                    check_finite(step, metrics, every.max_skipped_steps, checkpoints)
            timing = trainer.stopwatch.read(step - logged, trainer.images_per_step) if logging else {}
            trainer.stopwatch.enter("evaluation")
            quality = run.evaluate() if evaluating else quality
            logged = step if logging else logged
            broken = _broken_images(run) if logging and config.data.skip_broken else {}
            if log is not None and logging:
                rate = trainer.weights.learning_rate(step - 1)  # The step that was just taken had this one.
                record = {"step": step, "learning_rate": rate} | to_record(metrics) | broken | {"timing": timing}
                bar.set_postfix_str(run.describe(record, quality), refresh=False)
                log.write(record | (quality if evaluating else {}))
            bar.update()
            if saving:
                _save(run)
                saved = step
            trainer.stopwatch.enter("data")
    return quality


def _next_batch(run: Run[AnyTrainer], batches: Iterator[Any], signals: list[int]) -> tuple[Tensor, Tensor]:
    """Read this rank's part of the next batch; what fails on one rank, or a signal that it received, raises on all."""
    trainer, batch = run.trainer, list[tuple[Tensor, Tensor]]()

    def read() -> int:
        batch.append(next(batches))
        return max(signals, default=0)

    with trainer.ranks.agreed():
        if received := max(trainer.ranks.on_all(read)):
            raise Interrupted(f"interrupted at step {trainer.step}{_goes_on(run)}", received)
    return batch[0]


@contextmanager
def _saved_before_errors(run: Run[AnyTrainer], saved: int) -> Iterator[None]:
    """Save what has been trained since the step ``saved`` before an error inside ends the run, on all ranks."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if run.trainer.step > saved:
            _save(run)
        if isinstance(error, UserError) and run.trainer.step:
            raise UserError(f"{error}; the run ends at step {run.trainer.step}{_goes_on(run)}") from error
        raise


def _goes_on(run: Run[AnyTrainer]) -> str:
    saved = f", saved in {run.directory.checkpoints}" if run.trainer.step else ""
    return f"{saved}: the same command again goes on"


def _save(run: Run[AnyTrainer]) -> None:
    state = run.trainer.state_dict() | {"class_names": list(run.dataset.class_names)}
    run.trainer.ranks.on_main(partial(save_checkpoint, run.directory.checkpoints, state))
    run.save_model()


def _broken_images(run: Run[AnyTrainer]) -> dict[str, int]:
    """Count the training images, on all ranks, whose place others have taken since this command began."""
    return {"broken_images": len(set().union(*run.trainer.ranks.on_all(lambda: run.dataset.train.broken)))}


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
