"""Maps that share launches: those of one shape, whose groups the group kernels hold."""

import functools
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...spec import LossMap, LossSpec
from .. import autotune, launch
from ..tiles import DIFFERENCES_UP_TO
from .distances import CHAIN_UP_TO
from .maps import BEFORE_STRIDES, Groups, Member, Numbers
from .plan import Plan, configuration

MAPS_OF_LAUNCH = (1, 4, 16)  # kernels are compiled for each; fewer maps are filled up


def batches(maps: Sequence[LossMap]) -> list[list[int]]:
    """The places of a call's maps, parted into lists of one shape that a launch can hold."""
    of_shape: dict[Any, list[int]] = {}
    for place, of_map in enumerate(maps):
        shape = of_map.gen.shape[3], of_map.counts, tuple(map(_strides, of_map.weights))
        of_shape.setdefault(shape, []).append(place)
    most = MAPS_OF_LAUNCH[-1]
    return [alike[n : n + most] for alike in of_shape.values() for n in range(0, len(alike), most)]


def _strides(t: Tensor) -> tuple[int, ...]:
    """Of the first three dimensions; 0 where there is nothing to step to."""
    return tuple([stride if size > 1 else 0 for size, stride in zip(t.shape[:3], t.stride(), strict=False)])


class Batch:
    """Maps of one shape: those at ``places`` of a call with these ``maps``."""

    def __init__(self, plan: Plan, places: Sequence[int], maps: Sequence[LossMap]) -> None:
        self.plan, self.of_maps, self.places = plan, [maps[place] for place in places], places
        self.gens = [of_map.gen for of_map in self.of_maps]
        self.sides = [side for side, count in enumerate(self.of_maps[0].counts) if count > 0]
        self.points, self.weights = (
            tuple(self.filled_up([kinds[n][side] for kinds in self.of_maps]) for side in self.sides) for n in (0, 1)
        )
        self.weight_strides = tuple(_strides(self.of_maps[0].weights[side]) for side in self.sides)
        *self.starts, self.programs = accumulate((of_map.groups for of_map in self.of_maps), initial=0)
        of_call = list(accumulate((of_map.groups for of_map in maps), initial=0))
        self.first_groups = [of_call[place] for place in places]

    def filled_up(self, of_maps: Sequence[Any]) -> tuple[Any, ...]:
        """What each map has, the last one's again where a launch takes more."""
        return (*of_maps, *[of_maps[-1]] * (_size_of_launch(len(of_maps)) - len(of_maps)))

    def empty(self, *shape: int) -> list[Tensor]:
        """Of every map a float32 tensor of this shape for each group."""
        return [of_map.gen.new_empty(of_map.groups, *shape, dtype=torch.float32) for of_map in self.of_maps]

    def maps(self, others: Sequence[Sequence[Tensor]], of_groups: bool) -> tuple[tuple[int, ...], ...]:
        """See :mod:`.maps`; with the strides of ``others``, one tensor a map, after those of the points."""
        found = []
        places = self.first_groups if of_groups else self.places
        for n, (start, place, of_map) in enumerate(zip(self.starts, places, self.of_maps, strict=True)):
            tensors = [of_map.points[side] for side in self.sides] + [of_maps[n] for of_maps in others]
            strides = [stride for t in tensors for stride in _strides(t)]
            found.append((start, place, of_map.gen.shape[1], *strides))
        nothing = (self.programs, *found[-1][1:])  # no program belongs to it
        return (*found, *[nothing] * (_size_of_launch(len(found)) - len(found)))

    def start(
        self,
        kernel: Any,
        name: str,
        spec: LossSpec,
        grid: tuple[int, ...],
        others: Any = (),
        of_groups: bool = False,
        **arguments: Any,
    ) -> None:
        """Launches a kernel under the configuration of this name, with those of the common arguments that it takes.

        ``others`` are points beside those of the sides, a tensor of each map. With ``of_groups``, statistics are those
        of all groups of the call, else of all its maps.
        """
        plan, gen, maps = self.plan, self.of_maps[0].gen, self.maps(others, of_groups)
        counts: tuple[Any, ...] = tuple(count for count in self.of_maps[0].counts if count > 0)
        if counts == plan.blocks:  # no mask is needed, and the compiler will see it
            counts = tuple(map(tl.constexpr, counts))
        points, blocks = (*self.points, *map(self.filled_up, others)), tuple(map(tl.constexpr, plan.blocks))
        kinds: tuple[Any, ...] = plan.D <= DIFFERENCES_UP_TO, launch.splits_products(), plan.D > CHAIN_UP_TO
        kinds = *map(tl.constexpr, kinds), _member(spec, plan.of_rows)
        arguments |= {"groups": Groups(points, counts, blocks, plan.D, *kinds), "maps": maps}
        arguments |= {"weights": self.weights, "weight_strides": self.weight_strides}
        R_list, least = tuple(map(float, spec.R_list)), spec.floor**0.5
        numbers = Numbers(R_list, least, spec.least_distance, spec.least_scale, float(spec.self_distance))
        arguments |= {"numbers": numbers, "OF_GROUPS": of_groups}
        arguments |= {"KEPT": plan.floats_kept, "STATE": plan.floats_of_state, "KEEP": plan.keeps_distances}
        arguments["SLICES"] = plan.slices
        arguments["ALIGNED"] = all(n % launch.ALIGNMENT == 0 for of_map in maps for n in of_map[BEFORE_STRIDES.value :])
        taken = {name: value for name, value in arguments.items() if name in _parameters(kernel)}
        with launch.on_device_of(gen):
            autotune.start(kernel, grid, configuration=configuration(name, plan, launch.limits(gen.device)), **taken)


@functools.cache
def _member(spec: LossSpec, of_rows: int) -> Member:
    kinds, masked = (spec.coupling, spec.sides, spec.weights), spec.self_distance == math.inf
    of_release = kinds == ("two_sided", "joint", "affinity") and spec.include_self and not masked and not spec.details
    flags = {
        "OF_RELEASE": of_release,
        "SQUARED": spec.cost == "l2_sq",
        "ROW": spec.coupling == "row",
        "SINKHORN": spec.iterations if spec.coupling == "sinkhorn" else 0,
        "SPLIT": spec.sides == "split",
        "KERNEL": spec.weights == "kernel",
        "MARGINAL": spec.weights == "marginal",
        "OWN": spec.include_self,
        "MASKED": masked,
        "SCALE_SELF": spec.scale_self_pairs,
        "DETAILS": spec.details,
    }
    return Member(**{name: tl.constexpr(flag) for name, flag in flags.items()}, OF_ROWS=tl.constexpr(of_rows))


@functools.cache
def _parameters(kernel: Any) -> frozenset[str]:
    return frozenset(kernel.arg_names)


def _size_of_launch(maps: int) -> int:
    return next(size for size in MAPS_OF_LAUNCH if size >= maps)
