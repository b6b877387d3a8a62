"""Training of the masked autoencoder whose encoder the drifting loss sees through."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..hub.vae import encode_images
from ..models import MAE
from ..utils.stopwatch import Stopwatch
from .distributed import Ranks
from .optimization import (
    adamw,
    average_of,
    clip_and_step,
    load_optimizer_state,
    load_schedule,
    optimizer_state,
    warmup_then_cosine,
)
from .parallel import averaging_gradients, distribute


class MAETrainer:
    """Trains a masked autoencoder as ``train_mae.py`` of the release: AdamW, clipped gradients, averaged weights.

    Each image hides squares of its own share, and the loss is (1 - λ) times the error of their reconstruction plus λ
    times the classification error. λ is ``lambda_cls`` until the last ``finetune_steps`` steps, in which it rises
    linearly from 0 over ``finetune_warmup_steps`` steps to ``finetune_lambda_cls``.

    Args:
        model: moved to ``device``.
        steps: length of the run.
        device: by default CUDA if there is one, else the CPU.
        mask_ratio_range: least and greatest share of the squares that an image hides.
        learning_rate, weight_decay: of AdamW; the rate rises over ``warmup_steps`` steps, then stays, or with
            ``cosine_decay`` falls along a cosine to 0 at the end.
        ema_decay: of the averaged weights.
        max_grad_norm: gradients are clipped to this norm.
        latents: what is learnt are the latents of the images, one draw from the posterior that the Stable Diffusion VAE
            has of each: so crops are of images, as in the release.
        images_at_once: images of a rank whose activations are held at once: a step in parts needs less memory and is
            the same step otherwise, but for dropout. None holds all.
        bf16: run the model under bfloat16 autocast; weights, optimiser and losses stay float32.
        seed: all randomness of step n derives from (seed, n). Every step seeds torch's global generators, which
            dropout draws from, so that a resumed run repeats an uninterrupted one.
        ranks: processes that take each step together, each with its share of the images. Without dropout the step is
            the same at any number of them, up to rounding.

    ``step`` counts the steps taken. ``stopwatch`` knows how long their phases took: "model", "communication" of
    metrics, "optimizer" and average, and between steps "data".

    A step whose loss or gradient is not finite leaves weights and optimizer as they are, and counts in
    ``skipped_steps``, a 0-d tensor.
    """

    def __init__(
        self,
        model: MAE,
        steps: int,
        device: torch.device | str | None = None,
        *,
        mask_ratio_range: Sequence[float] = (0.5, 0.5),
        lambda_cls: float = 0.0,
        finetune_steps: int = 0,
        finetune_warmup_steps: int = 1000,
        finetune_lambda_cls: float = 0.1,
        learning_rate: float = 4e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 4000,
        cosine_decay: bool = False,
        ema_decay: float = 0.9995,
        max_grad_norm: float = 2.0,
        latents: bool = False,
        images_at_once: int | None = None,
        bf16: bool = False,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device)
        self.mask_ratio_range, self.lambda_cls = mask_ratio_range, lambda_cls
        self.finetune_start, self.finetune_warmup_steps = steps - finetune_steps, finetune_warmup_steps
        self.finetune_lambda_cls, self.max_grad_norm = finetune_lambda_cls, max_grad_norm
        self.latents, self.images_at_once = latents, images_at_once
        self.bf16, self.seed, self.ranks = bf16, seed, ranks or Ranks()
        self.optimizer = adamw(model, learning_rate, weight_decay)
        self.scheduler = warmup_then_cosine(self.optimizer, warmup_steps, steps if cosine_decay else None)
        self.ema = average_of(model, ema_decay)
        self.distributed_model = distribute(model, [], self.ranks, sharded=False)
        self.step = 0
        self.skipped_steps = torch.zeros((), dtype=torch.long, device=self.device)
        self.images_per_step = 0  # of the last one, on all ranks
        self.stopwatch = Stopwatch(self.device)

    @property
    def ema_model(self) -> MAE:
        """The model with averaged weights."""
        return cast(MAE, self.ema.module)

    def lambda_at(self, step: int) -> float:
        """λ, the share of the classification error, in the step that ``step`` others came before."""
        since = step - self.finetune_start
        if since < 0:
            return self.lambda_cls
        return self.finetune_lambda_cls * min(1.0, since / max(1, self.finetune_warmup_steps))

    def train_step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One optimiser step on images ``[B, C, H, W]`` and labels ``[B]``, as many on each rank.

        Returns:
            0-d tensors, left on the device and the same on all ranks: the means of ``loss``, ``recon_loss`` and
            ``cls_loss``; ``lambda_cls``; ``grad_norm`` before clipping; ``skipped_steps``.
        """
        self.stopwatch.enter("model")
        self.images_per_step = len(images) * self.ranks.size
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        share = torch.full((), self.lambda_at(self.step), device=self.device)
        self.model.train()
        images, masks = self._draw_inputs(images)
        losses = self._backward(images, labels, masks, share)
        self.stopwatch.enter("communication")
        means = self.ranks.sum(torch.stack([loss.mean() for loss in losses.values()])) / self.ranks.size
        metrics = dict(zip(losses, means.unbind(), strict=True))
        self.stopwatch.enter("optimizer")
        grad_norm, skipped = clip_and_step(
            self.model, self.optimizer, self.scheduler, metrics["loss"], self.max_grad_norm
        )
        self.skipped_steps += skipped
        self.ema.update_parameters(self.model)
        self.step += 1
        self.stopwatch.enter("data")
        return metrics | {"lambda_cls": share, "grad_norm": grad_norm, "skipped_steps": self.skipped_steps.clone()}

    def _draw_inputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the model is given of this rank's images, and their masks; leaves torch's generators, which dropout
        draws from, at a seed of this step and rank.

        Masks and noise are drawn for the images of all ranks, on each.
        """
        moments = encode_images(images) if self.latents else None
        inputs = images if moments is None else moments[0]
        whole = inputs[:1].expand(len(images) * self.ranks.size, -1, -1, -1)
        mine = self.ranks.share(len(whole))
        least, greatest = self.mask_ratio_range
        seeds = np.random.SeedSequence([self.seed, self.step]).generate_state(1 + self.ranks.size).tolist()
        torch.manual_seed(seeds[0])
        masks = self.model.random_mask(whole, least, greatest)
        if moments is not None:
            inputs = inputs + moments[1] * torch.randn(whole.shape, device=whole.device)[mine]
        if self.ranks.rank:  # the first goes on where the draws ended, as one rank alone would
            torch.manual_seed(seeds[self.ranks.rank])
        return inputs, masks[mine]

    def _backward(self, images: Tensor, labels: Tensor, masks: Tensor, share: Tensor) -> dict[str, Tensor]:
        """The gradient of the mean loss, of a part of the images at a time; returns the losses ``[B]``, detached."""
        self.optimizer.zero_grad()
        size = self.images_at_once or len(images)
        parts = [slice(at, at + size) for at in range(0, len(images), size)]
        losses: list[dict[str, Tensor]] = []
        for part in parts:
            with averaging_gradients(self.distributed_model, part is parts[-1]):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    of_part = self.distributed_model(images[part], labels[part], masks[part], share)
                (of_part["loss"].sum() / len(images)).backward()
            losses.append({name: loss.detach() for name, loss in of_part.items()})
        return {name: torch.cat([of_part[name] for of_part in losses]) for name in losses[0]}

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes the rest of the run: tensors, and values of JSON."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "skipped_steps": self.skipped_steps,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a trainer that was created with the same arguments."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        load_schedule(self.scheduler, state["scheduler"])
        self.skipped_steps.copy_(state["skipped_steps"])
        self.step = state["step"]
