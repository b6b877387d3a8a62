"""The training step of Algorithm 1 of the paper (arXiv 2602.04770), and the trainer around it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ..data.sample_queue import SampleQueue
from ..generation import Generator
from ..models import DriftingDiT, DriftingLoss
from ..utils.stopwatch import Stopwatch
from .accumulation import backward_in_parts
from .distributed import Ranks
from .guidance import sample_cfg_scale, uncond_weight
from .optimization import (
    adamw,
    average_of,
    clip_and_step,
    load_optimizer_state,
    load_schedule,
    optimizer_state,
    warmup_then_cosine,
)
from .parallel import averaging_gradients, distribute, unsharded


class DriftingTrainer:
    """Trains a generator by drifting, one class-grouped step at a time.

    A step takes ``labels_per_step`` labels, generates ``gen_per_label`` images of each, and pulls them towards
    ``pos_per_label`` real images of that label and away from each other and, where the label's guidance scale α is
    above 1, from ``uncond_per_label`` real images of any label.

    Args:
        model: generator, called as ``model(z, y, cfg_scale=..., style=...)``.
        loss_fn: the drifting loss.
        optimizer, scheduler: of ``model``, the optimizer fused; the scheduler is stepped once a training step.
        averages: of the weights of ``model``, by their decay, one or several.
        sample_queue: source of the real images.
        labels_per_step, gen_per_label, pos_per_label, uncond_per_label: sizes of a step, each at least 1.
        cfg_scale_range, cfg_exponent, uncond_prob: distribution of α, see :func:`sample_cfg_scale`.
        max_grad_norm: gradients are clipped to this norm.
        pixel_range: least and greatest value of an image; generated values are clamped to it. None does not clamp.
        seed: all randomness of step n derives from (seed, n), so that a resumed run repeats an uninterrupted one.
        device: of the model.
        labels_at_once: labels whose activations are held at once, see :func:`backward_in_parts`; None holds all.
        bf16: run the generator under bfloat16 autocast; its weights stay float32.
        ranks: that take each step together, each for its share of the labels. The step is the same at any number of
            them, up to rounding: statistics, gradients and queues are those of all.
        distributed_model: ``model`` as the ranks train it, see :func:`distribute`.

    ``step`` counts the steps taken; ``best_decay`` says which average :meth:`generate` uses, and whoever evaluates them
    may set it. ``stopwatch`` knows how long the phases of the steps took: "communication" of images and metrics,
    "generator", "encoder" and "operator" forward and backward, with the exchange of statistics and gradients,
    "optimizer" and averages, "other", and between steps "data".

    A step whose loss or gradient is not finite leaves weights and optimizer as they are, and counts in
    ``skipped_steps``, a 0-d tensor.
    """

    def __init__(
        self,
        model: DriftingDiT,
        loss_fn: DriftingLoss,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        averages: Mapping[float, AveragedModel],
        sample_queue: SampleQueue,
        *,
        labels_per_step: int,
        gen_per_label: int,
        pos_per_label: int,
        uncond_per_label: int,
        cfg_scale_range: tuple[float, float],
        cfg_exponent: float,
        uncond_prob: float,
        max_grad_norm: float,
        pixel_range: tuple[float, float] | None,
        seed: int,
        device: torch.device,
        labels_at_once: int | None,
        bf16: bool,
        ranks: Ranks,
        distributed_model: nn.Module,
    ) -> None:
        self.model, self.loss_fn, self.optimizer, self.scheduler = model, loss_fn, optimizer, scheduler
        self.sample_queue = sample_queue
        self.labels_per_step, self.gen_per_label = labels_per_step, gen_per_label
        self.pos_per_label, self.uncond_per_label = pos_per_label, uncond_per_label
        self.cfg_scale_range, self.cfg_exponent, self.uncond_prob = cfg_scale_range, cfg_exponent, uncond_prob
        self.max_grad_norm, self.pixel_range, self.seed, self.device = max_grad_norm, pixel_range, seed, device
        self.labels_at_once, self.bf16 = labels_at_once, bf16
        self.ranks, self.distributed_model = ranks, distributed_model
        self.averages = averages
        self.best_decay = next(iter(averages))
        self.step = 0
        self.skipped_steps = torch.zeros((), dtype=torch.long, device=device)
        self.stopwatch = loss_fn.stopwatch = Stopwatch(device)
        self.class_names: tuple[int | str, ...] = ()
        self.latent, self.data = False, ""

    @property
    def images_per_step(self) -> int:
        """Images that a step generates, on all ranks."""
        return self.labels_per_step * self.gen_per_label

    @property
    def ema_models(self) -> dict[float, DriftingDiT]:
        """The model with averaged weights, by the decay of the average. All ranks ask for them together."""
        return {decay: unsharded(cast(DriftingDiT, average.module)) for decay, average in self.averages.items()}

    @property
    def ema_model(self) -> DriftingDiT:
        """The model with the averaged weights of ``best_decay``. All ranks ask for it together."""
        return unsharded(cast(DriftingDiT, self.averages[self.best_decay].module))

    def train_step(self, images: Tensor, labels: Tensor, use_cfg_training: bool = True) -> dict[str, Tensor]:
        """Put a batch of real images into the queue, then take one optimiser step.

        Args:
            images: real images ``[B, C, H, W]``, as many on each rank.
            labels: integer labels ``[B]``.
            use_cfg_training: whether to draw guidance scales; otherwise every α is 1 and no label needs negatives.

        Returns:
            0-d tensors, left on the device and the same on all ranks: ``loss``, ``grad_norm`` (before clipping),
            ``sample_spread`` (standard deviation of the generated images of a label over that of the real ones; 0 is
            collapse, 1 is right), ``skipped_steps``, and what the loss reports of each feature map.
        """
        self.stopwatch.enter("communication")
        images, labels = self.ranks.gather(images.to(self.device, non_blocking=True)), self.ranks.gather(labels.cpu())
        self.stopwatch.enter("other")
        self.sample_queue.add(images, labels)
        self.model.train()
        self.optimizer.zero_grad()
        gen, pos, loss, info = self._backward(use_cfg_training)
        self.stopwatch.enter("communication")
        with torch.no_grad():
            terms = torch.stack([loss, gen.std(1).mean(), pos.std(1).mean()])
            loss, spread, spread_of_real = self.ranks.sum(terms * (len(gen) / self.labels_per_step))
        self.stopwatch.enter("optimizer")
        metrics = {"loss": loss, "grad_norm": self._update(loss), "sample_spread": spread / spread_of_real}
        self.stopwatch.enter("data")
        return metrics | {"skipped_steps": self.skipped_steps.clone()} | info

    def _backward(self, use_cfg_training: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The gradient of the parameters; returns generated images, positives and the loss of this rank's labels, and
        what the loss reports.

        What a step draws is drawn for the labels of all ranks, on each, but for the noise: a label has its own.
        """
        host, seeds = self._randomness()
        L, U = self.labels_per_step, self.uncond_per_label
        mine = self.ranks.share(L)  # [l]
        label = self._draw_labels(host)  # [L]
        pos = self.sample_queue.sample(label, self.pos_per_label, host, mine).to(self.device)  # [l, P, C, H, W]
        cfg_scale = torch.ones(L)  # on the host
        if use_cfg_training:
            cfg_scale = sample_cfg_scale(L, self.cfg_scale_range, self.cfg_exponent, self.uncond_prob, host)
        uncond = weight = None
        if cfg_scale.max() > 1:
            uncond = self.sample_queue.sample_unconditional(L * U, host, slice(mine.start * U, mine.stop * U))
            uncond = uncond.to(self.device).unflatten(0, (-1, U))  # [l, U, C, H, W]
            weight = uncond_weight(cfg_scale[mine], self.gen_per_label, U).to(self.device)
        inputs = self._draw_inputs(label[mine], cfg_scale[mine], seeds[mine])
        return self._backward_of_labels(inputs, pos, uncond, weight)

    def _backward_of_labels(
        self, inputs: list[Tensor | None], pos: Tensor, uncond: Tensor | None, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """As :meth:`_backward`, given what was drawn for this rank's labels, which may be held a few at a time."""
        # the gradient of a mean over all labels, of which the ranks will average: over theirs, where all have as many
        share = len(pos) * self.ranks.size / self.labels_per_step
        if self.labels_at_once is None or self.labels_at_once >= len(pos):
            gen = self._generate(inputs, slice(None))  # [l, G, C, H, W]
            loss, info = self.loss_fn.loss_and_info(gen, pos, uncond, weight)
            (loss * share).backward()
            return gen, pos, loss, info
        fixed = pos if uncond is None else torch.cat([pos, uncond], 1)
        num_uncond = fixed.shape[1] - self.pos_per_label
        weights = (fixed.new_ones(len(pos)) if weight is None else weight).unsqueeze(1).expand(-1, num_uncond)
        gen, loss, info = backward_in_parts(
            self.loss_fn, lambda part: self._generate(inputs, part), fixed, self.pos_per_label, weights,
            self.labels_at_once, share, partial(averaging_gradients, self.distributed_model),
        )  # fmt: skip
        return gen, pos, loss, info

    def _update(self, loss: Tensor) -> Tensor:
        """One step of the optimiser, if loss and gradient are finite, and of the averages; the norm of the gradient
        before clipping."""
        grad_norm, skipped = clip_and_step(self.model, self.optimizer, self.scheduler, loss, self.max_grad_norm)
        self.skipped_steps += skipped
        for average in self.averages.values():
            average.update_parameters(self.model)
        self.step += 1
        return grad_norm

    def train_epoch(
        self, dataloader: Iterable[tuple[Tensor, Tensor]], use_cfg_training: bool = True
    ) -> dict[str, float]:
        """One step for each batch ``(images, labels)`` of ``dataloader``.

        Returns:
            ``avg_loss`` and the averages of ``grad_norm`` and ``sample_spread`` over the epoch, and ``num_steps``.
            The loss is constant by construction (each λ is normalised): watch the spread.

        Raises:
            ValueError: the dataloader yields nothing.
        """
        logged = ("loss", "grad_norm", "sample_spread")
        sums = torch.zeros(len(logged), device=self.device)
        num_steps = 0
        for images, labels in tqdm(dataloader, desc="train_epoch", leave=False, disable=None):
            metrics = self.train_step(images, labels, use_cfg_training)
            sums += torch.stack([metrics[name] for name in logged])
            num_steps += 1
        if not num_steps:
            raise ValueError("the dataloader yielded no batch, expected batches of (images, labels)")
        averages = dict(zip(logged, (sums / num_steps).tolist(), strict=True))
        return {"avg_loss": averages.pop("loss"), "num_steps": num_steps} | averages

    def generate(
        self,
        batch_size: int,
        labels: Tensor | None = None,
        cfg_scale: float | Tensor = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Images ``[batch_size, C, H, W]`` of the averaged model in one step; see :meth:`DriftingDiT.generate`."""
        return self.generator_of(self.ema_model).generate(batch_size, labels, cfg_scale, generator=generator)

    def generator_of(self, model: DriftingDiT) -> Generator:
        """``model``, an average of this trainer, with what is known of its samples."""
        sample_shape = (model.out_chans, model.img_size, model.img_size)
        return Generator(
            model, model.noise_shape, sample_shape, self.class_names or tuple(map(str, range(model.num_classes))),
            self.pixel_range, self.latent, self.data, self.step, "drifting_dit", model.config,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything that shapes the rest of the run: weights, averages, optimiser, schedule, queue, step.

        Tensors, in shards where the model's are, and values of JSON.
        """
        return {
            "model": self.model.state_dict(),
            "averages": {str(decay): average.state_dict() for decay, average in self.averages.items()},
            "best_decay": self.best_decay,
            "optimizer": optimizer_state(self.model, self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "sample_queue": self.sample_queue.state_dict(),
            "skipped_steps": self.skipped_steps,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict` of a trainer that was created with the same arguments."""
        for decay, average in self.averages.items():
            average.load_state_dict(state["averages"][str(decay)])
        self.best_decay = state["best_decay"]
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        load_schedule(self.scheduler, state["scheduler"])
        self.sample_queue.load_state_dict(state["sample_queue"])
        self.skipped_steps.copy_(state["skipped_steps"])
        self.step = state["step"]

    def _randomness(self) -> tuple[torch.Generator, list[int]]:
        """This step's: a generator on the host for what is chosen there, and a seed for the noise of each label."""
        seed, *seeds = np.random.SeedSequence([self.seed, self.step]).generate_state(1 + self.labels_per_step).tolist()
        return torch.Generator().manual_seed(seed), seeds

    def _draw_labels(self, generator: torch.Generator) -> Tensor:
        """Labels ``[labels_per_step]`` of the queue's classes, none twice while they last."""
        available = self.sample_queue.available_labels
        order = torch.randperm(len(available), generator=generator)
        return available[order[torch.arange(self.labels_per_step) % len(available)]]

    def _draw_inputs(self, label: Tensor, cfg_scale: Tensor, seeds: list[int]) -> list[Tensor | None]:
        """What the model is given for the ``gen_per_label`` images of each label ``[l]``, label after label: noise,
        label, scale and style."""
        model, num = self.model, self.gen_per_label
        noise = torch.Generator(self.device)
        z, style = [], []
        for seed in seeds:
            noise.manual_seed(seed)
            z.append(
                torch.randn(num, model.in_chans, model.img_size, model.img_size, generator=noise, device=self.device)
            )
            size = (num, model.num_style_tokens)
            style.append(torch.randint(model.style_vocab, size, generator=noise, device=self.device))
        y = label.to(self.device).repeat_interleave(num)
        alpha = cfg_scale.to(self.device).repeat_interleave(num)
        return [torch.cat(z), y, alpha, torch.cat(style) if model.num_style_tokens else None]

    def _generate(self, inputs: list[Tensor | None], part: slice) -> Tensor:
        """Images ``[l, G, C, H, W]`` of those labels of this rank's."""
        self.stopwatch.enter("generator")
        grouped = [None if values is None else values.unflatten(0, (-1, self.gen_per_label)) for values in inputs]
        z, y, alpha, style = (None if values is None else values[part].flatten(0, 1) for values in grouped)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            images = self.distributed_model(z, y, alpha, style).float()
        self.stopwatch.enter_at_gradient(images, "generator")
        return self._clamp(images).unflatten(0, (-1, self.gen_per_label))

    def _clamp(self, images: Tensor) -> Tensor:
        return images if self.pixel_range is None else images.clamp(*self.pixel_range)


def create_trainer(
    model: DriftingDiT,
    feature_extractor: str | Sequence[str] | nn.Module = "latent",
    learning_rate: float = 1e-4,
    device: torch.device | str | None = None,
    queue_size: int = 128,
    cfg_scale_range: Sequence[float] = (1.0, 7.5),
    uncond_prob: float = 0.1,
    *,
    cfg_exponent: float = 3.0,
    temperatures: Sequence[float] = (0.02, 0.05, 0.2),
    affinity_floor: float = 0.0,
    labels_per_step: int = 4,
    gen_per_label: int = 32,
    pos_per_label: int = 32,
    uncond_per_label: int = 16,
    unconditional_queue_size: int = 1000,
    queue_device: torch.device | str | None = None,
    weight_decay: float = 0.01,
    warmup_steps: int = 1000,
    decay_steps: int | None = None,
    ema_decay: float | Sequence[float] = 0.999,
    max_grad_norm: float = 2.0,
    pixel_range: tuple[float, float] | None = None,
    seed: int = 0,
    labels_at_once: int | None = None,
    bf16: bool = False,
    compile: bool = False,
    activation_checkpointing: bool = False,
    ranks: Ranks | None = None,
    fsdp: bool = False,
) -> DriftingTrainer:
    """A trainer with its loss, queue, AdamW and schedule.

    The learning rate rises linearly over ``warmup_steps`` steps, then stays (``decay_steps=None``) or falls along a
    cosine to 0 at step ``decay_steps``.

    Args:
        model: the generator; moved to ``device``.
        feature_extractor: where distances are taken: ``'latent'``, ``'pixels'``, ``'resnet18'``, a list of these, or a
            module.
        learning_rate: after the warm-up.
        device: by default CUDA if there is one, else the CPU.
        queue_size: real images kept a class.
        cfg_scale_range: least and greatest guidance scale α to train for.
        uncond_prob: share of labels trained without guidance, at α = 1.
        cfg_exponent: of the power law that the other scales follow.
        temperatures, affinity_floor: of the drifting loss.
        labels_per_step, gen_per_label, pos_per_label, uncond_per_label: sizes of a step; the paper's ablation uses
            64 labels, 64 generated and 64 positive images and 16 unconditional ones.
        unconditional_queue_size: real images kept over all classes.
        queue_device: where they are kept; None is ``device``. 128 images of 256 × 256 for each of 1000 classes are 101
            GB, for which the host may have room, on every rank.
        weight_decay, max_grad_norm: the release's values by default.
        ema_decay: of the averaged weights; several make as many averages, of which an evaluation may choose the best.
        pixel_range: least and greatest value of an image. Real pixels pile up at both ends; clamping generated ones
            before the loss lets them do so too. None, for latents, does not clamp.
        seed: of all randomness in training. The model's initial weights are the caller's.
        labels_at_once: labels whose activations are held at once: a step in parts needs less memory and the time of
            one more forward pass, and is the same step otherwise. None holds all.
        bf16: run generator and feature extractor under bfloat16 autocast. Weights, optimiser, distances and loss stay
            float32; feature maps are bfloat16.
        compile: let torch.compile optimise both networks, which delays the first steps.
        activation_checkpointing: keep the generator's activations between its blocks only and compute those inside a
            second time in the backward: less memory, more time.
        ranks: processes that train together, from :func:`drifting.ranks.join_ranks`; each creates this trainer with the
            same arguments and the same initial weights. None trains in this process alone.
        fsdp: keep weights, averages and optimizer in shards, one a rank (FSDP2), instead of whole on each (DDP).

    Raises:
        ValueError: an argument out of its range, named with its value.
    """
    ranks = ranks or Ranks()
    ema_decays = (ema_decay,) if isinstance(ema_decay, (int, float)) else tuple(ema_decay)
    _check_arguments(
        positive={
            "learning_rate": learning_rate, "max_grad_norm": max_grad_norm, "labels_per_step": labels_per_step,
            "gen_per_label": gen_per_label, "pos_per_label": pos_per_label, "uncond_per_label": uncond_per_label,
        },
        share={"uncond_prob": [uncond_prob], "ema_decay": ema_decays},
        cfg_scale_range=tuple(cfg_scale_range),
    )  # fmt: skip
    _check_shares(labels_per_step, labels_at_once, ranks)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = model.to(where)
    loss_fn = DriftingLoss(
        feature_extractor, tuple(temperatures), affinity_floor=affinity_floor, in_chans=model.out_chans, bf16=bf16,
        process_group=ranks.group,
    ).to(where)  # fmt: skip
    averages = {decay: average_of(model, decay) for decay in ema_decays}
    model.activation_checkpointing = activation_checkpointing
    distributed = distribute(model, [average.module for average in averages.values()], ranks, fsdp)
    if compile:
        distributed.compile()
        loss_fn.feature_extractor.compile()
    optimizer = adamw(model, learning_rate, weight_decay)
    queue = SampleQueue(
        queue_size, model.num_classes, (model.out_chans, model.img_size, model.img_size), queue_device or where,
        unconditional_queue_size,
    )  # fmt: skip
    return DriftingTrainer(
        model, loss_fn, optimizer, warmup_then_cosine(optimizer, warmup_steps, decay_steps), averages, queue,
        labels_per_step=labels_per_step, gen_per_label=gen_per_label, pos_per_label=pos_per_label,
        uncond_per_label=uncond_per_label, cfg_scale_range=(cfg_scale_range[0], cfg_scale_range[1]),
        cfg_exponent=cfg_exponent, uncond_prob=uncond_prob, max_grad_norm=max_grad_norm, pixel_range=pixel_range,
        seed=seed, device=where, labels_at_once=labels_at_once, bf16=bf16, ranks=ranks, distributed_model=distributed,
    )  # fmt: skip


def _check_shares(labels_per_step: int, labels_at_once: int | None, ranks: Ranks) -> None:
    """Each rank needs a label; where they are taken in parts, as many as the others, to meet them in each part."""
    if labels_per_step < ranks.size:
        raise ValueError(f"labels_per_step is {labels_per_step}, expected at least the {ranks.size} ranks")
    if labels_at_once is not None and labels_per_step % ranks.size:
        raise ValueError(
            f"labels_per_step is {labels_per_step}, expected a multiple of the {ranks.size} ranks with labels_at_once"
        )


def _check_arguments(
    positive: dict[str, float], share: dict[str, Sequence[float]], cfg_scale_range: tuple[float, ...]
) -> None:
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, expected a positive number")
    for name, values in share.items():
        if not values or not all(0 <= value <= 1 for value in values):
            raise ValueError(f"{name} is {', '.join(map(str, values))}, expected a number from 0 to 1")
    if len(cfg_scale_range) != 2 or not 1 <= cfg_scale_range[0] <= cfg_scale_range[1] < math.inf:
        raise ValueError(f"cfg_scale_range is {cfg_scale_range}, expected (least, greatest), from 1 up")
