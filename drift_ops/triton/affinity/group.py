"""Many small problems: weighted sums under the doubly normalised affinity, one program a problem.

One launch does all widths from one set of distances. Softmax rows run over all keys, of which every tensor is a tile of
its own, and the statistics of rows join the tiles. Points and values are read where they lie, and taken about one of
them as they are loaded.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...spec import AffinitySpec
from .. import autotune, launch
from ..group import configuration, one_of, padded, zeros
from ..tiles import (
    CLOSE,
    DIFFERENCES_UP_TO,
    NOTHING,
    at_least,
    finite_shift,
    load_vector,
    pairs_within,
    self_pairs,
    squared_differences,
)
from .logit import logits
from .pairs import FAR
from .softmax import affinities, finish


class Strided(NamedTuple):
    """The points of all problems ``[G, count, D]``, their last dimension contiguous."""

    first: Any
    of_problem: Any  # strides
    of_row: Any
    count: Any


def strided(points: Tensor) -> Strided:
    return Strided(points, points.stride(0), points.stride(1), points.shape[1])


@triton.jit
def _load(x, g, origin, start, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions [start, start + BLOCK_D) of the rows of problem g about ``origin``; zero where there is nothing."""
    row = tl.arange(0, BLOCK).to(tl.int64)[:, None]
    dim = start + tl.arange(0, BLOCK_D)[None, :]
    inside = (row < x.count) & (dim < D)
    values = tl.load(x.first + g * x.of_problem + row * x.of_row + dim, mask=inside, other=0.0)
    return tl.where(inside, values - tl.load(origin + dim, mask=dim < D, other=0.0), 0.0)


@triton.jit
def _find_origin(points, g, D, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The point nearest to the mean of all in the first dimensions: not a far outlier, which would be an origin away
    from the rest, where the rest would lose digits."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    mean = tl.zeros([BLOCK_D], tl.float32)
    count = 0
    tiles = ()
    for n in tl.static_range(len(points)):
        row = tl.arange(0, BLOCKS[n]).to(tl.int64)[:, None]
        x = points[n].first + g * points[n].of_problem + row * points[n].of_row + dim
        tiles = tiles + (tl.load(x, mask=(row < points[n].count) & (dim < D), other=0.0),)
        mean += tl.sum(tiles[n], 0)
        count += points[n].count
    mean = mean / count
    origin = points[0].first + g * points[0].of_problem
    nearest = float("inf")
    for n in tl.static_range(len(points)):
        row = tl.arange(0, BLOCKS[n])
        distance = tl.sum(tl.abs(tiles[n] - mean[None, :]), 1)
        distance = tl.where((row < points[n].count) & (distance == distance), distance, float("inf"))
        better = tl.min(distance, 0) < nearest
        candidate = points[n].first + g * points[n].of_problem + tl.argmin(distance, 0).to(tl.int64) * points[n].of_row
        origin = tl.where(better, candidate, origin)
        nearest = tl.minimum(nearest, tl.min(distance, 0))
    return origin


@triton.jit
def _distances(
    q,
    k,
    g,
    origin,
    D,
    SELF: tl.constexpr,  # the keys are the queries, whose own pairs do not count
    DIFFERENCES: tl.constexpr,  # D <= DIFFERENCES_UP_TO
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``‖q_i − k_j‖`` [BLOCK_Q, BLOCK_K]; FAR where no pair counts."""
    exists = pairs_within(q.count, k.count, BLOCK_Q, BLOCK_K)
    if SELF:
        exists = exists & (self_pairs(0, BLOCK_Q, BLOCK_K) == 0)
    q_first = q.first + g * q.of_problem
    k_first = k.first + g * k.of_problem
    if DIFFERENCES:
        squared = squared_differences(q_first, k_first, q.count, k.count, D, BLOCK_Q, BLOCK_K, q.of_row, k.of_row)
    else:
        products = zeros(BLOCK_Q, BLOCK_K)
        q_norms = tl.zeros([BLOCK_Q], dtype=tl.float32)
        k_norms = tl.zeros([BLOCK_K], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            a = _load(q, g, origin, start, D, BLOCK_Q, BLOCK_D)
            b = _load(k, g, origin, start, D, BLOCK_K, BLOCK_D)
            q_norms += tl.sum(a * a, 1)
            k_norms += tl.sum(b * b, 1)
            products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
        norms = q_norms[:, None] + k_norms[None, :]
        squared = norms - 2 * products
        if tl.min(tl.where(exists, squared - norms * CLOSE, 0.0)) < 0:
            squared = squared_differences(q_first, k_first, q.count, k.count, D, BLOCK_Q, BLOCK_K, q.of_row, k.of_row)
    return tl.where(exists, tl.sqrt(at_least(squared, 0.0)), FAR)


@triton.jit
def group_kernel(
    q,
    keys,  # a tuple of Strided
    values,  # likewise, or None: the keys
    w,  # [G, M] or None
    num,  # [S, G, SIDES, N, D]
    den,  # [S, G, SIDES, N]
    row_stats,  # [S, G, 2, N]
    col_stats,  # [S, G, 2, M]
    centre,  # [G, D]
    widths,
    temperature,
    least_affinity,  # or None for 0
    G,
    D,
    SIDES: tl.constexpr,
    LOGIT: tl.constexpr,
    HAS_SELF: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # of the keys
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    N = q.count
    M = keys[0].count
    for n in tl.static_range(1, len(keys)):
        M += keys[n].count
    i = tl.arange(0, BLOCK_N)
    row = i[:, None]

    origin = _find_origin(keys, g, D, BLOCKS, BLOCK_D)
    d = ()
    for n in tl.static_range(len(keys)):
        d = d + (
            _distances(
                q, keys[n], g, origin, D, HAS_SELF and n == 0, DIFFERENCES, PRECISION, BLOCK_N, BLOCKS[n], BLOCK_D
            ),
        )
    if values is None:
        values = keys
    else:
        origin = _find_origin(values, g, D, BLOCKS, BLOCK_D)
    for start in range(0, D, BLOCK_SUM):
        dim = start + tl.arange(0, BLOCK_SUM)
        tl.store(centre + g * D + dim, tl.load(origin + dim, mask=dim < D, other=0.0), mask=dim < D)

    for s in range(len(widths)):  # not unrolled: the widths would compete for registers
        width = one_of(widths, s)
        row_top = tl.full([BLOCK_N], NOTHING, dtype=tl.float32)
        for n in tl.static_range(len(keys)):
            row_top = tl.maximum(row_top, tl.max(logits(d[n], width, temperature, LOGIT), 1))
        row_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
        for n in tl.static_range(len(keys)):
            L = logits(d[n], width, temperature, LOGIT)
            row_sum += tl.sum(tl.exp2(L - finite_shift(row_top)[:, None]), 1)
        row_top, row_factor = finish(row_top, row_sum)
        rows = row_stats + (s * G + g) * 2 * N
        tl.store(rows + i, row_top, mask=i < N)
        tl.store(rows + N + i, row_factor, mask=i < N)

        A = ()
        first = 0  # key of the tile
        for n in tl.static_range(len(keys)):
            j = tl.arange(0, BLOCKS[n])
            L = logits(d[n], width, temperature, LOGIT)
            col_top = tl.max(L, 0)
            col_top, col_factor = finish(col_top, tl.sum(tl.exp2(L - finite_shift(col_top)[None, :]), 0))
            cols = col_stats + (s * G + g) * 2 * M + first
            tl.store(cols + j, col_top, mask=j < keys[n].count)
            tl.store(cols + M + j, col_factor, mask=j < keys[n].count)
            of_tile = affinities(L, row_top, row_factor, col_top, col_factor, least_affinity)
            if w is not None:
                of_tile *= load_vector(w + g * M + first, keys[n].count, 0, BLOCKS[n])[None, :]
            A = A + (of_tile,)
            first += keys[n].count

        for side in tl.static_range(SIDES):
            out = ((s * G + g) * SIDES + side) * N
            total = tl.zeros([BLOCK_N], dtype=tl.float32)
            for n in tl.static_range(len(keys)):
                if SIDES == 1 or (n == len(keys) - 1) == (side == 1):
                    total += tl.sum(A[n], 1)
            tl.store(den + out + i, total, mask=i < N)
            for start in range(0, D, BLOCK_SUM):
                dim = start + tl.arange(0, BLOCK_SUM)[None, :]
                sums = zeros(BLOCK_N, BLOCK_SUM)
                for n in tl.static_range(len(keys)):
                    if SIDES == 1 or (n == len(keys) - 1) == (side == 1):
                        v = _load(values[n], g, origin, start, D, BLOCKS[n], BLOCK_SUM)
                        sums = tl.dot(A[n], v, sums, input_precision=PRECISION)
                tl.store(num + (out + row) * D + dim, sums, mask=(row < N) & (dim < D))


def affinity_sums(
    spec: AffinitySpec, q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor] | None, w: Tensor | None
) -> tuple[Tensor, ...]:
    """See :func:`.affinity_sums`, for problems that :func:`fit <drift_ops.triton.group.fits_field>`."""
    (G, N, D), S, counts = q.shape, len(spec.widths), [k.shape[1] for k in keys]
    M = sum(counts)
    num, den = q.new_empty(S, G, spec.sides, N, D), q.new_empty(S, G, spec.sides, N)
    row_stats, col_stats, centre = q.new_empty(S, G, 2, N), q.new_empty(S, G, 2, M), q.new_empty(G, D)
    limits = launch.limits(q.device)
    block_n, *blocks = padded(N, *counts)
    given = [k for k in keys if k.shape[1] > 0]
    with launch.on_device_of(q):
        autotune.start(
            group_kernel,
            (G,),
            strided(q),
            tuple(map(strided, given)),
            None if values is None else tuple(strided(v) for v in values if v.shape[1] > 0),
            None if w is None else w.contiguous(),
            num,
            den,
            row_stats,
            col_stats,
            centre,
            tuple(map(float, spec.widths)),
            float(spec.temperature),
            spec.floor**0.5 or None,
            G,
            D,
            SIDES=spec.sides,
            LOGIT=spec.logit,
            HAS_SELF=spec.has_self,
            DIFFERENCES=D <= DIFFERENCES_UP_TO,
            PRECISION=launch.product_precision(limits.amd),
            BLOCK_N=block_n,
            BLOCKS=tuple(blocks),
            configuration=configuration((block_n, *blocks), limits, pairs_of_lane=32).options,
        )
    return num, den, row_stats, col_stats, centre
