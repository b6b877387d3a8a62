"""Features of real samples, kept beside the queue of these so that a step encodes only the new ones."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import SampleQueue
from ..errors import UserError
from ..models import DriftingLoss
from ..models.resnet_encoder import FeatureMaps
from ..utils.memory import format_bytes, free_memory
from .distributed import Ranks

ENCODED_AT_ONCE = 64  # This many samples of a loaded queue.
COMPARED, TOLERANCE = 8, 0.05  # Roundings of bfloat16 stay below it; another network's features differ by about 1.


class MapLayout:
    """How all maps of a sample lie in one vector, one after another, as those of any samples ``[1, T, n, D]`` tell."""

    def __init__(self, maps: FeatureMaps) -> None:
        self.places = {name: (of_map.shape[1], of_map.shape[3]) for name, of_map in maps.items()}
        self.sizes = [T * D for T, D in self.places.values()]
        self.dtype = next(iter(maps.values())).dtype  # The operator wants the same of all.

    def pack(self, maps: FeatureMaps) -> Tensor:
        """The vectors ``[n, length]`` of samples with maps ``[1, T, n, D]``; another layout raises UserError."""
        found = MapLayout(maps).places
        for name in found | self.places:
            received, expected = found.get(name, "missing"), self.places.get(name, "missing")
            if received != expected:
                raise UserError(
                    f"the feature map {name!r} is {received}, expected {expected} (locations, features) as of the two "
                    "samples of the trial: what depends on the batch cannot be kept, set step.queue_features=false"
                )
        return torch.cat([maps[name][0].transpose(0, 1).flatten(1) for name in self.places], 1)

    def unpack(self, vectors: Tensor) -> FeatureMaps:
        """The maps of samples with vectors ``[L, n, length]``, as the groups ``[L, T, n, D]`` of the loss: views."""
        parts = zip(self.places.items(), vectors.split(self.sizes, 2), strict=True)
        return {name: part.unflatten(2, (T, D)).transpose(1, 2) for (name, (T, D)), part in parts}


@dataclass
class RealFeatures:
    """The features of the samples in a queue, in a second queue, to which all is done that is done to the first."""

    loss_fn: DriftingLoss
    layout: MapLayout
    device: torch.device  # The extractor is there.
    queue: SampleQueue  # It has a vector of the layout for each sample.

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """The vectors ``[B, length]`` of samples ``[B, *sample_shape]``, which are to be added on all ranks."""
        # The queue has samples in this type, and an extractor may change its input in place.
        copy = samples.to(self.device, torch.float32, copy=True)
        vectors = self.layout.pack(self.loss_fn.groups(copy.unsqueeze(0)))
        self.loss_fn.stopwatch.enter("communication")
        return vectors

    def groups(self, vectors: Tensor) -> FeatureMaps:
        """The maps of drawn vectors ``[L, n, length]``, as the groups ``[L, T, n, D]`` of the loss."""
        return self.layout.unpack(vectors.to(self.device))

    def load(self, state: dict[str, Any] | None, samples: SampleQueue) -> None:
        """Take over what was saved beside these samples; encode them anew if nothing was, or other features were."""
        if state is not None and self._are_ours(state["unconditional"]["samples"], samples):
            self.queue.load_state_dict(state)
            return
        pairs = (self.queue.by_class, samples.by_class), (self.queue.unconditional, samples.unconditional)
        for kept, ring in pairs:
            filled = torch.arange(ring.size, device="cpu") < ring.count.unsqueeze(1)  # [rows, size]
            for where in filled.nonzero().to(ring.samples.device).split(ENCODED_AT_ONCE):
                row, slot = where.unbind(1)
                kept.samples[row, slot] = self.encode(samples.values(ring.samples[row, slot])).to(kept.samples)
            kept.count, kept.head = ring.count, ring.head

    def _are_ours(self, saved: Tensor, samples: SampleQueue) -> bool:
        """Whether saved vectors ``[1, size, length]`` are those that the extractor makes, as the first ones tell."""
        ours = self.queue.unconditional.samples
        if (saved.shape, saved.dtype) != (ours.shape, ours.dtype):
            return False
        first = slice(min(COMPARED, int(samples.unconditional.count)))
        expected = self.groups(self.encode(samples.values(samples.unconditional.samples[0, first])).unsqueeze(0))
        found = self.groups(saved[:, first])
        pairs = [(found[name].double(), of_map.double()) for name, of_map in expected.items()]
        return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)


def keep_features(
    loss_fn: DriftingLoss, layout: MapLayout, device: torch.device, samples: SampleQueue, ranks: Ranks
) -> RealFeatures | None:
    """What keeps the features of a queue that is still empty; None, of which rank 0 tells, if a rank lacks the memory.

    The features lie beside the samples, and the extractor is on ``device``. They may take half of the memory that is
    free, since a step needs some too. In the host's memory, its ranks share them.
    """
    rings, there = (samples.by_class, samples.unconditional), samples.by_class.samples.device
    length = sum(layout.sizes)
    need = sum(ring.count.numel() * ring.size for ring in rings) * length * layout.dtype.itemsize
    free = min(ranks.on_all(lambda: free_memory(there)))
    if need > free / 2:
        if ranks.main:
            print(
                f"step.queue_features would take {format_bytes(need)}, more than half of the {format_bytes(free)} that "
                f"a process has free on {there.type}: each step encodes its real samples anew; to keep their features, "
                f"lower step.queue_size ({rings[0].size}) or step.unconditional_queue_size ({rings[1].size})",
                file=sys.stderr,
            )
        return None
    queue = SampleQueue(
        rings[0].size, samples.num_classes, (length,), there, rings[1].size, layout.dtype, zeros=ranks.zeros
    )
    return RealFeatures(loss_fn, layout, device, queue)
