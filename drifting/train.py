"""``python -m drifting.train [--config NAME|FILE] [--out DIR] [key=value ...]`` trains a generator.

With ``torchrun --nproc_per_node=K -m drifting.train ...`` K processes do it, on a GPU each.
"""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import drift_ops
from drift_ops.backends import OF_DEVICE

from .cli import parse_training_command, run_command
from .config import Config, LossConfig
from .data import Dataset, open_dataset
from .errors import UserError, explained
from .hub.run_directory import RunDirectory
from .hub.sources import load_mae
from .models import NETWORKS, FeatureStack
from .models.drifting_loss import build_extractor
from .models.network_files import build
from .training import DriftingTrainer, Ranks, join_ranks, loop
from .training.groups import PairGroups
from .training.memory import tell_memory
from .training.run_evaluation import GeneratorRun
from .utils.memory import keep_freed_memory
from .utils.named import check_arguments, facts_taken, import_named, is_own


def main(argv: Sequence[str] | None = None) -> int:
    config, out, asked = parse_training_command(argv, "train", "Train a generator.", Config, "digits")
    keep_freed_memory()
    with join_ranks() as ranks:
        train(config, out, ranks, asked)
    return 0


def train(config: Config, out: Path, ranks: Ranks = Ranks(), asked: Collection[str] = ()) -> None:  # noqa: B008
    """Train to ``config.train.steps`` in ``out``, from its newest checkpoint if it has one.

    All ``ranks`` take the steps; rank 0 evaluates and writes. ``asked`` are keys whose values change within the run.
    It raises as :func:`drifting.training.loop.opened_run` and :func:`drifting.training.loop.train`.
    """
    directory = RunDirectory(out)
    with loop.opened_run(directory, config, ranks, asked) as config:
        with ranks.agreed():
            dataset = open_dataset(config.data, config.seed, pairs=config.step.groups == "pairs")
            if ranks.main:
                print(dataset.describe(), file=sys.stderr)
            trainer = build_trainer(config, dataset, ranks)
        run = GeneratorRun(directory, trainer, dataset)
        with ranks.agreed():
            tell_memory(trainer)
        if ranks.main:
            tell_operator(trainer.device)
        loop.train(run)


def build_trainer(config: Config, dataset: Dataset, ranks: Ranks) -> DriftingTrainer:
    """The trainer of a configuration; raises UserError where network, extractor and data do not fit each other.

    The network gets the arguments of the section ``model`` and, of what the data say, those that it takes:
    ``num_classes``, ``sample_shape``, and of images ``in_chans`` and, where they are square, ``img_size``.
    """
    name, shape = config.model.name, dataset.sample_shape
    target = import_named(name, "model.name") if is_own(name) else NETWORKS[name]
    facts: dict[str, Any] = {"num_classes": dataset.num_classes, "sample_shape": list(shape)}
    if len(shape) == 3:
        facts |= {"in_chans": shape[0]} | ({"img_size": shape[1]} if shape[1] == shape[2] else {})
    check_arguments(target, config.model.keywords(), "model")
    arguments = facts_taken(target, facts) | config.model.keywords()
    loss = config.loss
    if ("mae" in loss.feature_extractor) != (loss.mae is not None):
        raise UserError(
            f"loss.mae is {loss.mae} and loss.feature_extractor {loss.feature_extractor}: "
            "expected both or neither to name a masked autoencoder"
        )
    torch.manual_seed(config.seed)
    model = build(target, arguments, "cpu")
    try:
        extractor = _extractor(loss, shape)
        trainer = DriftingTrainer(
            model, config, extractor, class_names=dataset.class_names, pixel_range=dataset.pixel_range, ranks=ranks,
            split=dataset.train, latent=dataset.latent, data=dataset.name, name=name, arguments=arguments,
        )  # fmt: skip
        if isinstance(trainer.groups, PairGroups):
            trainer.groups.see(torch.stack([torch.as_tensor(dataset.train[place][1]) for place in (0, -1)]))
    except ValueError as error:
        raise UserError(str(error)) from error
    if trainer.sample_shape != shape:
        made = list(trainer.sample_shape)
        raise UserError(f"model.name is {name}, which makes samples {made}, but the data have {list(shape)}: set its "
                        "arguments so that the two are alike")  # fmt: skip
    return trainer


def tell_operator(device: torch.device) -> None:
    """Say in one line on stderr where no compiled kernels compute the field on ``device``, and why."""
    found = drift_ops.backends()
    kernels = [found[name] for name in OF_DEVICE.get(device.type, ())]
    if not any(backend.usable for backend in kernels):
        reasons = "; ".join(f"{backend.name}: {backend.reason}" for backend in kernels) or f"{device.type} has no other"
        print(f"the dense reference, which is slow, computes the drifting field ({reasons})", file=sys.stderr)


def _extractor(config: LossConfig, shape: tuple[int, ...]) -> nn.Module:
    """The extractors that ``loss.feature_extractor`` names: ours, the configured autoencoder's, or a user's own."""
    in_chans = shape[0] if len(shape) == 3 else None
    named: list[tuple[str, nn.Module]] = []
    for name in config.feature_extractor:
        extractor: Any = name
        if is_own(name):
            own = import_named(name, "loss.feature_extractor")
            with explained(f"loss.feature_extractor is {name}"):
                extractor = own() if isinstance(own, type) else own
        elif name == "mae":
            try:
                mae = load_mae(str(config.mae))
            except UserError as error:
                raise UserError(f"loss.mae: {error}; `python -m drifting.pretrain` trains one") from error
            if mae.config["in_chans"] != in_chans:
                channels = mae.config["in_chans"]
                raise UserError(f"loss.mae is {config.mae}, of {channels} channels: the data have {in_chans}")
            extractor = mae.feature_extractor()
        named.append((name.rpartition(":")[2], build_extractor(extractor, in_chans)))
    return FeatureStack(named) if len(named) > 1 else named[0][1]


if __name__ == "__main__":
    run_command(main)
