"""Train a generator, or go on with a run.

``python -m drifting.train [--config NAME|FILE] [--out DIR] [key=value ...]``; with
``torchrun --nproc_per_node=K -m drifting.train ...`` K processes do it, on a GPU each.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cli import parse_training_command, run_command
from .config import Config, LossConfig
from .data import Dataset, open_dataset
from .errors import UserError, reason
from .hub.run_directory import RunDirectory
from .hub.sources import load_mae
from .models import NETWORKS
from .training import DriftingTrainer, Ranks, join_ranks, loop
from .training.run_evaluation import RunEvaluation
from .utils.named import check_arguments, facts_taken, import_named, is_own


def main(argv: Sequence[str] | None = None) -> int:
    config, out, asked = parse_training_command(argv, "train", "Train a generator.", Config, "digits")
    loop.leave_a_core_free()
    with join_ranks() as ranks:
        train(config, out, ranks, asked)
    return 0


def train(config: Config, out: Path, ranks: Ranks = Ranks(), asked: Collection[str] = ()) -> None:  # noqa: B008
    """Train to ``config.train.steps`` in ``out``, from its newest checkpoint if it has one.

    All ``ranks`` take the steps; rank 0 evaluates and writes. ``asked`` are keys whose values change within the run.

    Raises:
        UserError: ``out`` is in use, belongs to another configuration or cannot be written.
        Interrupted: by Ctrl-C or SIGTERM; the run is saved.
    """
    directory = RunDirectory(out)
    with loop.opened_run(directory, config, ranks, asked) as config:
        dataset = open_dataset(config.data, config.seed)
        trainer = build_trainer(config, dataset, ranks)
        evaluation = RunEvaluation(config, directory, trainer, dataset)
        run = loop.Run(
            directory, config, trainer, dataset.train, evaluation.evaluate, evaluation.save_model, evaluation.describe
        )
        quality = loop.train(run)
        ranks.on_main(lambda: evaluation.report(quality))


def build_trainer(config: Config, dataset: Dataset, ranks: Ranks) -> DriftingTrainer:
    """The trainer of a configuration, with the network and the feature extractors that it names.

    Raises:
        UserError: network, extractor and data do not fit each other.
    """
    torch.manual_seed(config.seed)
    model, arguments = build_network(config, dataset)
    loss = config.loss
    if ("mae" in loss.feature_extractor) != (loss.mae is not None):
        raise UserError(
            f"loss.mae is {loss.mae} and loss.feature_extractor {loss.feature_extractor}: "
            "expected both or neither to name a masked autoencoder"
        )
    extractors = [_extractor(name, loss, dataset) for name in loss.feature_extractor]
    try:
        trainer = DriftingTrainer(
            model, config, extractors, class_names=dataset.class_names, pixel_range=dataset.pixel_range,
            latent=dataset.latent, data=dataset.name, origin=(config.model.name, arguments), ranks=ranks,
        )  # fmt: skip
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model.name={config.model.name}: {error}") from error
    if trainer.sample_shape != dataset.sample_shape:
        raise UserError(
            f"the network {config.model.name} makes samples {list(trainer.sample_shape)}, the data {dataset.name} have "
            f"{list(dataset.sample_shape)}: the two must be alike"
        )
    return trainer


def build_network(config: Config, dataset: Dataset) -> tuple[nn.Module, dict[str, Any]]:
    """The network that the section ``model`` names, and the arguments that it was built with.

    It gets the arguments of the section and, of what the data say, those that it takes: ``num_classes``,
    ``sample_shape`` and, of square images, ``img_size`` and ``in_chans``.
    """
    name, section = config.model.name, config.model
    target = import_named(name, "model.name") if is_own(name) else NETWORKS[name]
    facts: dict[str, Any] = {"num_classes": dataset.num_classes, "sample_shape": dataset.sample_shape}
    if len(dataset.sample_shape) == 3:
        channels, height, width = dataset.sample_shape
        facts |= {"in_chans": channels} | ({"img_size": height} if height == width else {})
    arguments = facts_taken(target, facts) | section.keywords()
    check_arguments(target, section.keywords(), "model")
    try:
        model = target(**arguments)
    except Exception as error:  # A user's network may raise anything.
        raise UserError(f"model: {name} cannot be built: {reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name is {name}, which gives a {type(model).__name__}, expected a torch.nn.Module")
    return model, {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}


def _extractor(name: str, config: LossConfig, dataset: Dataset) -> Any:
    """The extractor of that name: one of ours by its name, the configured autoencoder, or a user's own."""
    if is_own(name):
        own = import_named(name, "loss.feature_extractor")
        return own() if isinstance(own, type) else own
    if name != "mae":
        return name
    assert config.mae is not None
    try:
        mae = load_mae(config.mae)
    except UserError as error:
        raise UserError(f"loss.mae: {error}; `python -m drifting.pretrain` trains one") from error
    if mae.config["in_chans"] != dataset.sample_shape[0]:
        raise UserError(
            f"loss.mae is {config.mae}, of {mae.config['in_chans']} channels: the data have {dataset.sample_shape[0]}"
        )
    return mae.feature_extractor()


if __name__ == "__main__":
    run_command(main)
