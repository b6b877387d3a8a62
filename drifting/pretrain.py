"""``python -m drifting.pretrain [--config NAME|FILE] [--out DIR] [key=value ...]`` trains a masked autoencoder.

Its encoder gives the feature maps in which ``drifting.train`` compares images: ``loss.mae=DIR`` there.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .cli import parse_training_command, run_command
from .config import PretrainConfig
from .data import Dataset, open_dataset
from .errors import UserError
from .hub.run_directory import RunDirectory
from .hub.vae import LATENT_CHANNELS, decode_latents, encode_images
from .models import MAE
from .models.network_files import write_model
from .training import MAETrainer, Ranks, join_ranks, loop
from .training.loop import Quality
from .utils.images import save_panels, to_uint8
from .utils.memory import keep_freed_memory

TEST_IMAGES, TEST_BATCH = 2000, 250
ROWS, COLUMNS = 8, 8  # These are of a picture.


def main(argv: Sequence[str] | None = None) -> int:
    purpose = "Train a masked autoencoder."
    config, out, asked = parse_training_command(argv, "pretrain", purpose, PretrainConfig, "mae_fashion_mnist")
    keep_freed_memory()
    with join_ranks() as ranks:
        pretrain(config, out, ranks, asked)
    return 0


def pretrain(config: PretrainConfig, out: Path, ranks: Ranks = Ranks(), asked: Collection[str] = ()) -> None:  # noqa: B008
    """Train a masked autoencoder in ``out``, as :func:`drifting.train.train` does a generator."""
    directory = RunDirectory(out)
    with loop.opened_run(directory, config, ranks, asked) as config:
        dataset = open_dataset(config.data, config.seed)
        if ranks.main:
            print(dataset.describe(), file=sys.stderr)
        loop.train(MAERun(directory, build_trainer(config, dataset, ranks), dataset))


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


@dataclass
class MAERun(loop.Run[MAETrainer]):
    """Measures the averaged weights on evenly spaced test images, with the same masks each time, and draws pictures."""

    def __post_init__(self) -> None:
        split, config, device = self.dataset.test, self.trainer.config, self.trainer.device
        indices = range(0, len(split), -(-len(split) // TEST_IMAGES))
        parts = (split.samples(indices[at : at + TEST_BATCH]) for at in range(0, len(indices), TEST_BATCH))
        if config.step.latents:  # These are the means of their posteriors.
            parts = (encode_images(part.to(device))[0].cpu() for part in parts)
        self.images, self.labels = torch.cat(list(parts)), split.labels[list(indices)]
        (least, greatest), random = config.loss.mask_ratio_range, torch.Generator().manual_seed(0)
        try:
            self.masks = self.trainer.model.random_mask(self.images, least, greatest, random)
        except ValueError as error:
            raise UserError(f"model.patch_size, model.input_patch_size: {error}") from error

    def evaluate(self) -> Quality:
        return self.trainer.ranks.on_main(partial(self._measure, self.trainer.ema_model.eval())) or {}

    @torch.no_grad()
    def _measure(self, model: MAE) -> Quality:
        device = self.trainer.device
        self._save_picture(model, self.images[: ROWS * COLUMNS].to(device), self.masks[: ROWS * COLUMNS].to(device))
        batches = zip(*(part.split(TEST_BATCH) for part in (self.images, self.labels, self.masks)), strict=True)
        losses = [model(*(part.to(device) for part in batch)) for batch in batches]
        names = ("recon_loss", "cls_loss")
        return {f"{name}_test": float(torch.cat([batch[name] for batch in losses]).mean()) for name in names}

    def _save_picture(self, model: MAE, images: Tensor, masks: Tensor) -> None:
        """Test images, what the encoder sees of them, and the decoder's guess at the rest."""
        pixel_range, step = self.dataset.pixel_range, self.trainer.step
        assert pixel_range is not None
        hidden = F.interpolate(masks, images.shape[2:]).bool()
        panels = {
            "image": images,
            "visible": images.masked_fill(hidden, sum(pixel_range) / 2),
            "reconstruction": torch.where(hidden, model.reconstruct(images, masks), images),
        }
        try:
            if self.dataset.latent or self.trainer.config.step.latents:
                panels = {name: decode_latents(panel) for name, panel in panels.items()}
        except UserError as error:
            tqdm.write(f"no picture at step {step}: {error}", file=sys.stderr)
            return
        pixels = {name: to_uint8(panel, pixel_range) for name, panel in panels.items()}
        save_panels(pixels, COLUMNS, self.directory.samples / f"step_{step:08d}.png")

    def save_model(self) -> None:
        model, description = self.trainer.ema_model, {"data": self.dataset.name, "step": self.trainer.step}
        description["class_names"] = list(self.dataset.class_names)
        self.trainer.ranks.on_main(lambda: write_model(self.directory.path, model, description))

    def describe(self, record: dict[str, Any], quality: Quality) -> str:
        text = f"reconstruction={record['recon_loss']:.3f} class={record['cls_loss']:.3f} λ={record['lambda_cls']:.3f}"
        if quality:
            text += f" test: reconstruction={quality['recon_loss_test']:.3f} class={quality['cls_loss_test']:.3f}"
        return text

    def report(self, quality: Quality) -> None:
        print(f"\ntest images: reconstruction {quality['recon_loss_test']:.3f}, class {quality['cls_loss_test']:.3f}")
        print(f"pictures: {self.directory.samples}")
        print(f"next:     python -m drifting.train … loss.feature_extractor=mae loss.mae={self.directory.path}")


if __name__ == "__main__":
    run_command(main)
