"""Which samples a step compares: by class, the generated and the real samples of a label.

This is one replaceable part of the trainer: :class:`ClassGroups` says what goes into each group of a step, and the
trainer generates, compares and optimises.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import Config, GuidanceConfig
from ..data import SampleQueue
from ..data.own import ALL, distinct_labels, number_labels, tell_numbers
from ..generation import ClassNames, Labels, class_numbers
from .distributed import Ranks


@dataclass(frozen=True)
class Groups:
    """What a rank compares in a step: l groups, each of one label.

    Args:
        label: class numbers ``[l]``, on the host.
        cfg_scale: guidance scales α ``[l]``, on the host.
        seeds: a seed for the noise of each group.
        pos: real samples ``[l, P, *sample_shape]`` of the labels.
        uncond: real samples ``[l, U, *sample_shape]`` of any label, or None where no α of the step is above 1.
        weight: the weight ``[l]`` of each unconditional sample relative to a generated one, or None as they are.
    """

    label: Tensor
    cfg_scale: Tensor
    seeds: list[int]
    pos: Tensor
    uncond: Tensor | None
    weight: Tensor | None


class ClassGroups:
    """Groups by class. Real samples wait in queues, one a class and one of all classes (appendix A.8 of the paper).

    A step takes ``labels_per_step`` classes, none twice while they last, and for each of them ``pos_per_label`` real
    samples and, where the guidance scale α is above 1, ``uncond_per_label`` real samples of any class. What a step
    draws follows from (seed, step), and each rank draws it for all ranks, but keeps its share only.

    Args:
        config: the sections ``step`` and ``guidance``, and the seed.
        sample_shape: the shape of one sample.
        ranks: the processes that share the labels of a step.
        device: where a step's samples go; the queues are on ``config.step.queue_device``, by default here too.
        class_names: the labels, by class number, where they are known already.
        labelled: whether the network takes labels; without, all samples are of one class.
        num_classes: how many labels the network knows, if it says so.
    """

    def __init__(
        self,
        config: Config,
        sample_shape: tuple[int, ...],
        ranks: Ranks,
        device: torch.device,
        class_names: ClassNames | None,
        labelled: bool,
        num_classes: int | None,
    ) -> None:
        L = config.step.labels_per_step
        if L < ranks.size:  # Each rank needs a label.
            raise ValueError(f"labels_per_step is {L}, expected at least the {ranks.size} ranks")
        if config.step.labels_at_once is not None and L % ranks.size:  # All ranks meet in each part.
            raise ValueError(
                f"labels_per_step is {L}, expected a multiple of the {ranks.size} ranks with labels_at_once"
            )
        self.config, self.sample_shape, self.ranks, self.device = config, sample_shape, ranks, device
        self.labelled, self.num_classes = labelled, num_classes
        self.class_names = class_names if labelled else ALL
        self.queue: SampleQueue | None = None  # It is made with the first samples, when all labels are known.

    @property
    def size(self) -> int:
        """Groups of a step, on all ranks."""
        return self.config.step.labels_per_step

    def learn_labels(self, batches: Iterable[Any]) -> None:
        """Find out which labels the data have, before the first batch of them, if nobody has said so.

        Labels are mapped to class numbers, in their order, and where that changes them it is told in one line.
        """
        if self.class_names is not None:
            return
        found = self.ranks.on_all(lambda: distinct_labels(batches))
        if all(labels is not None for labels in found):
            self._number({label for labels in found for label in labels or ()})

    def _number(self, labels: set[Any]) -> None:
        """Number the labels of the data in their order, or as the network numbers them if they are such numbers."""
        self.class_names, known = number_labels(labels), self.num_classes
        if known is not None and labels and labels <= set(range(known)):
            self.class_names = tuple(range(known))
        if known is not None and len(self.class_names) > known:
            raise ValueError(f"the data have {len(labels)} labels, the network knows num_classes={known} of them")
        if self.ranks.main:
            tell_numbers(self.class_names)

    def add(self, samples: Tensor, labels: Labels | None) -> None:
        """Put this rank's part of a batch ``[B, *sample_shape]``, and those of the others, into the queues.

        Raises:
            ValueError: samples of another shape, or labels that the data did not have before.
        """
        if samples.shape[1:] != self.sample_shape:
            raise ValueError(
                f"the network makes samples {list(self.sample_shape)}, the data have {list(samples.shape[1:])}: "
                "the two must be alike"
            )
        if self.class_names is None:
            self._number(set() if labels is None else set(labels.tolist() if isinstance(labels, Tensor) else labels))
        assert self.class_names is not None
        if labels is None or not self.labelled:
            numbers = torch.zeros(len(samples), dtype=torch.int64)
        else:
            numbers = class_numbers(labels, self.class_names).cpu()
        self._queue().add(self.ranks.gather(samples), self.ranks.gather(numbers))

    def _queue(self) -> SampleQueue:
        if self.queue is None:
            step = self.config.step
            self.queue = SampleQueue(
                step.queue_size, len(self.class_names or ALL), self.sample_shape, step.queue_device or self.device,
                step.unconditional_queue_size,
            )  # fmt: skip
        return self.queue

    def draw(self, step: int, guided: bool) -> Groups:
        """This rank's groups of a step; with ``guided`` false, every α is 1."""
        config, queue, L = self.config.step, self._queue(), self.size
        random, seeds = self._randomness(step)
        mine = self.ranks.share(L)  # [l]
        label = self._draw_labels(random, L)
        pos = queue.sample(label, config.pos_per_label, random, mine).to(self.device)
        cfg_scale = sample_cfg_scale(L, self.config.guidance, random) if guided else torch.ones(L)
        uncond = weight = None
        if cfg_scale.max() > 1:
            U = config.uncond_per_label
            uncond = queue.sample_unconditional(L * U, random, slice(mine.start * U, mine.stop * U))
            uncond = uncond.to(self.device).unflatten(0, (-1, U))  # [l, U, *sample_shape]
            weight = uncond_weight(cfg_scale[mine], config.gen_per_label, U).to(self.device)
        return Groups(label[mine], cfg_scale[mine], seeds[mine], pos, uncond, weight)

    def _randomness(self, step: int) -> tuple[torch.Generator, list[int]]:
        """A generator on the host for what a step chooses, and a seed for the noise of each of its groups."""
        seed, *seeds = np.random.SeedSequence([self.config.seed, step]).generate_state(1 + self.size).tolist()
        return torch.Generator().manual_seed(seed), seeds

    def _draw_labels(self, random: torch.Generator, num: int) -> Tensor:
        """Class numbers ``[num]`` of which the queue has samples, none twice while they last."""
        available = self._queue().available_labels
        order = torch.randperm(len(available), generator=random)
        return available[order[torch.arange(num) % len(available)]]

    def state_dict(self) -> dict[str, Any]:
        """The queues and the labels, which every rank has alike."""
        return {"class_names": list(self.class_names or ()), "queue": self.queue and self.queue.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.class_names = tuple(state["class_names"]) or None
        if state["queue"] is not None:
            self._queue().load_state_dict(state["queue"])


def sample_cfg_scale(num: int, config: GuidanceConfig, generator: torch.Generator | None = None) -> Tensor:
    """Guidance scales α ``[num]``: p(α) ∝ α^-exponent on a range, or 1 (``train.py`` of the release).

    Args:
        num: how many.
        config: ``cfg_scale_range``, the least and greatest α, 1 or more; ``cfg_exponent`` of the power law, of which 0
            is uniform and more favours small α; ``uncond_prob``, the probability of α = 1 in place of that.
        generator: CPU generator.
    """
    low, high = config.cfg_scale_range
    u, v = torch.rand(2, num, generator=generator, dtype=torch.float64)
    power = 1 - config.cfg_exponent
    if abs(power) < 1e-6:  # The law is 1/α, and the inverse of its distribution function is exponential.
        alpha = low * torch.exp(u * math.log(high / low))
    else:
        alpha = (low**power + u * (high**power - low**power)) ** (1 / power)
    return torch.where(v < config.uncond_prob, 1.0, alpha).float()


def uncond_weight(cfg_scale: Tensor, num_gen: int, num_uncond: int) -> Tensor:
    """The weight of each unconditional negative, w = (α - 1)(G - 1)/U, of the shape of ``cfg_scale``.

    With it the unconditional negatives together weigh α - 1 times the G - 1 generated negatives of a sample: the
    mixture of negatives in section 3.5 of the paper.
    """
    return (cfg_scale - 1) * (num_gen - 1) / num_uncond
