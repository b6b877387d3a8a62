"""Form C for many groups: each program owns one, and its distances stay in registers.

Two scalars over all groups part the work, the scale and λ. The kernels:

- :mod:`.scale`: distances, walking the points once, and their mean. Where it takes less memory than the gradient will,
  products of all targets are kept; otherwise distances are worked out again by those that need them.
- :mod:`.statistics`: of both softmaxes and the sums of affinities, for every R.
- :mod:`.gram` or :mod:`.moments`: products of the forces, from the kept products or from weighted sums.
- :mod:`.gradient`: coefficients of all R together, and one weighted sum.
"""

from collections.abc import Sequence
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


def _without_empty(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t for t in tensors if t.shape[1] > 0)


def _blocks(points: Sequence[Tensor]) -> tuple[int, ...]:
    """Of each side, gen first."""
    return group.padded(*(t.shape[1] for t in points))


def _bytes_of_group(*tensors: Tensor) -> int:
    return sum(int(t.shape[1]) * int(t.shape[2]) * t.element_size() for t in tensors)


def _problem(points: Sequence[Tensor], kernel: str, **numbers: Any) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """gen, neg unless it is empty, and pos; and how a kernel is compiled for them and launched."""
    sides, blocks = _without_empty(points), _blocks(points)
    counts: tuple[Any, ...] = tuple(t.shape[1] for t in sides)
    if counts == blocks:  # no mask is needed, and the compiler will see it
        counts = tuple(map(tl.constexpr, counts))
    D = sides[0].shape[2]
    options = {"counts": counts, "D": D, "BLOCKS": blocks, "SPLIT": launch.splits_products()}
    if kernel != "gram":
        options |= {"DIFFERENCES": D <= DIFFERENCES_UP_TO, "LONG": D > CHAIN_UP_TO}
    configuration = group.loss_configuration(kernel, launch.limits(sides[0].device)).options
    return sides, options | numbers | {"configuration": configuration}


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


def loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Phase 1 of one map: ``[mean d·w, mean w]`` in float64, and the distances if they are kept."""
    sides, options = _problem(points, "scale")
    G = sides[0].shape[0]
    means = sides[0].new_empty(G, 2, dtype=torch.float32)
    kept = means.new_empty(kept_shape(points))
    with launch.on_device_of(means):
        given = (_without_empty(weights), means, kept if kept.numel() else None)
        autotune.start(scale_kernel, (G,), sides, *given, **options)
    return means.mean(0, dtype=torch.float64), kept


def loss_moments(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    scale: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Phase 2 of one map: statistics of every R, and the means of the forces' products ``[G, R, R]``."""
    G, R = points[0].shape[0], len(R_list)
    moments = points[0].new_empty(G, R, R, dtype=torch.float32)
    state = moments.new_empty(state_shape(points, R))
    numbers = {"least": floor**0.5, "KEEP": _keeps_distances(points, R)}
    pairs = kept if kept.numel() else None
    given = (pairs, state, scale, tuple(map(float, R_list)))
    of_sides = _without_empty(weights)
    with launch.on_device_of(moments):
        sides, options = _problem(points, "statistics", **numbers)
        autotune.start(statistics_kernel, (G,), sides, of_sides, *given, **options)
        # With products kept most groups have nothing to do here, and some share a program.
        groups = 1 if pairs is None or G <= PROGRAMS else 16
        sides, options = _problem(points, "moments", GROUPS=groups, **numbers)
        autotune.start(moments_kernel, (triton.cdiv(G, groups),), sides, of_sides, *given, moments, G, **options)
        if pairs is not None:
            _, options = _problem(points, "gram", **numbers)
            autotune.start(gram_moments_kernel, (G,), *given, moments, **options)
    return state, moments


def loss_gradient(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    state: Tensor,
    scale: Tensor,
    factors: Tensor,
    incoming: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> Tensor:
    """Phase 3 of one map: the gradient w.r.t. gen ``[G, N, D]``, in its dtype."""
    keep = _keeps_distances(points, len(R_list))
    kernel = "gradient of kept distances" if keep else "gradient"
    sides, options = _problem(points, kernel, least=floor**0.5, KEEP=keep)
    grad = torch.empty_like(sides[0])
    G, _, D = grad.shape
    shares = max(1, min(PROGRAMS // G, D // LEAST_SHARE)) if keep else 1  # each would work the distances out again
    share = triton.cdiv(D, shares * LEAST_SHARE) * LEAST_SHARE
    given = (_without_empty(weights), state, scale, tuple(map(float, R_list)))
    with launch.on_device_of(grad):
        grid = (G, triton.cdiv(D, share))
        autotune.start(gradient_kernel, grid, sides, *given, factors, incoming, grad, share, **options)
    return grad
