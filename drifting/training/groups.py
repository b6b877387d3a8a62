"""Which samples a step compares: by class, those of a label; by pair, generated ones with their one real sample."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import Config, GuidanceConfig
from ..data import SampleQueue, Split
from ..data.dataset import Stored, read_batches
from ..data.own import ALL, distinct_labels, number_labels, tell_numbers
from ..data.sample_queue import unchanged
from ..errors import UserError, shown, some_of
from ..generation import ClassNames, Labels, as_tensor, class_numbers, plain_labels
from ..models.drifting_loss import split_groups
from ..models.resnet_encoder import FeatureMaps
from ..utils.progress import progress
from .distributed import Ranks
from .real_features import RealFeatures


@dataclass(frozen=True)
class Groups:
    """What a rank compares in a step: l groups, each of one label or one pair's condition, of ``size`` on all ranks.
    Pairs have no unconditional negatives."""

    size: int
    num_gen: int  # A group has so many generated samples.
    condition: Tensor  # [l]: class numbers, on the host; or the conditions of pairs [l, *condition_shape]
    cfg_scale: Tensor  # [l]: guidance scales α, on the host
    seeds: list[int]  # Each seeds the noise of a group.
    pos: Tensor  # [l, P, *sample_shape]: real samples of the labels, or that of the pair
    uncond: Tensor | None = None  # [l, U, *sample_shape]: real samples of any label, the unconditional negatives
    weight: Tensor | None = None  # [l]: the weight of each of these relative to a generated sample
    maps: tuple[FeatureMaps, FeatureMaps] | None = None  # [l, T, P, D], [l, T, U or 0, D]: of pos and uncond, if kept

    @property
    def real(self) -> Tensor:
        """All real samples ``[l, P + U, *sample_shape]``, first those that attract."""
        return self.pos if self.uncond is None else torch.cat([self.pos, self.uncond], 1)

    def spreads(self, gen: Tensor) -> tuple[Tensor, Tensor]:
        """The spread of generated samples ``[l, G, *sample_shape]``, and that of real ones. A pair has one of these, y:
        its spread is E‖x − x'‖², which is E‖x − y‖² where samples x are as the real ones."""
        if self.pos.shape[1] > 1:
            return gen.std(1).mean(), self.pos.std(1).mean()
        return 2 * gen.var(1).mean(), (gen - self.pos).square().mean()


@dataclass
class ClassGroups:
    """Groups by class. Real samples wait in queues, one a class and one of all classes (appendix A.8 of the paper).

    A step takes ``labels_per_step`` classes, none twice while they last, and for each of them ``pos_per_label`` real
    samples and ``num_uncond`` real samples of any class. These weigh 0 where the guidance scale α is 1, but count in
    the softmaxes, as in the release. What a step draws follows from (seed, step), and each rank draws it for all ranks,
    but keeps its share only.
    """

    config: Config
    sample_shape: tuple[int, ...]
    ranks: Ranks
    device: torch.device  # A step's samples go there, and so do the queues unless the configuration has a device.
    class_names: ClassNames | None  # These are the labels, by class number, where they are known already.
    labelled: bool  # A network that takes no labels has all samples in one class.
    num_classes: int | None  # The network knows this many labels, if it says so.
    num_uncond: int  # A label has this many unconditional negatives; a field without any has 0.
    queue: SampleQueue | None = None  # It is made with the first samples, when all labels are known.
    keep_features: Callable[[SampleQueue, Ranks], RealFeatures | None] | None = None  # It is called at that time.
    features: RealFeatures | None = None  # They are those of the samples in the queue, where they are kept.
    split: Split | None = None  # Batches are those of training_batches, as stored: the queue is read anew, not saved.
    saved_features: dict[str, Any] | None = None  # These of a checkpoint wait until the queue has been read.
    condition_shape = None  # Conditions are labels.

    def __post_init__(self) -> None:
        self.size = self.config.step.labels_per_step  # A step has this many groups, on all ranks.
        told, num_ranks = f"labels_per_step is {self.size}, expected", self.ranks.size
        if self.size < num_ranks:  # Each rank needs a label.
            raise ValueError(f"{told} at least the {num_ranks} ranks")
        if self.config.step.labels_at_once is not None and self.size % num_ranks:  # All ranks meet in each part.
            raise ValueError(f"{told} a multiple of the {num_ranks} ranks with labels_at_once")
        self.class_names = self.class_names if self.labelled else ALL

    @property
    def dtype(self) -> torch.dtype:
        """Samples are kept in it."""
        return torch.float32 if self.split is None else self.split.dtype

    def learn_labels(self, batches: Iterable[Any]) -> None:
        """Find out which labels the data have, before the first batch of them, if nobody has said so.

        They are numbered in their order, unless they are numbers of the network; where that changes them it says so.
        """
        if self.class_names is not None:
            return
        found = [labels for labels in self.ranks.on_all(lambda: distinct_labels(batches)) if labels is not None]
        if len(found) < self.ranks.size:
            return  # The data can be read only once.
        labels, known = set().union(*found), self.num_classes
        self.class_names = number_labels(labels)
        if known is not None and labels and labels <= set(range(known)):
            self.class_names = tuple(range(known))
        if known is not None and len(self.class_names) > known:
            raise ValueError(f"the data have {len(labels)} labels, the network knows num_classes={known} of them")
        if self.ranks.main:
            tell_numbers(self.class_names)

    def add(self, samples: Any, labels: Labels | None) -> None:
        """Put this rank's part of a batch ``[B, *sample_shape]``, and those of the others, into the queues."""
        if self.split is not None and samples.dtype != self.dtype:
            expected = f"{self.dtype}, as training_batches reads them stored"
            raise ValueError(f"samples are {samples.dtype}, expected {expected}")
        if self.dtype.is_floating_point:
            samples = real_samples(samples)
        samples = samples.to(self.device, self.dtype, non_blocking=True)
        check_samples(samples, self.sample_shape)
        plain = plain_labels(labels)
        if labels is not None and len(plain) != len(samples):
            raise UserError(f"labels are {shown(labels, 80)}, expected {len(samples)}, one for each sample")
        self.learn_labels([(samples, labels)])
        names = self.class_names or ALL
        if labels is None and len(names) > 1:
            raise ValueError(f"a batch has no labels, expected {len(samples)} of class_names {some_of(names)}")
        is_first = self.queue is None and self.ranks.main
        if is_first and not self.labelled and any(label != plain[0] for label in plain):
            print("the network takes no labels: all samples form one group", file=sys.stderr)
        numbers = self._numbers(labels, len(samples))
        queue = self._queue()
        vectors = None if self.features is None else self.features.encode(queue.values(samples))
        numbers = self.ranks.gather(numbers)
        queue.add(self.ranks.gather(samples), numbers)
        if self.features is not None and vectors is not None:
            self.features.queue.add(self.ranks.gather(vectors), numbers)

    def _numbers(self, labels: Labels | None, num: int) -> Tensor:
        """The class numbers ``[num]`` of labels."""
        if labels is None or not self.labelled or self.class_names is None:
            return torch.zeros(num, dtype=torch.int64, device="cpu")
        if self.split is not None:  # It has numbers, also of classes that are called 1, 2 and 10.
            return as_tensor(labels)
        try:
            return class_numbers(labels, self.class_names)
        except ValueError as error:
            hint = "if the first batch lacks some, give all to create_trainer(class_names=...)"
            raise ValueError(f"{error}; {hint}") from error

    def _queue(self) -> SampleQueue:
        if self.queue is None:
            step, num_classes = self.config.step, len(self.class_names or ALL)
            device, unconditional_size = step.queue_device or self.device, step.unconditional_queue_size
            values = unchanged if self.split is None else self.split.values
            sizes = step.queue_size, num_classes, self.sample_shape, device, unconditional_size
            self.queue = SampleQueue(*sizes, self.dtype, values, self.ranks.zeros)
            if self.keep_features is not None:
                self.features = self.keep_features(self.queue, self.ranks)
        return self.queue

    def draw(self, step: int, guided: bool) -> Groups:
        """This rank's groups of a step; with ``guided`` false, every α is 1."""
        config, queue, L = self.config.step, self._queue(), self.size
        mine = self.ranks.share(L)  # These are l of the L labels.
        seed, *seeds = np.random.SeedSequence([self.config.seed, step]).generate_state(1 + L).tolist()
        random = torch.Generator().manual_seed(seed)
        available = queue.available_labels
        order = torch.randperm(len(available), generator=random, device="cpu")
        label = available[order[torch.arange(L, device="cpu") % len(available)]]  # [L]
        P, U = config.pos_per_label, self.num_uncond
        # The positives are [l, P, *sample_shape], and their maps [l, T, P, D].
        pos, pos_maps = self._drawn(lambda queue: queue.sample(label, P, random, mine), random)
        cfg_scale = sample_cfg_scale(L, self.config.guidance, random) if guided else _ones(L)
        uncond = uncond_maps = weight = None
        if not U and cfg_scale.max() > 1:
            told = f"guidance.cfg_scale_range is {self.config.guidance.cfg_scale_range}"
            cause = "loss.field=gaussian" if config.uncond_per_label else "step.uncond_per_label=0"
            raise UserError(f"{told}, but with {cause} there are no negatives to guide away from: set it to [1, 1]")
        if U:
            part = slice(mine.start * U, mine.stop * U)
            # The negatives are [l, U, *sample_shape], and their maps [l, T, U, D].
            uncond, uncond_maps = self._drawn(
                lambda queue: queue.sample_unconditional(L * U, random, part).unflatten(0, (-1, U)), random
            )
            weight = uncond_weight(cfg_scale[mine], config.gen_per_label, U).to(self.device)
        maps = None if pos_maps is None else (pos_maps, uncond_maps or split_groups(pos_maps, P)[1])
        G = config.gen_per_label
        return Groups(L, G, label[mine], cfg_scale[mine], seeds[mine], pos, uncond, weight, maps)

    def _drawn(
        self, draw: Callable[[SampleQueue], Tensor], random: torch.Generator
    ) -> tuple[Tensor, FeatureMaps | None]:
        """The samples ``[l, n, *sample_shape]`` that ``draw`` takes by ``random``, and their maps if these are kept."""
        state, queue = random.get_state(), self._queue()
        samples = queue.values(draw(queue).to(self.device))
        if self.features is None:
            return samples, None
        random.set_state(state)  # The same slots are drawn from the queue of features.
        return samples, self.features.groups(draw(self.features.queue))

    def state_dict(self) -> dict[str, Any]:
        features = None if self.features is None else self.features.queue.state_dict()
        queue = None if self.queue is None or self.split is not None else self.queue.state_dict()
        return {"class_names": list(self.class_names or ()), "queue": queue, "features": features}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.class_names = tuple(state["class_names"]) or None
        if self.split is not None:
            self.saved_features = state.get("features")
        elif state["queue"] is not None:
            self._queue().load_state_dict(state["queue"])
            if self.features is not None:
                self.features.load(state.get("features"), self._queue())  # Older versions have kept none.

    def refill(self, step: int) -> None:
        """Read anew what the queue held after so many steps on ``split``, if there is one. All ranks share the work."""
        if self.split is None or step == 0:
            return
        queue, size = self._queue(), self.config.train.batch_size
        labels = self._numbers(self.split.labels, len(self.split))
        draws = queue.skip(labels, self.config.seed, step * size)
        batches = [draws[at : at + size] for at in range(0, len(draws), size)]
        # Each rank reads as many; the last ones may read the first draw again.
        even = [batch + batch[:1] * (-len(batch) % self.ranks.size) for batch in batches]
        parts = [batch[self.ranks.share(len(batch))] for batch in even]
        read = read_batches(Stored(self.split), self.config.data.workers, batch_sampler=parts)
        shown = progress(batches, "refilling the queue", "batch") if self.ranks.main else batches
        for batch, (samples, _) in zip(shown, read, strict=True):
            samples = self.ranks.gather(samples.to(self.device, non_blocking=True))[: len(batch)]
            queue.add(samples, labels[[draw.sample for draw in batch]])
        if self.features is not None:
            self.features.load(self.saved_features, queue)
        self.saved_features = None


@dataclass
class PairGroups:
    """Groups by pair. Each sample of the batch is with its condition a group of its own, of ``gen_per_pair`` generated
    samples and one positive. There are no labels and no queue, and every guidance scale is 1."""

    config: Config
    ranks: Ranks
    device: torch.device
    meet: Callable[[Tensor], tuple[int, ...]]  # It is called with two conditions first, and gives the sample shape.
    sample_shape: tuple[int, ...] = ()
    example: Tensor | None = None  # [2, *condition_shape]: zeros
    pairs: tuple[Tensor, Tensor] | None = None  # This rank's part of the batch: samples, conditions
    class_names, split, dtype = None, None, torch.float32

    @property
    def condition_shape(self) -> tuple[int, ...]:
        if self.example is None:
            raise ValueError("the trainer has seen no conditions yet, expected training or load_state_dict before")
        return tuple(self.example.shape[1:])

    def learn_labels(self, batches: Iterable[Any]) -> None:
        """There are none."""

    def refill(self, step: int) -> None:
        """There is no queue."""

    def see(self, conditions: Tensor) -> None:
        """Try the network on the first and the last of these conditions, before the first step."""
        self.example = torch.zeros_like(conditions[[0, -1]], device="cpu")
        self.sample_shape = self.meet(conditions[[0, -1]])

    def add(self, samples: Any, conditions: Any) -> None:
        """Take this rank's part of a batch: samples ``[B, *sample_shape]``, as many on each rank, with conditions."""
        samples = real_samples(samples).to(self.device, torch.float32, non_blocking=True)
        try:
            conditions = as_tensor(conditions).to(self.device, non_blocking=True)
            if conditions.shape[:1] != samples.shape[:1]:
                raise ValueError(f"they are {list(conditions.shape)}")
        except (TypeError, ValueError, RuntimeError) as error:
            expected = f"a tensor [{len(samples)}, …] in a batch (x, condition)"
            raise ValueError(f"conditions are {shown(conditions)}, expected {expected}") from error
        if self.example is None:
            self.see(conditions)
        check_samples(samples, self.sample_shape)
        self.pairs = samples, conditions

    def draw(self, step: int, guided: bool) -> Groups:
        """This rank's groups of a step; the noise of each follows from (seed, step) and its place in the batch."""
        assert self.pairs is not None
        samples, conditions = self.pairs
        size, ones = len(samples) * self.ranks.size, _ones(len(samples))
        seeds = np.random.SeedSequence([self.config.seed, step]).generate_state(size).tolist()
        mine, num_gen = self.ranks.share(size), self.config.step.gen_per_pair
        return Groups(size, num_gen, conditions, ones, seeds[mine], samples.unsqueeze(1))

    def state_dict(self) -> dict[str, Any]:
        return {"example": self.example}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["example"] is not None and self.example is None:
            self.see(state["example"])


def real_samples(batch: Any) -> Tensor:
    """The tensor ``[B, …]`` of a batch of real samples. Other types than a network makes raise UserError, and so do
    values that are not finite, where they are on the host: a GPU would have to be waited for."""
    try:
        samples = as_tensor(batch)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"samples are {shown(batch, 80)}, expected a tensor [B, …] in a batch x or (x, y)") from error
    if not samples.is_floating_point():
        advice = "bring images to the range of the network's, such as x / 127.5 - 1, other data to float32"
        raise UserError(f"samples are {samples.dtype}, expected floating-point numbers: {advice}")
    if not samples.ndim or not len(samples):
        raise UserError(f"a batch of samples has the shape {list(samples.shape)}, expected [B, …] with one or more")
    if samples.device.type == "cpu" and not samples.isfinite().all():
        raise UserError("samples have NaN or infinity, expected finite numbers only")
    return samples


def check_samples(samples: Tensor, shape: tuple[int, ...]) -> None:
    """Raise UserError unless these real samples ``[B, …]`` have the shape of the network's."""
    if samples.shape[1:] != shape:
        made, found = list(shape), list(samples.shape[1:])
        raise UserError(f"the network makes samples {made}, the data have {found}: the two must be alike")


def _ones(num: int) -> Tensor:
    return torch.ones(num, device="cpu", dtype=torch.float32)


def sample_cfg_scale(num: int, config: GuidanceConfig, generator: torch.Generator | None = None) -> Tensor:
    """Guidance scales α ``[num]``: p(α) ∝ α^-exponent on a range, or 1, as ``train.py`` of the release draws them."""
    low, high = config.cfg_scale_range
    u, v = torch.rand(2, num, generator=generator, dtype=torch.float64, device="cpu")
    power = 1 - config.cfg_exponent
    if abs(power) < 1e-6:  # The law is 1/α, and the inverse of its distribution function is exponential.
        alpha = low * torch.exp(u * math.log(high / low))
    else:
        alpha = (low**power + u * (high**power - low**power)) ** (1 / power)
    return torch.where(v < config.uncond_prob, 1.0, alpha).float()


def uncond_weight(cfg_scale: Tensor, num_gen: int, num_uncond: int) -> Tensor:
    """The weight of each unconditional negative, w = (α - 1)(G - 1)/U, of the shape of ``cfg_scale``.

    Together they weigh α - 1 times the G - 1 generated negatives of a sample, as in section 3.5 of the paper.
    """
    return (cfg_scale - 1) * (num_gen - 1) / num_uncond
