"""Form C for many groups: each program owns one, and its distances stay in registers.

Three kernels, parted by the scalars that need all groups: the scale, then λ (through the moments). Each computes the
distances again from the points, which costs less than a trip of the distances through memory; the second and third walk
the points a second time, from cache, for the weighted sums.

The targets ``[gen, neg, pos]`` are not concatenated: a group's *sides* are gen, neg (unless it is empty) and pos, each
a tile of its own, ``[N, count]`` padded to powers of two. Points, weights and counts come as tuples over the sides.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import group, launch
from .group import one_of, zeros
from .tiles import (
    DIFFERENCES_UP_TO,
    NOTHING,
    distances_from_products,
    finite_shift,
    load_rows,
    load_vector,
    pairs_within,
    roots,
    self_pairs,
    squared_differences,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_DISTANCE = tl.constexpr(1e-4)
SELF_DISTANCE = tl.constexpr(100.0)  # added to the self pairs, in units of the scale

# Groups of one launch of a kernel that needs a place in memory for each: few enough for the cache to hold
# the places of those at work, and several for each multiprocessor.
PROGRAMS = 512
PIECE = tl.constexpr(256)  # of the coefficients of an R, which are a multiple of it


@triton.jit
def _of_group(arrays, counts, width, g):
    """Pointers to the rows of group g of ``[G, count, width]`` arrays."""
    rows = ()
    for side in tl.static_range(len(arrays)):
        rows = rows + (arrays[side] + g * counts[side] * width,)
    return rows


@triton.jit
def _distances(
    points, counts, D, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr, DIFFERENCES: tl.constexpr, PRECISION: tl.constexpr
):
    """Distances of gen to every side, a tuple of ``[BLOCKS[0], BLOCKS[side]]``."""
    gen = points[0]
    N = counts[0]
    found = ()
    if DIFFERENCES:
        for side in tl.static_range(len(BLOCKS)):
            squared = squared_differences(gen, points[side], N, counts[side], D, BLOCKS[0], BLOCKS[side])
            found = found + (roots(squared, LEAST_DISTANCE, 0, side == 0, BLOCKS[0], BLOCKS[side]),)
    else:
        products = ()
        norms = ()
        for side in tl.static_range(len(BLOCKS)):
            products = products + (zeros(BLOCKS[0], BLOCKS[side]),)
            norms = norms + (tl.sum(products[side], 0),)  # zeros
        for start in range(0, D, BLOCK_D):
            # The first generated sample is the origin: every pair holds a generated sample, and they tend to be close
            # to each other.
            centre = load_vector(gen, D, start, BLOCK_D)[None, :]
            x = load_rows(gen, N, start, D, BLOCKS[0], BLOCK_D) - centre
            more_products = (tl.dot(x, tl.trans(x), products[0], input_precision=PRECISION),)
            more_norms = (norms[0] + tl.sum(x * x, 1),)
            for side in tl.static_range(1, len(BLOCKS)):
                y = load_rows(points[side], counts[side], start, D, BLOCKS[side], BLOCK_D) - centre
                more_products = more_products + (tl.dot(x, tl.trans(y), products[side], input_precision=PRECISION),)
                more_norms = more_norms + (norms[side] + tl.sum(y * y, 1),)
            products = more_products
            norms = more_norms
        for side in tl.static_range(len(BLOCKS)):
            found = found + (
                distances_from_products(
                    products[side],
                    norms[0],
                    norms[side],
                    gen,
                    points[side],
                    N,
                    counts[side],
                    D,
                    LEAST_DISTANCE,
                    0,
                    side == 0,
                    BLOCKS[0],
                    BLOCKS[side],
                ),
            )
    return found


@triton.jit
def _scale_kernel(
    points,
    weights,
    means,  # [G, 2]: mean d·w, mean w
    counts,
    D,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCKS[0]
    g = tl.program_id(0).to(tl.int64)
    points = _of_group(points, counts, D, g)
    weights = _of_group(weights, counts, 1, g)
    d = _distances(points, counts, D, BLOCKS, BLOCK_D, DIFFERENCES, PRECISION)
    exists = tl.arange(0, BLOCKS[0])[:, None] < counts[0]
    of_rows = tl.zeros([BLOCK_N], dtype=tl.float32)
    total_weight = 0.0
    targets = 0
    for side in tl.static_range(len(BLOCKS)):
        w = load_vector(weights[side], counts[side], 0, BLOCKS[side])
        of_rows += tl.sum(tl.where(exists, d[side] * w[None, :], 0.0), 1)
        total_weight += tl.sum(w)
        targets += counts[side]
    tl.store(means + 2 * g, tl.sum(of_rows) / (counts[0] * targets))
    tl.store(means + 2 * g + 1, total_weight / targets)


@triton.jit
def _ready_for_softmax(d, scale, counts, BLOCKS: tl.constexpr):
    """Pairs that do not exist are infinitely far, and self pairs 100 scales further than they are: with
    ``δ = d/max(scale, 1e-3)``, 100 is added to it."""
    ready = ()
    for side in tl.static_range(len(BLOCKS)):
        exists = pairs_within(counts[0], counts[side], BLOCKS[0], BLOCKS[side])
        ready = ready + (tl.where(exists, d[side], float("inf")),)
    further = tl.where(self_pairs(0, BLOCKS[0], BLOCKS[0]), SELF_DISTANCE * tl.maximum(scale, 1e-3), 0.0)
    return (ready[0] + further,) + ready[1:]


@triton.jit
def _slope(scale, R):
    """Of the logits over d, to the base 2: ``L = −δ/R``."""
    return -LOG2_E / (R * tl.maximum(scale, 1e-3))


@triton.jit
def _half_logsumexp(top, total):
    """To the base 2; infinite where nothing is unmasked. With these r and c, ``A_ij = exp2(L_ij − r_i − c_j)``."""
    return tl.where(total == 0, float("inf"), 0.5 * (top + tl.log2(tl.where(total == 0, 1.0, total))))


@triton.jit
def _coefficients(d, weights, slope, least, counts, BLOCKS: tl.constexpr):
    """``c⁻_ij = −A⁻_ij Σ⁺_i`` and ``c⁺_ij = A⁺_ij Σ⁻_i``, a tuple over the sides; 0 where there is no pair."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    row_top = tl.full([BLOCK_N], NOTHING, dtype=tl.float32)
    for side in tl.static_range(len(BLOCKS)):
        row_top = tl.maximum(row_top, tl.max(d[side] * slope, 1))
    row_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for side in tl.static_range(len(BLOCKS)):
        row_sum += tl.sum(tl.exp2(d[side] * slope - finite_shift(row_top)[:, None]), 1)
    row_half = _half_logsumexp(row_top, row_sum)
    negative = tl.zeros([BLOCK_N], dtype=tl.float32)
    positive = tl.zeros([BLOCK_N], dtype=tl.float32)
    weighted = ()  # w_j A_ij
    for side in tl.static_range(len(BLOCKS)):
        L = d[side] * slope
        col_top = tl.max(L, 0)
        col_half = _half_logsumexp(col_top, tl.sum(tl.exp2(L - finite_shift(col_top)[None, :]), 0))
        A = tl.exp2(L - row_half[:, None] - col_half[None, :])
        w = load_vector(weights[side], counts[side], 0, BLOCKS[side])  # 0 in columns that do not exist
        of_side = tl.where(A < least, least, A) * w[None, :]
        weighted = weighted + (of_side,)
        if side < len(BLOCKS) - 1:
            negative += tl.sum(of_side, 1)
        else:
            positive += tl.sum(of_side, 1)
    exists = tl.arange(0, BLOCK_N) < counts[0]
    negative = tl.where(exists, negative, 0.0)[:, None]
    positive = tl.where(exists, positive, 0.0)[:, None]
    c = ()
    for side in tl.static_range(len(BLOCKS)):
        if side < len(BLOCKS) - 1:
            c = c + (weighted[side] * -positive,)
        else:
            c = c + (weighted[side] * negative,)
    return c


# Coefficients go through memory on their way to the weighted sums, [BLOCK_N, BLOCK] of every side after each other:
# registers cannot hold them while the dimensions are walked, and the cache can.


@triton.jit
def _store_coefficients(place, c, BLOCKS: tl.constexpr):
    row = tl.arange(0, BLOCKS[0])[:, None]
    for side in tl.static_range(len(BLOCKS)):
        tl.store(place + row * BLOCKS[side] + tl.arange(0, BLOCKS[side])[None, :], c[side])
        place += BLOCKS[0] * BLOCKS[side]


@triton.jit
def _load_coefficients(place, BLOCKS: tl.constexpr):
    row = tl.arange(0, BLOCKS[0])[:, None]
    c = ()
    for side in tl.static_range(len(BLOCKS)):
        c = c + (tl.load(place + row * BLOCKS[side] + tl.arange(0, BLOCKS[side])[None, :]),)
        place += BLOCKS[0] * BLOCKS[side]
    return c


@triton.jit
def _weighted_sum(c, targets, BLOCKS: tl.constexpr, BLOCK_SUM: tl.constexpr, PRECISION: tl.constexpr):
    """``Σ_j c_ij t_j`` over all sides, in a few dimensions ``[BLOCK_N, BLOCK_SUM]``."""
    total = zeros(BLOCKS[0], BLOCK_SUM)
    for side in tl.static_range(len(BLOCKS)):
        total = tl.dot(c[side], targets[side], total, input_precision=PRECISION)
    return total


@triton.jit
def _load_targets(points, central, counts, start, D, BLOCKS: tl.constexpr, BLOCK_SUM: tl.constexpr):
    """Dimensions [start, start + BLOCK_SUM) of every side, about the central row: rows of c sum to 0."""
    centre = load_vector(central, D, start, BLOCK_SUM)[None, :]
    targets = ()
    for side in tl.static_range(len(BLOCKS)):
        targets = targets + (load_rows(points[side], counts[side], start, D, BLOCKS[side], BLOCK_SUM) - centre,)
    return targets


@triton.jit
def _central_row(d, counts, BLOCKS: tl.constexpr):
    """The generated sample nearest to all targets together: an origin for the weighted sums that a few far outliers do
    not move away from the rest, where the rest would lose digits."""
    BLOCK_N: tl.constexpr = BLOCKS[0]
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for side in tl.static_range(len(BLOCKS)):
        exists = pairs_within(counts[0], counts[side], BLOCKS[0], BLOCKS[side])
        total += tl.sum(tl.where(exists, d[side], 0.0), 1)
    total = tl.where(tl.arange(0, BLOCK_N) < counts[0], total, float("inf"))
    return tl.minimum(tl.argmin(total, 0), counts[0] - 1)


@triton.jit
def _find_coefficients(
    points,
    weights,
    scale,
    R_list,
    place,
    counts,
    D,
    least,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Coefficients of a group for every R into ``place``; the row that the weighted sums take for their origin."""
    d = _distances(points, counts, D, BLOCKS, BLOCK_D, DIFFERENCES, PRECISION)
    central = points[0] + _central_row(d, counts, BLOCKS) * D
    d = _ready_for_softmax(d, scale, counts, BLOCKS)
    for n in range(len(R_list)):  # not unrolled: the R would compete for registers
        c = _coefficients(d, weights, _slope(scale, one_of(R_list, n)), least, counts, BLOCKS)
        _store_coefficients(place + n * PAIRS, c, BLOCKS)
    tl.debug_barrier()  # what is stored is read back by other threads
    return central


@triton.jit
def _moments_kernel(
    points,
    weights,
    scale,
    R_list,
    places,  # of the coefficients of each program, [programs, R, BLOCK_N · ΣBLOCKS]
    moments,  # [G, R, R]
    first,  # group of the first program
    counts,
    D,
    least,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,  # BLOCK_N · ΣBLOCKS
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCKS[0]
    program = tl.program_id(0).to(tl.int64)
    g = first + program
    scale = tl.load(scale).to(tl.float32)
    points = _of_group(points, counts, D, g)
    weights = _of_group(weights, counts, 1, g)
    place = places + program * len(R_list) * PAIRS
    central = _find_coefficients(
        points, weights, scale, R_list, place, counts, D, least, BLOCKS, PAIRS, BLOCK_D, DIFFERENCES, PRECISION
    )
    sums = ()  # of F_r·F_r' over the dimensions, for r' <= r: [N] each
    for _ in tl.static_range(len(R_list) * (len(R_list) + 1) // 2):
        sums = sums + (tl.zeros([BLOCK_N], dtype=tl.float32),)
    for start in range(0, D, BLOCK_SUM):
        targets = _load_targets(points, central, counts, start, D, BLOCKS, BLOCK_SUM)
        F = ()
        for _ in tl.static_range(len(R_list)):
            F = F + (zeros(BLOCKS[0], BLOCK_SUM),)
        for n in range(len(R_list)):  # not unrolled, as above
            c = _load_coefficients(place + n * PAIRS, BLOCKS)
            F_n = _weighted_sum(c, targets, BLOCKS, BLOCK_SUM, PRECISION)
            filled = ()
            for r in tl.static_range(len(R_list)):
                filled = filled + (tl.where(n == r, F_n, F[r]),)
            F = filled
        more = ()
        for r in tl.static_range(len(R_list)):
            for other in tl.static_range(r + 1):
                more = more + (sums[r * (r + 1) // 2 + other] + tl.sum(F[r] * F[other], 1),)
        sums = more

    unit = tl.maximum(scale / tl.sqrt(D * 1.0), 1e-3)
    moments += g * len(R_list) * len(R_list)
    for r in tl.static_range(len(R_list)):
        for other in tl.static_range(r + 1):
            moment = tl.sum(sums[r * (r + 1) // 2 + other]) / (unit * unit * (counts[0] * 1.0) * (D * 1.0))
            tl.store(moments + r * len(R_list) + other, moment)
            tl.store(moments + other * len(R_list) + r, moment)


@triton.jit
def _gradient_kernel(
    points,
    weights,
    scale,
    R_list,
    factors,  # [R]
    incoming,  # [G]
    places,  # as above
    grad,
    first,
    counts,
    D,
    least,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    g = first + program
    N = counts[0]
    scale = tl.load(scale).to(tl.float32)
    points = _of_group(points, counts, D, g)
    weights = _of_group(weights, counts, 1, g)
    place = places + program * len(R_list) * PAIRS
    central = _find_coefficients(
        points, weights, scale, R_list, place, counts, D, least, BLOCKS, PAIRS, BLOCK_D, DIFFERENCES, PRECISION
    )
    n = tl.arange(0, PIECE)
    for start in range(0, PAIRS, PIECE):  # Σ_R c_R/λ_R, where the first R was
        total = tl.zeros([PIECE], dtype=tl.float32)
        for r in range(len(R_list)):
            total += tl.load(factors + r).to(tl.float32) * tl.load(place + r * PAIRS + start + n)
        tl.store(place + start + n, total)
    tl.debug_barrier()

    unit = tl.maximum(scale / tl.sqrt(D * 1.0), 1e-3)
    by = -2 * tl.load(incoming + g) / (unit * unit * (N * 1.0) * (D * 1.0))
    row = tl.arange(0, BLOCKS[0])[:, None]
    grad += g * N * D
    for start in range(0, D, BLOCK_SUM):
        targets = _load_targets(points, central, counts, start, D, BLOCKS, BLOCK_SUM)
        F = zeros(BLOCKS[0], BLOCK_SUM)
        for turn in range(tl.minimum(tl.num_programs(0), 1)):  # one turn; without it the coefficients stay in registers
            c = _load_coefficients(place + turn * PAIRS, BLOCKS)
            F += _weighted_sum(c, targets, BLOCKS, BLOCK_SUM, PRECISION)
        dim = start + tl.arange(0, BLOCK_SUM)[None, :]
        tl.store(grad + row * D + dim, (F * by).to(grad.dtype.element_ty), mask=(row < N) & (dim < D))


def _without_empty(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t for t in tensors if t.shape[1] > 0)


def _problem(points: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any], int]:
    """gen, neg unless it is empty, and pos; their counts; how the kernels are compiled for them, and BLOCK_SUM."""
    sides = _without_empty(points)
    counts, D = tuple(t.shape[1] for t in sides), sides[0].shape[2]
    limits = launch.limits(sides[0].device)
    blocks = group.padded(counts[0], counts)[1:]
    chosen = group.configuration((blocks[0], *blocks), limits, pairs_of_lane=64)
    options = {
        "BLOCKS": blocks,
        "BLOCK_D": chosen.block_d,
        "DIFFERENCES": D <= DIFFERENCES_UP_TO,
        "PRECISION": launch.product_precision(limits.amd),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
    return sides, counts, options, chosen.block_sum


def loss_scale(points: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Phase 1 of one map: ``[mean d·w, mean w]`` in float64, and nothing kept."""
    sides, counts, options, _ = _problem(points)
    G, _, D = sides[0].shape
    means = sides[0].new_empty(G, 2, dtype=torch.float32)
    with launch.on_device_of(means):
        _scale_kernel[(G,)](sides, _without_empty(weights), means, counts, D, **options)
    return means.mean(0, dtype=torch.float64), means.new_empty(0)


def loss_moments(
    points: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Tensor,
    scale: Tensor,
    R_list: Sequence[float],
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Phase 2 of one map: an empty state, and the means of the forces' products ``[G, R, R]``."""
    sides, counts, options, block_sum = _problem(points)
    (G, _, D), R, pairs = sides[0].shape, len(R_list), options["BLOCKS"][0] * sum(options["BLOCKS"])
    moments = sides[0].new_empty(G, R, R, dtype=torch.float32)
    places = moments.new_empty(min(G, PROGRAMS), R, pairs)
    with launch.on_device_of(moments):
        for first in range(0, G, PROGRAMS):
            _moments_kernel[(min(G - first, PROGRAMS),)](
                sides,
                _without_empty(weights),
                scale,
                tuple(map(float, R_list)),
                places,
                moments,
                first,
                counts,
                D,
                floor**0.5,
                PAIRS=pairs,
                BLOCK_SUM=block_sum,
                **options,
            )
    return moments.new_empty(0), moments


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
    sides, counts, options, block_sum = _problem(points)
    (G, _, D), R, pairs = sides[0].shape, len(R_list), options["BLOCKS"][0] * sum(options["BLOCKS"])
    grad = torch.empty_like(sides[0])
    places = factors.new_empty(min(G, PROGRAMS), R, pairs, dtype=torch.float32)
    with launch.on_device_of(grad):
        for first in range(0, G, PROGRAMS):
            _gradient_kernel[(min(G - first, PROGRAMS),)](
                sides,
                _without_empty(weights),
                scale,
                tuple(map(float, R_list)),
                factors,
                incoming,
                places,
                grad,
                first,
                counts,
                D,
                floor**0.5,
                PAIRS=pairs,
                BLOCK_SUM=block_sum,
                **options,
            )
    return grad
