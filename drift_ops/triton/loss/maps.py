"""The feature maps of a launch, and where a program finds its own.

What maps of one shape do not share comes as a tuple over the maps: pointers, and of each map in ``maps`` its first
program, the place of its scale in the call, T, and for each side of a group the strides of ``[L, T, count]`` of its
points, in their order. Group g is ``(g // T, g % T)``. The sides are gen, neg (unless it is empty) and pos; arrays,
counts and strides come as tuples over them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..group import one_of

BEFORE_STRIDES = tl.constexpr(3)  # entries of a map


class Groups(NamedTuple):
    """What the groups of a launch have in common."""

    points: Any  # of every side and map
    counts: Any
    BLOCKS: Any  # that the sides are padded to
    D: Any
    DIFFERENCES: Any  # D is so small that distances come from them
    EXACT: Any  # products are of two parts
    LONG: Any  # and too long a sum for tensor cores
    member: Any  # a Member


class Member(NamedTuple):
    """Of the family of fields, in what kernels are compiled for: see :class:`drift_ops.spec.LossSpec`."""

    OF_RELEASE: Any  # the statistics of the release serve, whatever costs and scales are
    SQUARED: Any  # costs are squared distances
    ROW: Any  # the coupling; neither this nor the next: two_sided
    SINKHORN: Any  # so many iterations
    SPLIT: Any  # sides are coupled each on their own
    KERNEL: Any  # what weights are; neither this nor the next: affinity
    MARGINAL: Any
    OWN: Any  # gen is among the targets
    MASKED: Any  # without the pairs of a sample with itself
    SCALE_SELF: Any  # these count in the scale
    DETAILS: Any  # are wanted, and the R may come from memory
    OF_ROWS: Any  # vectors over the rows that the state has for each R, see .memory


class Numbers(NamedTuple):
    """Of a :class:`drift_ops.spec.LossSpec`."""

    R_list: Any
    least: Any  # square root of the affinity floor
    least_distance: Any
    least_scale: Any
    self_distance: Any


@triton.jit
def entry_of(maps, n, entry: tl.constexpr):
    """One entry of the n-th map."""
    value = maps[0][entry]
    for other in tl.static_range(1, len(maps)):
        value = tl.where(n == other, maps[other][entry], value)
    return value


@triton.jit
def find_map(maps, program):
    """What ``program`` of a launch works on: the map's place in the launch, that of its scale in the call, and the
    group in the map."""
    n, place, first = 0, maps[0][1], 0
    for other in tl.static_range(1, len(maps)):
        n = tl.where(program >= maps[other][0], other, n)
        place = tl.where(program >= maps[other][0], maps[other][1], place)
        first = tl.where(program >= maps[other][0], maps[other][0], first)
    return n, place, (program - first).to(tl.int64)


@triton.jit
def statistics_of_group(place, g, OF_GROUPS: tl.constexpr):
    """Where a group's scale or factors are among those of all maps or, with OF_GROUPS, of all groups of a call."""
    if OF_GROUPS:
        return place + g
    else:
        return place


@triton.jit
def points_of_group(groups, maps, n, g, ALIGNED: tl.constexpr):
    """Of group g of the n-th map and every side, a pointer to the first point and the stride to the next."""
    T = entry_of(maps, n, 2)
    points = ()
    for side in tl.static_range(len(groups.points)):
        found = ()
        for dimension in tl.static_range(3):
            stride = entry_of(maps, n, BEFORE_STRIDES + 3 * side + dimension).to(tl.int64)
            if ALIGNED:
                stride = tl.multiple_of(stride, 16)
            found = found + (stride,)
        first = one_of(groups.points[side], n) + (g // T) * found[0] + (g % T) * found[1]
        points = points + ((first, found[2]),)
    return points


@triton.jit
def weights_of_group(weights, strides, groups, maps, n, g):
    """Of every side the weights, 0 where there is no target. All maps of a launch share their strides."""
    T = entry_of(maps, n, 2)
    found = ()
    for side in tl.static_range(len(groups.BLOCKS)):
        first = one_of(weights[side], n) + (g // T) * strides[side][0] + (g % T) * strides[side][1]
        target = tl.arange(0, groups.BLOCKS[side])
        w = tl.load(first + target * strides[side][2], mask=target < groups.counts[side], other=0.0)
        found = found + (w.to(tl.float32),)
    return found
