"""``python -m drifting.train [--config NAME|FILE] [--out DIR] [key=value ...]``: train a generator or resume it.

``torchrun --nproc_per_node=K -m drifting.train ...`` does it with K processes, on a GPU each.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cli import run_command
from .config.schema import Config, LossConfig
from .data import Dataset, open_dataset
from .errors import UserError
from .hub.run_directory import RunDirectory
from .hub.sources import load_mae
from .models import DriftingDiT, FeatureStack
from .models.drifting_loss import build_extractor
from .training import DriftingTrainer, create_trainer
from .training.distributed import Ranks, join_ranks
from .training.loop import Task, leave_a_core_free, opened_run, parse_command, run_training
from .training.run_evaluation import RunEvaluation


def main(argv: Sequence[str] | None = None) -> int:
    config, out = parse_command(argv, "train", "Train a generator.", Config, "digits")
    leave_a_core_free()
    with join_ranks() as ranks:
        train(config, out, ranks)
    return 0


def train(config: Config, out: Path, ranks: Ranks = Ranks()) -> None:  # noqa: B008
    """Train to ``config.train.steps`` in ``out``, from its newest checkpoint if it has one.

    All ``ranks`` take the steps; rank 0 evaluates and writes.

    Raises:
        UserError: ``out`` is in use, belongs to another configuration or cannot be written.
        Interrupted: by Ctrl-C or SIGTERM; the run is saved.
    """
    run = RunDirectory(out)
    with opened_run(run, config, ranks):
        dataset = open_dataset(config.data, config.seed)
        trainer = build_trainer(config, dataset, ranks)
        evaluation = RunEvaluation(config, run, trainer, dataset)
        task = Task(
            trainer=trainer,
            split=dataset.train,
            evaluate=evaluation.evaluate,
            save_model=evaluation.save_model,
            describe=evaluation.describe,
        )
        quality = run_training(config, run, task)
        ranks.on_main(lambda: evaluation.report(quality))


def build_trainer(config: Config, dataset: Dataset, ranks: Ranks) -> DriftingTrainer:
    channels, size, _ = dataset.sample_shape
    torch.manual_seed(config.seed)
    model_arguments = {k: v for k, v in vars(config.model).items() if k not in ("name", "arguments")}
    try:
        model = DriftingDiT(img_size=size, in_chans=channels, num_classes=dataset.num_classes, **model_arguments)
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    settings: dict[str, Any] = vars(config.loss) | vars(config.step) | vars(config.guidance) | vars(config.optimizer)
    del settings["mae"]
    settings["feature_extractor"] = _feature_extractor(config.loss, channels)
    decay_steps = config.train.steps if settings.pop("cosine_decay") else None
    value_range = dataset.pixel_range if settings.pop("clamp") and not dataset.latent else None
    try:
        trainer = create_trainer(
            model, decay_steps=decay_steps, pixel_range=value_range, seed=config.seed, ranks=ranks, **settings
        )
        trainer.class_names, trainer.latent, trainer.data = dataset.class_names, dataset.latent, dataset.name
        trainer.pixel_range = trainer.pixel_range or dataset.pixel_range
        return trainer
    except ValueError as error:
        raise UserError(f"step.{error}") from error


def _feature_extractor(config: LossConfig, in_chans: int) -> nn.Module:
    """The extractors of those names: one as it is, several as a stack."""
    extractors = {name: build_extractor(name, in_chans) for name in config.feature_extractor if name != "mae"}
    if config.mae is not None:
        try:
            mae = load_mae(config.mae)
        except UserError as error:
            raise UserError(f"loss.mae: {error}; `python -m drifting.pretrain` trains one") from error
        if mae.config["in_chans"] != in_chans:
            raise UserError(f"loss.mae is {config.mae}, of {mae.config['in_chans']} channels: the data have {in_chans}")
        extractors["mae"] = mae.feature_extractor()
    return FeatureStack(extractors) if len(extractors) > 1 else next(iter(extractors.values()))


if __name__ == "__main__":
    run_command(main)
