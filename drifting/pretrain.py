"""Train a masked autoencoder, or go on with a run.

``python -m drifting.pretrain [--config NAME|FILE] [--out DIR] [key=value ...]``. Its encoder gives the feature maps in
which ``drifting.train`` compares images: ``loss.mae=DIR`` there.
"""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .cli import parse_training_command, run_command
from .config import PretrainConfig
from .data import Dataset, Split, open_dataset
from .errors import UserError
from .hub.run_directory import RunDirectory, write_model
from .hub.vae import LATENT_CHANNELS, decode_latents, encode_images
from .models import MAE
from .training import MAETrainer, Ranks, join_ranks, loop
from .training.loop import Quality
from .utils.images import save_panels, to_uint8

TEST_IMAGES, TEST_BATCH = 2000, 250
ROWS, COLUMNS = 8, 8  # These are of a picture.


def main(argv: Sequence[str] | None = None) -> int:
    purpose = "Train a masked autoencoder."
    config, out, asked = parse_training_command(argv, "pretrain", purpose, PretrainConfig, "mae_fashion_mnist")
    loop.leave_a_core_free()
    with join_ranks() as ranks:
        pretrain(config, out, ranks, asked)
    return 0


def pretrain(
    config: PretrainConfig,
    out: Path,
    ranks: Ranks = Ranks(),  # noqa: B008
    asked: Collection[str] = (),
) -> None:
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
        images, labels, masks = _test_batch(config, dataset.test, trainer)

        def measure() -> Quality:
            _save_picture(directory, trainer, dataset, images[: ROWS * COLUMNS], masks[: ROWS * COLUMNS])
            return test_losses(trainer.ema_model, images, labels, masks)

        def save_model() -> None:
            write_model(directory, trainer.ema_model, {"data": dataset.name, "step": trainer.step})

        run = loop.Run(
            directory, config, trainer, dataset.train, evaluate=lambda: ranks.on_main(measure) or {},
            save_model=lambda: ranks.on_main(save_model), describe=_describe,
        )  # fmt: skip
        quality = loop.train(run)
        ranks.on_main(lambda: _report(quality, directory))


def _report(quality: Quality, run: RunDirectory) -> None:
    print(f"\ntest images: reconstruction {quality['recon_loss_test']:.3f}, class {quality['cls_loss_test']:.3f}")
    print(f"pictures: {run.samples}")
    print(f"next:     python -m drifting.train … loss.feature_extractor=mae loss.mae={run.path}")


@torch.no_grad()
def test_losses(model: MAE, images: Tensor, labels: Tensor, masks: Tensor) -> Quality:
    """Mean ``recon_loss_test`` and ``cls_loss_test`` of ``model``, which goes to evaluation mode, at these masks."""
    device = next(model.parameters()).device
    model.eval()
    batches = zip(*(part.split(TEST_BATCH) for part in (images, labels, masks)), strict=True)
    losses = [model(*(part.to(device) for part in batch)) for batch in batches]
    names = ("recon_loss", "cls_loss")
    return {f"{name}_test": float(torch.cat([batch[name] for batch in losses]).mean()) for name in names}


def build_trainer(config: PretrainConfig, dataset: Dataset, ranks: Ranks) -> MAETrainer:
    """The trainer of a configuration; raises UserError where the data do not fit it."""
    if config.step.latents and dataset.latent:
        raise UserError("step.latents is true, but the data are latents already: set it to false")
    if dataset.pixel_range is None:
        raise UserError(f"the data {dataset.name} are no images, which a masked autoencoder is for")
    torch.manual_seed(config.seed)
    channels = LATENT_CHANNELS if config.step.latents else dataset.sample_shape[0]
    model = MAE(in_chans=channels, num_classes=dataset.num_classes, **vars(config.model))
    return MAETrainer(model, config, ranks=ranks)


def _test_batch(config: PretrainConfig, split: Split, trainer: MAETrainer) -> tuple[Tensor, Tensor, Tensor]:
    """Evenly spaced test images as the model sees them, their labels and a mask of each: the same at every evaluation.

    Latents are the means of their posteriors.
    """
    indices = list(range(0, len(split), -(-len(split) // TEST_IMAGES)))
    parts = (split.samples(indices[at : at + TEST_BATCH]) for at in range(0, len(indices), TEST_BATCH))
    if config.step.latents:
        parts = (encode_images(part.to(trainer.device))[0].cpu() for part in parts)
    images = torch.cat(list(parts))
    generator = torch.Generator().manual_seed(0)
    least, greatest = config.loss.mask_ratio_range
    try:
        masks = trainer.model.random_mask(images, least, greatest, generator)
    except ValueError as error:
        raise UserError(f"model.patch_size, model.input_patch_size: {error}") from error
    return images, split.labels[indices], masks


@torch.no_grad()
def _save_picture(run: RunDirectory, trainer: MAETrainer, dataset: Dataset, images: Tensor, masks: Tensor) -> None:
    """Test images, what the encoder sees of them, and the decoder's guess at the rest."""
    images, masks, pixel_range = images.to(trainer.device), masks.to(trainer.device), dataset.pixel_range
    assert pixel_range is not None
    model = trainer.ema_model.eval()
    hidden = masks.repeat_interleave(images.shape[2] // masks.shape[2], 2)
    hidden = hidden.repeat_interleave(images.shape[3] // masks.shape[3], 3).bool()
    panels = {
        "image": images,
        "visible": images.masked_fill(hidden, sum(pixel_range) / 2),
        "reconstruction": torch.where(hidden, model.reconstruct(images, masks), images),
    }
    try:
        if dataset.latent or trainer.config.step.latents:
            panels = {name: decode_latents(panel) for name, panel in panels.items()}
    except UserError as error:
        tqdm.write(f"no picture at step {trainer.step}: {error}", file=sys.stderr)
        return
    pixels = {name: to_uint8(panel, pixel_range) for name, panel in panels.items()}
    save_panels(pixels, COLUMNS, run.samples / f"step_{trainer.step:08d}.png")


def _describe(record: dict[str, Any], quality: Quality) -> str:
    text = f"reconstruction={record['recon_loss']:.3f} class={record['cls_loss']:.3f} λ={record['lambda_cls']:.3f}"
    if quality:
        text += f" test: reconstruction={quality['recon_loss_test']:.3f} class={quality['cls_loss_test']:.3f}"
    return text


if __name__ == "__main__":
    run_command(main)
