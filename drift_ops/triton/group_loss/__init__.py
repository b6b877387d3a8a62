"""Form C for many groups: each program owns one, and its distances stay in registers.

Two scalars over all groups part the work, the scale and λ. The kernels:

- :mod:`.scale`: distances, walking the points once, and their mean. Where it takes less memory than the gradient will,
  products of all targets are kept; otherwise distances are worked out again by those that need them.
- :mod:`.statistics`: of both softmaxes and the sums of affinities, for every R.
- :mod:`.gram` or :mod:`.moments`: products of the forces, from the kept products or from weighted sums.
- :mod:`.gradient`: coefficients of all R together, and one weighted sum.

Maps of one shape share launches, as a :class:`Batch`.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import autotune, group, launch
from ..tiles import DIFFERENCES_UP_TO
from .gradient import gradient_kernel
from .gram import gram_moments_kernel
from .kept import HEAD
from .moments import moments_kernel
from .points import CHAIN_UP_TO
from .scale import scale_kernel
from .statistics import statistics_kernel

PROGRAMS = 1024  # that fill a GPU of today; where there are fewer groups, several programs share one
LEAST_SHARE = 256  # dimensions of a program then, at least
MAPS_OF_LAUNCH = (1, 4, 16)  # kernels are compiled for each; fewer maps are filled up


def batches(points: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """The places of a call's maps, parted into lists of one shape that a launch can hold."""
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for place, of_map in enumerate(points):
        of_shape.setdefault((of_map[0].shape[2], *(t.shape[1] for t in of_map)), []).append(place)
    most = MAPS_OF_LAUNCH[-1]
    return [alike[n : n + most] for alike in of_shape.values() for n in range(0, len(alike), most)]


class Batch:
    """Maps of one shape: those at ``places`` of a call with these ``points`` and ``weights`` of gen, neg, pos."""

    def __init__(
        self, places: Sequence[int], points: Sequence[Sequence[Tensor]], weights: Sequence[Sequence[Tensor]]
    ) -> None:
        self.points = [points[place] for place in places]
        self.gens = [gen for gen, _, _ in self.points]
        sides = [side for side, t in enumerate(self.points[0]) if t.shape[1] > 0]
        self.sides, self.weights = (
            tuple(self.filled_up([tensors[place][side] for place in places]) for side in sides)
            for tensors in (points, weights)
        )
        *starts, self.programs = accumulate((gen.shape[0] for gen in self.gens), initial=0)
        maps = list(zip(starts, places, strict=True))
        maps += [(self.programs, 0)] * (_size_of_launch(len(maps)) - len(maps))  # which no program belongs to
        self.maps = tuple((2 * start + 3, 2 * place + 3) for start, place in maps)  # see .points.find_map

    def filled_up(self, of_maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A tensor of each map, the last one again where a launch takes more."""
        return (*of_maps, *[of_maps[-1]] * (_size_of_launch(len(of_maps)) - len(of_maps)))

    def empty(self, shape: tuple[int, ...]) -> list[Tensor]:
        """Of every map a float32 tensor of this shape but with as many rows as it has groups, unless that is (0,)."""
        shapes = [shape if shape == (0,) else (gen.shape[0], *shape[1:]) for gen in self.gens]
        return [self.gens[0].new_empty(shape, dtype=torch.float32) for shape in shapes]

    def start(self, kernel: Any, name: str, grid: tuple[int, ...], *given: Any, **numbers: Any) -> None:
        """Launches a kernel under the configuration of this name."""
        blocks, D = _blocks(self.points[0]), self.gens[0].shape[2]
        counts: tuple[Any, ...] = tuple(of_maps[0].shape[1] for of_maps in self.sides)
        if counts == blocks:  # no mask is needed, and the compiler will see it
            counts = tuple(map(tl.constexpr, counts))
        options = {"counts": counts, "D": D, "BLOCKS": blocks, "SPLIT": launch.splits_products()}
        if name != "gram":
            options |= {"DIFFERENCES": D <= DIFFERENCES_UP_TO, "LONG": D > CHAIN_UP_TO}
        configuration = group.loss_configuration(name, launch.limits(self.gens[0].device)).options
        with launch.on_device_of(self.gens[0]):
            autotune.start(kernel, grid, self.maps, *given, configuration=configuration, **options, **numbers)


def _size_of_launch(maps: int) -> int:
    return next(size for size in MAPS_OF_LAUNCH if size >= maps)


def _blocks(points: Sequence[Tensor]) -> tuple[int, ...]:
    """Of each side, gen first."""
    return group.padded(*(t.shape[1] for t in points))


def _bytes_of_group(*tensors: Tensor) -> int:
    return sum(int(t.shape[1]) * int(t.shape[2]) * t.element_size() for t in tensors)


def kept_shape(points: Sequence[Tensor]) -> tuple[int, ...]:
    """Shape of what phase 1 keeps for phase 2: nothing where it would take more memory than the gradient."""
    gen, blocks = points[0], _blocks(points)
    floats = HEAD.value + 4 * sum(blocks) + sum(block * sum(blocks[: n + 1]) for n, block in enumerate(blocks))
    fits = gen.shape[2] > DIFFERENCES_UP_TO and 4 * floats <= _bytes_of_group(gen)
    keeps = fits and not launch.limits(gen.device).tensor_memory  # of which the kernel wants more than there is
    return (gen.shape[0], floats) if keeps else (0,)


def _state_floats(points: Sequence[Tensor], R: int, pairs: int) -> int:
    blocks = _blocks(points)
    return HEAD.value + R * (3 * blocks[0] + sum(blocks)) + pairs


def _keeps_distances(points: Sequence[Tensor], R: int) -> bool:
    """Whether phase 2 keeps them for phase 3: where its state stays below a tenth of the points and the gradient."""
    blocks = _blocks(points)
    return 40 * _state_floats(points, R, blocks[0] * sum(blocks)) <= _bytes_of_group(*points, points[0])


def state_shape(points: Sequence[Tensor], R: int) -> tuple[int, ...]:
    """Shape of what phase 2 keeps for phase 3: statistics, and distances where they are small beside the points."""
    blocks = _blocks(points)
    pairs = blocks[0] * sum(blocks) if _keeps_distances(points, R) else 0
    return points[0].shape[0], _state_floats(points, R, pairs)


def loss_scale(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Phase 1: of each map ``[mean d·w, mean w]`` in float64, and the products if they are kept."""
    means = batch.empty((1, 2))
    kept = batch.empty(kept_shape(batch.points[0]))
    keeps = batch.filled_up(kept) if kept[0].numel() else None
    given = (batch.sides, batch.weights, batch.filled_up(means), keeps)
    batch.start(scale_kernel, "scale", (batch.programs,), *given)
    return [(of_map.mean(0, dtype=torch.float64), k) for of_map, k in zip(means, kept, strict=True)]


def loss_moments(
    batch: Batch, kept: Sequence[Tensor], scale: Tensor, R_list: Sequence[float], floor: float
) -> list[tuple[Tensor, Tensor]]:
    """Phase 2: of each map the statistics of every R, and the means of the forces' products ``[G, R, R]``.

    ``scale`` is that of all maps of the call.
    """
    R = len(R_list)
    moments, states = batch.empty((1, R, R)), batch.empty(state_shape(batch.points[0], R))
    numbers = {"least": floor**0.5, "KEEP": _keeps_distances(batch.points[0], R)}
    pairs = batch.filled_up(kept) if kept[0].numel() else None
    given = (pairs, batch.filled_up(states), scale, tuple(map(float, R_list)))
    results, programs = batch.filled_up(moments), batch.programs
    batch.start(statistics_kernel, "statistics", (programs,), batch.sides, batch.weights, *given, **numbers)
    # With products kept most groups have nothing to do here, and some share a program.
    groups = 1 if pairs is None or programs <= PROGRAMS else 16
    grid = (triton.cdiv(programs, groups),)
    given_all = (batch.sides, batch.weights, *given, results, programs)
    batch.start(moments_kernel, "moments", grid, *given_all, GROUPS=groups, **numbers)
    if pairs is not None:
        batch.start(gram_moments_kernel, "gram", (programs,), *given, results, **numbers)
    return list(zip(states, moments, strict=True))


def loss_gradient(
    batch: Batch,
    states: Sequence[Tensor],
    scale: Tensor,
    factors: Tensor,
    incoming: Sequence[Tensor],
    R_list: Sequence[float],
    floor: float,
) -> list[Tensor]:
    """Phase 3: of each map the gradient w.r.t. gen ``[G, N, D]``, in its dtype.

    ``scale`` and ``factors`` are those of all maps of the call.
    """
    keep = _keeps_distances(batch.points[0], len(R_list))
    grads = [torch.empty_like(gen) for gen in batch.gens]
    D = grads[0].shape[2]
    shares = max(1, min(PROGRAMS // batch.programs, D // LEAST_SHARE)) if keep else 1  # who else finds distances again
    share = triton.cdiv(D, shares * LEAST_SHARE) * LEAST_SHARE
    given = (batch.filled_up(states), scale, tuple(map(float, R_list)), factors)
    of_maps = (batch.filled_up(incoming), batch.filled_up(grads))
    kernel = "gradient of kept distances" if keep else "gradient"
    grid = (batch.programs, triton.cdiv(D, share))
    numbers = {"least": floor**0.5, "KEEP": keep}
    batch.start(gradient_kernel, kernel, grid, batch.sides, batch.weights, *given, *of_maps, share, **numbers)
    return grads
