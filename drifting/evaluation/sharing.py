"""The batches in which an evaluation draws samples and looks at them, and how the ranks of a run share them."""

from collections.abc import Callable, Iterable, Sequence
from math import prod

import torch

from ..training.distributed import Ranks
from ..utils.progress import progress
from .archives import Samples
from .features import Features, concatenate

BATCH, BATCH_VALUES = 50, 2**23  # So many samples are in a batch, unless they have more values than this …
LEAST_BATCHES = 32  # … or there would be fewer batches, which many ranks could not share evenly.


def batches(num: int, shape: Sequence[int], title: str, ranks: Ranks | None) -> Iterable[slice]:
    """This rank's batches of ``num`` samples of that shape, with a progress bar of that title on rank 0.

    Their bounds are the same at any number of ranks: what a network computes of a sample depends on the size of its
    batch by a rounding, which the pixels of an image enlarge. None shares them with no rank, in as few as can be.
    """
    most = BATCH if ranks is None else min(BATCH, num // LEAST_BATCHES)
    size = max(1, min(most, BATCH_VALUES // max(1, prod(shape))))
    parts = [slice(at, min(num, at + size)) for at in range(0, num, size)]
    here = parts if ranks is None else parts[ranks.share(len(parts))]
    return progress(here, title, "batch") if ranks is None or ranks.main else here


def see(
    look: Callable[[Samples], Features], samples: Iterable[Samples], device: torch.device, ranks: Ranks
) -> Features | None:
    """Features on ``device`` of all ranks' batches of samples, one after another, on rank 0; None on the others.

    Batches are taken one at a time, so that no more of them need be held.
    """
    seen = ranks.together(lambda: [look(batch) for batch in samples])
    if ranks.size > 1:
        parts = ranks.to_main([concatenate(seen).to("cpu")] if seen else [])
        seen = [of_rank.to(device) for part in parts for of_rank in part]
    return concatenate(seen) if ranks.main else None
