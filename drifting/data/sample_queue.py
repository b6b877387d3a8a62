"""First-in-first-out queues of real samples, one a class and one over all classes (appendix A.8 of the paper)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from ..generation import as_tensor
from .dataset import Draw, shuffled

ALL = slice(None)


def unchanged(samples: Tensor) -> Tensor:
    return samples


class RingBuffers:
    """``rows`` ring buffers of ``size`` samples each. Samples live on ``device``, the bookkeeping on the host."""

    def __init__(
        self, rows: int, size: int, sample_shape: tuple[int, ...], device: torch.device | str,
        dtype: torch.dtype | None = None, zeros: Callable[..., Tensor] = torch.zeros,
    ) -> None:  # fmt: skip
        self.size = size
        self.samples = zeros(rows, size, *sample_shape, device=device, dtype=dtype)
        # These say how many samples a row holds, and which slot of it the next sample goes to.
        self.count, self.head = torch.zeros(2, rows, dtype=torch.long, device="cpu")

    def push(self, samples: Tensor, row: Tensor) -> None:
        """Append ``samples [B, *sample_shape]`` to the buffers ``row [B]``, in order; the oldest ones fall out."""
        added, rank = torch.bincount(row, minlength=len(self.count)), rank_in_row(row)  # [rows], [B]
        kept = (added[row] - rank <= self.size).nonzero().squeeze(1)  # Of a large batch, the newest fit.
        slot = (self.head[row] + rank) % self.size
        where = (row[kept].to(self.samples.device), slot[kept].to(self.samples.device))
        self.samples[where] = samples[kept.to(samples.device)].to(self.samples)
        self.count = (self.count + added).clamp(max=self.size)
        self.head = (self.head + added) % self.size

    def draw(self, row: Tensor, num: int, generator: Generator | None, rows: slice = ALL, part: slice = ALL) -> Tensor:
        """Draw samples ``[L, num, *sample_shape]`` of the buffers ``row [L]``: a ``part`` of those of ``rows``."""
        count = self.count[row].unsqueeze(1)  # [L, 1]
        key = torch.rand(len(row), self.size, generator=generator, device="cpu", dtype=torch.float32)
        key.masked_fill_(torch.arange(self.size, device="cpu") >= count, 2.0)  # Empty slots sort last.
        slot = key.argsort(1).gather(1, torch.arange(num, device="cpu") % count)[rows, part]  # [l, n]
        return self.samples[row[rows].unsqueeze(1).to(self.samples.device), slot.to(self.samples.device)]

    def state_dict(self) -> dict[str, Tensor]:
        return {"samples": self.samples, "count": self.count, "head": self.head}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["samples"].shape != self.samples.shape:
            shapes = f"{list(state['samples'].shape)}, this one {list(self.samples.shape)} ([classes, size, *sample])"
            raise ValueError(f"the saved queue holds {shapes}: build it with the sizes it was saved with")
        self.samples.copy_(state["samples"])
        self.count, self.head = (state[name].cpu().clone() for name in ("count", "head"))


def rank_in_row(row: Tensor) -> Tensor:
    """How many before each element of ``row [B]`` are the same, ``[B]``."""
    added = torch.bincount(row)
    order = torch.argsort(row, stable=True)
    first = (added.cumsum(0) - added)[row[order]]  # [B]: where the row of each element begins in `order`.
    rank = torch.empty_like(row)
    rank[order] = torch.arange(len(row), device="cpu") - first
    return rank


class SampleQueue:
    """The newest ``queue_size`` samples of every class, the positives, and newest samples of any, further negatives.
    Labels are ``0 … num_classes - 1``. ``latent_shape`` is the shape of one sample, of any rank, and ``dtype`` its
    type, by default torch's; ``values`` makes what is to be used of drawn samples. ``zeros`` allocates memory."""

    def __init__(
        self, queue_size: int = 128, num_classes: int = 1000, latent_shape: tuple[int, ...] = (4, 32, 32),
        device: torch.device | str = "cpu", unconditional_queue_size: int = 1000, dtype: torch.dtype | None = None,
        values: Callable[[Tensor], Tensor] = unchanged, zeros: Callable[..., Tensor] = torch.zeros,
    ) -> None:  # fmt: skip
        sizes = {"queue_size": queue_size, "num_classes": num_classes}
        for name, value in (sizes | {"unconditional_queue_size": unconditional_queue_size}).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        self.num_classes, self.latent_shape, self.values = num_classes, tuple(latent_shape), values
        self.by_class = RingBuffers(num_classes, queue_size, self.latent_shape, device, dtype, zeros)
        self.unconditional = RingBuffers(1, unconditional_queue_size, self.latent_shape, device, dtype, zeros)

    def __len__(self) -> int:
        return int(self.by_class.count.sum())

    @property
    def available_labels(self) -> Tensor:
        """Labels with at least one sample, int64 on the host, ascending."""
        return self.by_class.count.nonzero().squeeze(1)

    def add(self, samples: Tensor, labels: Tensor) -> None:
        """Put ``samples [B, *latent_shape]`` with integer ``labels [B]`` into their class queues and the common one."""
        samples, labels = as_tensor(samples), as_tensor(labels)
        if samples.shape[1:] != self.latent_shape or labels.shape != samples.shape[:1]:
            received = f"samples have shape {list(samples.shape)} and labels {list(labels.shape)}"
            raise ValueError(f"{received}, expected [{', '.join(map(str, ('B', *self.latent_shape)))}] and [B]")
        held = self.by_class.samples
        if samples.is_floating_point() > held.is_floating_point():
            raise ValueError(f"samples are {samples.dtype}, the queue holds {held.dtype}: add them as they are stored")
        labels = self._checked(labels)
        self.by_class.push(samples, labels)
        self.unconditional.push(samples, torch.zeros_like(labels))

    def sample(self, labels: Tensor, num_samples: int, generator: Generator | None = None, part: slice = ALL) -> Tensor:
        """Draw samples ``[L, num_samples, *latent_shape]`` of the classes ``labels [L]``, without replacement. A class
        that holds fewer repeats its samples, each equally often up to one. The CPU ``generator`` chooses for all
        labels, also where only a ``part`` of them is returned."""
        labels = self._checked(labels)
        empty = labels[self.by_class.count[labels] == 0]
        if len(empty):
            raise ValueError(f"no samples of class {int(empty[0])} in the queue yet: add() some before sampling it")
        return self.by_class.draw(labels, num_samples, generator, part)

    def sample_unconditional(self, num_samples: int, generator: Generator | None = None, part: slice = ALL) -> Tensor:
        """Draw samples ``[num_samples, *latent_shape]`` of any class as :meth:`sample` does, or a ``part`` of them."""
        if not self.unconditional.count.item():
            raise ValueError("the queue is empty: add() samples before drawing from it")
        row = torch.zeros(1, dtype=torch.long, device="cpu")
        return self.unconditional.draw(row, num_samples, generator, part=part)[0]

    def skip(self, labels: Tensor, seed: int, num: int) -> list[Draw]:
        """Go on as after the first ``num`` draws of :func:`endless_shuffle` from samples with ``labels [N]``. This
        queue, which is empty, holds what it would hold then if the draws that are returned are added, in their order.
        """
        size, classes, held = len(labels), self.num_classes, (self.by_class.size, self.unconditional.size)
        epochs, rest = divmod(num, size)
        total = torch.bincount(labels, minlength=classes) * epochs
        total += torch.bincount(labels[shuffled(size, seed, epochs)[:rest]], minlength=classes)
        taken, draws = torch.zeros_like(total), list[Draw]()
        for epoch in range(epochs, -1, -1):
            order = torch.from_numpy(shuffled(size, seed, epoch)[: num - epoch * size][::-1].copy())  # newest first
            among_any = torch.arange(len(order), device="cpu") < held[1] - max(0, num - (epoch + 1) * size)
            looked_at = among_any | (taken < held[0])[labels[order]]
            order, among_any = order[looked_at], among_any[looked_at]
            row = labels[order]
            order = order[among_any | (taken[row] + rank_in_row(row) < held[0])]
            taken += torch.bincount(labels[order], minlength=classes)
            draws += [Draw(epoch, sample) for sample in order.tolist()]
            if num - epoch * size >= held[1] and (taken >= total.clamp(max=held[0])).all():
                break
        self.by_class.head = (total - taken) % held[0]
        self.unconditional.head = (total - taken).sum(0, keepdim=True) % held[1]
        return draws[::-1]

    def state_dict(self) -> dict[str, Any]:
        return {"by_class": self.by_class.state_dict(), "unconditional": self.unconditional.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.by_class.load_state_dict(state["by_class"])
        self.unconditional.load_state_dict(state["unconditional"])

    def _checked(self, labels: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels are {labels.dtype}, expected integers from 0 to {self.num_classes - 1}")
        labels = labels.cpu().long()
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"label {int(wrong[0])} is out of range, expected 0 to {self.num_classes - 1}")
        return labels
