"""Training of the masked autoencoder whose encoder the drifting loss sees through."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..models import MAE
from .trainer import BETAS, warmup_then_cosine

STATEFUL = ("model", "ema", "optimizer", "scheduler")


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
        bf16: run the model under bfloat16 autocast; weights, optimiser and losses stay float32.
        seed: all randomness of step n derives from (seed, n). Every step seeds torch's global generators, which
            dropout draws from, so that a resumed run repeats an uninterrupted one.

    ``step`` counts the steps taken.
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
        bf16: bool = False,
        seed: int = 0,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device)
        self.mask_ratio_range, self.lambda_cls = mask_ratio_range, lambda_cls
        self.finetune_start, self.finetune_warmup_steps = steps - finetune_steps, finetune_warmup_steps
        self.finetune_lambda_cls, self.max_grad_norm = finetune_lambda_cls, max_grad_norm
        self.bf16, self.seed = bf16, seed
        self.optimizer = torch.optim.AdamW(
            model.parameters(), learning_rate, BETAS, weight_decay=weight_decay, fused=True
        )
        self.scheduler = warmup_then_cosine(self.optimizer, warmup_steps, steps if cosine_decay else None)
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)).requires_grad_(False)
        self.step = 0

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
        """One optimiser step on images ``[B, C, H, W]`` and labels ``[B]``.

        Returns:
            0-d tensors, left on the device: the means of ``loss``, ``recon_loss`` and ``cls_loss``; ``lambda_cls``;
            ``grad_norm`` before clipping.
        """
        torch.manual_seed(int(np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0]))
        images, labels = images.to(self.device), labels.to(self.device)
        least, greatest = self.mask_ratio_range
        share = torch.full((), self.lambda_at(self.step), device=self.device)
        self.model.train()
        mask = self.model.random_mask(images, least, greatest)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.model(images, labels, mask, share)
        means = {name: loss.mean() for name, loss in losses.items()}
        self.optimizer.zero_grad()
        means["loss"].backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        return {name: mean.detach() for name, mean in means.items()} | {"lambda_cls": share, "grad_norm": grad_norm}

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes the rest of the run."""
        return {name: getattr(self, name).state_dict() for name in STATEFUL} | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a trainer that was created with the same arguments."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
