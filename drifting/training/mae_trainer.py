"""Training of the masked autoencoder whose encoder the drifting loss sees through."""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..config import PretrainConfig
from ..generation import as_tensor
from ..hub.vae import encode_images
from ..models import MAE
from ..utils.stopwatch import Stopwatch
from .distributed import Ranks, averaging_gradients
from .groups import real_samples
from .optimization import TrainedWeights


class MAETrainer:
    """Trains a masked autoencoder as ``train_mae.py`` of the release: AdamW, clipped gradients, averaged weights.

    Each image hides squares of its own share, and the loss is (1 - λ) times the error of their reconstruction plus λ
    times the classification error. λ is ``lambda_cls`` until the last ``finetune_steps`` steps, in which it rises
    linearly from 0 over ``finetune_warmup_steps`` steps to ``finetune_lambda_cls``.

    ``ranks`` take each step together, each with its share of the images; without dropout the step is the same at any
    number of them, up to rounding. Device, randomness and ``stopwatch`` are as in :class:`DriftingTrainer`.
    """

    def __init__(
        self, model: MAE, config: PretrainConfig, device: torch.device | str | None = None, ranks: Ranks | None = None
    ) -> None:
        self.model, self.config, self.ranks = model, config, ranks or Ranks()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.weights = TrainedWeights(model, config, self.ranks, self.device)
        if config.step.compile:
            self.weights.distributed.compile()
        self.images_per_step = 0  # This is the number of the last step's images, on all ranks.
        self.stopwatch = Stopwatch(self.device)

    @property
    def step(self) -> int:
        return self.weights.step

    @property
    def ema_model(self) -> MAE:
        """The averaged network. All ranks ask for it together."""
        return cast(MAE, self.weights.average(self.config.optimizer.ema_decay))

    def lambda_at(self, step: int) -> float:
        """λ, the weight of the classification error, in the step that ``step`` others came before."""
        loss = self.config.loss
        since = step - (self.config.train.steps - loss.finetune_steps)
        rise = min(1.0, since / max(1, loss.finetune_warmup_steps))
        return loss.lambda_cls if since < 0 else loss.finetune_lambda_cls * rise

    def train_step(self, images: Any, labels: Any) -> dict[str, Tensor]:
        """Take one step on images ``[B, C, H, W]`` and integer labels ``[B]``, as many on each rank: tensors, arrays or
        lists. What cannot be used raises ValueError.

        It returns 0-d tensors, left on the device and the same on all ranks: the means of ``loss``, ``recon_loss`` and
        ``cls_loss``; ``lambda_cls``; ``grad_norm`` before clipping; ``skipped_steps``.
        """
        self.stopwatch.enter("model")
        images = real_samples(images).to(self.device, self.model.fc.weight.dtype, non_blocking=True)
        labels = as_tensor(labels).to(self.device, non_blocking=True)
        self.images_per_step = len(images) * self.ranks.size
        share = torch.full((), self.lambda_at(self.step), device=self.device, dtype=torch.float32)
        self.model.train()
        self.weights.optimizer.zero_grad()
        images, masks = self._draw_inputs(images)
        losses = self._backward(images, labels, masks, share)
        self.stopwatch.enter("communication")
        means = self.ranks.sum(torch.stack([loss.mean() for loss in losses.values()])) / self.ranks.size
        metrics = dict(zip(losses, means.unbind(), strict=True))
        self.stopwatch.enter("optimizer")
        metrics |= {"lambda_cls": share, "grad_norm": self.weights.update(metrics["loss"])}
        self.stopwatch.enter("data")
        return metrics | {"skipped_steps": self.weights.skipped_steps.clone()}

    def _draw_inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the model sees of this rank's images, and their masks. Both are drawn for all ranks, on each.

        With ``step.latents`` it sees one draw from the posterior that the Stable Diffusion VAE has of each image.
        Afterwards torch's generators, from which dropout draws, are at a seed of this step and rank.
        """
        moments = encode_images(images) if self.config.step.latents else None
        inputs = images if moments is None else moments[0]
        whole = inputs[:1].expand(len(images) * self.ranks.size, -1, -1, -1)
        mine = self.ranks.share(len(whole))
        seeds = np.random.SeedSequence([self.config.seed, self.step]).generate_state(1 + self.ranks.size).tolist()
        torch.manual_seed(seeds[0])
        least, greatest = self.config.loss.mask_ratio_range
        masks = self.model.random_mask(whole, least, greatest)
        if moments is not None:
            inputs = inputs + moments[1] * torch.randn(whole.shape, device=whole.device, dtype=whole.dtype)[mine]
        if self.ranks.rank:  # Rank 0 goes on where the draws ended, as one rank alone would.
            torch.manual_seed(seeds[self.ranks.rank])
        return inputs, masks[mine]

    def _backward(self, images: Tensor, labels: Tensor, masks: Tensor, share: Tensor) -> dict[str, Tensor]:
        """Add up the gradient of the mean loss, a part of the images at a time; return the losses ``[B]``, detached."""
        model, size = self.weights.distributed, self.config.step.images_at_once or len(images)
        losses: list[dict[str, Tensor]] = []
        for at in range(0, len(images), size):
            part = slice(at, at + size)
            with averaging_gradients(model, part.stop >= len(images)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.step.bf16):
                    of_part = model(images[part], labels[part], masks[part], share)
                (of_part["loss"].sum() / len(images)).backward()
            losses.append({name: loss.detach() for name, loss in of_part.items()})
        return {name: torch.cat([of_part[name] for of_part in losses]) for name in losses[0]}

    def state_dict(self) -> dict[str, Any]:
        return self.weights.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.load_state_dict(state)
