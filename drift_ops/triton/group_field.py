"""Forms A and B for many small problems: weighted sums under the doubly normalised affinity, one program a problem.

One launch does all widths from one set of distances. Softmax rows run over the keys of both sides, so that each side
is a tile of its own, and the statistics of rows join the tiles.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import autotune, group, launch
from .group import one_of, zeros
from .tiles import (
    DIFFERENCES_UP_TO,
    NOTHING,
    affinities,
    distances,
    finish_statistics,
    finite_shift,
    kernel_logits,
    load_rows,
    load_vector,
    pairs_within,
    self_pairs,
)

FAR = tl.constexpr(float("inf"))  # the distance of pairs that do not exist or are masked


@triton.jit
def _logits(d, width, temperature, GAUSSIAN: tl.constexpr):
    return kernel_logits(d, d < FAR, width, temperature, GAUSSIAN)


@triton.jit
def _sums_kernel(
    q,
    k,
    v,
    w,
    num,
    den,
    row_stats,
    col_stats,
    widths,
    temperature,
    least,  # square root of the affinity floor
    G,
    N,
    counts,  # of the keys, on each side
    D,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,  # of the sides
    BLOCK_D: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    HAS_SELF: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    M = counts[0]
    for side in tl.static_range(1, len(BLOCKS)):
        M += counts[side]
    q += g * N * D
    k += g * M * D
    v += g * M * D
    i = tl.arange(0, BLOCK_N)
    row = i[:, None]

    d = ()
    first = 0  # key of the side
    for side in tl.static_range(len(BLOCKS)):
        found = distances(
            q, k + first * D, N, counts[side], D, 0.0, -first,
            HAS_SELF, DIFFERENCES, PRECISION, BLOCK_N, BLOCKS[side], BLOCK_D,
        )  # fmt: skip
        counts_as_pair = pairs_within(N, counts[side], BLOCK_N, BLOCKS[side])
        if HAS_SELF:
            counts_as_pair = counts_as_pair & (self_pairs(-first, BLOCK_N, BLOCKS[side]) == 0)
        d = d + (tl.where(counts_as_pair, found, FAR),)
        first += counts[side]

    for s in range(len(widths)):  # not unrolled: the widths would compete for registers
        width = one_of(widths, s)
        row_top = tl.full([BLOCK_N], NOTHING, dtype=tl.float32)
        for side in tl.static_range(len(BLOCKS)):
            row_top = tl.maximum(row_top, tl.max(_logits(d[side], width, temperature, GAUSSIAN), 1))
        row_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
        for side in tl.static_range(len(BLOCKS)):
            L = _logits(d[side], width, temperature, GAUSSIAN)
            row_sum += tl.sum(tl.exp(L - finite_shift(row_top)[:, None]), 1)
        row_max, row_factor = finish_statistics(row_top, row_sum)
        rows = row_stats + (s * G + g) * 2 * N
        tl.store(rows + i, row_max, mask=i < N)
        tl.store(rows + N + i, row_factor, mask=i < N)

        A = ()
        first = 0
        for side in tl.static_range(len(BLOCKS)):
            j = tl.arange(0, BLOCKS[side])
            L = _logits(d[side], width, temperature, GAUSSIAN)
            col_top = tl.max(L, 0)
            col_max, col_factor = finish_statistics(col_top, tl.sum(tl.exp(L - finite_shift(col_top)[None, :]), 0))
            cols = col_stats + (s * G + g) * 2 * M + first
            tl.store(cols + j, col_max, mask=j < counts[side])
            tl.store(cols + M + j, col_factor, mask=j < counts[side])
            of_side = tl.where(d[side] < FAR, affinities(L, row_max, row_factor, col_max, col_factor, least), 0.0)
            if WEIGHTED:
                of_side *= load_vector(w + g * M + first, counts[side], 0, BLOCKS[side])[None, :]
            tl.store(den + ((s * G + g) * len(BLOCKS) + side) * N + i, tl.sum(of_side, 1), mask=i < N)
            A = A + (of_side,)
            first += counts[side]

        for start in range(0, D, BLOCK_SUM):
            dim = start + tl.arange(0, BLOCK_SUM)[None, :]
            first = 0
            for side in tl.static_range(len(BLOCKS)):
                values = load_rows(v + first * D, counts[side], start, D, BLOCKS[side], BLOCK_SUM)
                sums = tl.dot(A[side], values, zeros(BLOCK_N, BLOCK_SUM), input_precision=PRECISION)
                out = num + ((s * G + g) * len(BLOCKS) + side) * N * D
                tl.store(out + row * D + dim, sums, mask=(row < N) & (dim < D))
                first += counts[side]


def affinity_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor | None,
    kernel: str,
    widths: Sequence[float],
    temperature: float,
    split: int,
    has_self: bool,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`drift_ops.ops.affinity_sums`; for problems that :func:`fit <group.fits_field>`."""
    (G, N, D), M, S = q.shape, k.shape[1], len(widths)
    counts = (split, M - split) if split else (M,)
    num, den = q.new_empty(S, G, len(counts), N, D), q.new_empty(S, G, len(counts), N)
    row_stats, col_stats = q.new_empty(S, G, 2, N), q.new_empty(S, G, 2, M)
    limits = launch.limits(q.device)
    block_n, *blocks = group.padded(N, *counts)
    with launch.on_device_of(q):
        autotune.start(
            _sums_kernel,
            (G,),
            q,
            k,
            v,
            q if w is None else w,
            num,
            den,
            row_stats,
            col_stats,
            tuple(map(float, widths)),
            float(temperature),
            floor**0.5,
            G,
            N,
            counts,
            D,
            BLOCK_N=block_n,
            BLOCKS=tuple(blocks),
            GAUSSIAN=kernel == "gaussian",
            HAS_SELF=has_self,
            WEIGHTED=w is not None,
            DIFFERENCES=D <= DIFFERENCES_UP_TO,
            PRECISION=launch.product_precision(limits.amd),
            configuration=group.configuration((block_n, *blocks), limits, pairs_of_lane=32).options,
        )
    return num, den, row_stats, col_stats
