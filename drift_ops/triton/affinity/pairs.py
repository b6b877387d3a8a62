"""What every streaming kernel is told of its problems, as one argument, and the distances of a tile of their pairs.

The keys of a problem are cut into tiles side by side, so that no tile holds keys of both sides.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.linalg import vector_norm

from ...spec import AffinitySpec, PairSpec
from .. import launch
from ..tiles import CLOSE, DIFFERENCES_UP_TO, load_rows, load_vector, pairs_within, self_pairs, squared_differences
from .rows import padded_depth, products, rows_of, split_rows

FAR = tl.constexpr(float("inf"))  # the distance of pairs that do not exist or are masked


class Pairs(NamedTuple):
    """G problems, each the pairs of N queries and M keys, and their logits."""

    q: Any  # [G, N, D]
    k: Any  # [G, M, D]
    w: Any  # [G, M], or None for 1
    q_norms: Any  # squared [G, N], unless DIFFERENCES
    k_norms: Any
    q_halves: Any  # unless DIFFERENCES
    k_halves: Any
    q_rows: Any  # of a problem, in the halves
    G: Any
    N: Any
    M: Any
    D: Any
    first_keys: Any  # those of the first side
    sides: Any
    widths: Any  # numbers, or [S, G] where IN_MEMORY
    temperature: Any
    least_affinity: Any  # or None for 0
    least_distance: Any  # or None for 0
    self_distance: Any
    unit: Any  # of distances: [], or None for 1
    self_logits: Any  # [S, G] to the base 2, or None: those of the distances
    S: Any  # how many widths
    IN_MEMORY: Any
    LOGIT: Any
    SELF: Any  # key i is query i, and "masked" or "apart" by self_distance; else "none"
    DIFFERENCES: Any  # D is so small that they serve all pairs: there are no halves and no norms
    EXACT: Any  # both halves are multiplied
    DEPTH: Any  # of the halves


def pairs_of(
    spec: AffinitySpec, q: Tensor, k: Tensor, w: Tensor | None, first_keys: int, unit: Tensor | None = None
) -> Pairs:
    """Of contiguous centred points."""
    apart = spec.self_distance < math.inf
    return Pairs(
        **shared_fields(spec, q, k, w, first_keys, apart),
        widths=tuple(map(float, spec.widths)),
        temperature=float(spec.temperature),
        self_distance=spec.self_distance if apart else 0.0,
        unit=None if unit is None else unit.float(),
        self_logits=None,
        S=tl.constexpr(len(spec.widths)),
        IN_MEMORY=tl.constexpr(False),
        LOGIT=tl.constexpr(spec.logit),
    )


def shared_fields(
    spec: AffinitySpec | PairSpec, q: Tensor, k: Tensor, w: Tensor | None, first_keys: int, apart: bool
) -> dict[str, Any]:
    """What does not depend on the logit; ``apart``: the pairs of a query with itself are not left out."""
    (G, N, D), M = q.shape, k.shape[1]
    differences = D <= DIFFERENCES_UP_TO
    halves = None if differences else split_rows(k)
    shared = spec.has_self or q is k  # the first keys are the queries
    norms = (None, None) if differences else [vector_norm(t, dim=2).square_() for t in (q, k)]
    return {
        "q": q,
        "k": k,
        "w": None if w is None else w.contiguous(),
        "q_norms": norms[0],
        "k_norms": norms[1],
        "q_halves": halves if shared or differences else split_rows(q),
        "k_halves": halves,
        "q_rows": M if shared else N,
        "G": G,
        "N": N,
        "M": M,
        "D": D,
        "first_keys": first_keys,
        "sides": spec.sides,
        "least_affinity": math.sqrt(spec.floor) or None,
        "least_distance": spec.least_distance or None,
        "SELF": tl.constexpr(("apart" if apart else "masked") if spec.has_self else "none"),
        "DIFFERENCES": tl.constexpr(differences),
        "EXACT": tl.constexpr(launch.splits_products()),
        "DEPTH": tl.constexpr(padded_depth(D)),
    }


class Points(NamedTuple):
    """The queries or the keys of a tile."""

    first: Any  # pointer to the first
    norms: Any  # [BLOCK], None with DIFFERENCES
    rows: Any  # their halves, likewise
    count: Any  # from there to the end


class Keys(NamedTuple):
    """A tile of keys."""

    first: Any
    count: Any  # from there to the end of the side
    side: Any


@triton.jit
def key_tiles(pairs, BLOCK: tl.constexpr):
    """How many tiles of keys a problem has."""
    return tl.cdiv(pairs.first_keys, BLOCK) + tl.cdiv(pairs.M - pairs.first_keys, BLOCK)


@triton.jit
def keys_of_tile(pairs, tile, BLOCK: tl.constexpr):
    tiles_of_first = tl.cdiv(pairs.first_keys, BLOCK)
    side = (tile >= tiles_of_first).to(tl.int32)
    first = tile * BLOCK + side * (pairs.first_keys - tiles_of_first * BLOCK)
    return Keys(first, pairs.first_keys + side * (pairs.M - pairs.first_keys) - first, side)


class Walk(NamedTuple):
    """A program's way through one rectangle of tiles, of :func:`.blocks.cut`."""

    g: Any
    row: Any  # of rectangles
    col: Any
    first_row_tile: Any
    row_end: Any
    first_col_tile: Any
    col_end: Any


@triton.jit
def walk_of_program(pairs, rectangles, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    program = tl.program_id(0)
    row = program % rectangles.rows
    col = program // rectangles.rows % rectangles.cols
    first_row = row * rectangles.row_tiles
    first_col = col * rectangles.col_tiles
    row_end = tl.minimum(first_row + rectangles.row_tiles, tl.cdiv(pairs.N, BLOCK_Q))
    col_end = tl.minimum(first_col + rectangles.col_tiles, key_tiles(pairs, BLOCK_K))
    g = (program // rectangles.rows // rectangles.cols).to(tl.int64)
    return Walk(g, row, col, first_row, row_end, first_col, col_end)


@triton.jit
def queries(pairs, g, i, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Those from the i-th of problem g on."""
    row = g * pairs.N + i
    return _points(
        pairs, pairs.q, pairs.q_norms, pairs.q_halves, row, g * pairs.q_rows + i, pairs.N - i, BLOCK, BLOCK_D
    )


@triton.jit
def keys(pairs, g, tile, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Those of a tile of problem g."""
    row = g * pairs.M + tile.first
    return _points(pairs, pairs.k, pairs.k_norms, pairs.k_halves, row, row, tile.count, BLOCK, BLOCK_D)


@triton.jit
def _points(pairs, points, norms, halves, row, half_row, count, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    first = points + row * pairs.D
    if pairs.DIFFERENCES:
        return Points(first, None, None, count)
    else:
        norms = load_vector(norms + row, count, 0, BLOCK)
        return Points(first, norms, rows_of(halves, half_row, count, pairs.EXACT, pairs.DEPTH, BLOCK, BLOCK_D), count)


@triton.jit
def distances(pairs, a, b, shift, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """``max(d, least_distance)/unit``, plus ``self_distance`` on self pairs that are apart, of queries and keys, or of
    keys and queries; FAR where there is no pair or a masked one. ``shift`` is the first of a − the first of b."""
    if pairs.DIFFERENCES:
        squared = squared_differences(a.first, b.first, a.count, b.count, pairs.D, BLOCK_A, BLOCK_B)
    else:
        norms = a.norms[:, None] + b.norms[None, :]
        squared = norms - 2 * products(a.rows, b.rows, pairs.EXACT, pairs.DEPTH, BLOCK_A, BLOCK_B, BLOCK_D)
        margin = squared - norms * CLOSE
        # of no pair it is 0 or more: its points are zero
        if tl.min(tl.min(margin, 1), 0) < 0:
            close = margin < 0
            if pairs.SELF != "none":
                close = close & (self_pairs(shift, BLOCK_A, BLOCK_B) == 0)
            squared = _correct_close(squared, close, a, b, pairs.D, BLOCK_A, BLOCK_B)
    d = tl.sqrt(squared)  # a self pair's may be NaN
    has_diagonal = (shift > -BLOCK_A) & (shift < BLOCK_B)
    if pairs.SELF == "apart":
        if has_diagonal:
            d = tl.where(self_pairs(shift, BLOCK_A, BLOCK_B), 0.0, d)
    if pairs.least_distance is not None:
        d = tl.where(d < pairs.least_distance, pairs.least_distance, d)
    if pairs.unit is not None:
        d *= 1 / tl.load(pairs.unit)
    if pairs.SELF == "apart":
        if has_diagonal:
            d = tl.where(self_pairs(shift, BLOCK_A, BLOCK_B), d + pairs.self_distance, d)
    special = (a.count < BLOCK_A) | (b.count < BLOCK_B)
    if pairs.SELF == "masked":
        special = special | has_diagonal
    if special:  # most tiles are not
        exists = pairs_within(a.count, b.count, BLOCK_A, BLOCK_B)
        if pairs.SELF == "masked":
            exists = exists & (self_pairs(shift, BLOCK_A, BLOCK_B) == 0)
        d = tl.where(exists, d, FAR)
    return d


@triton.jit
def distances_of_tile(pairs, g, i, tile, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same of the queries from the i-th on and a tile of keys."""
    own = queries(pairs, g, i, BLOCK_Q, BLOCK_D)
    others = keys(pairs, g, tile, BLOCK_K, BLOCK_D)
    return distances(pairs, own, others, i - tile.first, BLOCK_Q, BLOCK_K, BLOCK_D)


@triton.jit
def _correct_close(squared, close, a, b, D, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """Works out from differences the distances to every b of the tile that is close to an a."""
    STEP: tl.constexpr = 16
    left = tl.max(close.to(tl.int32), 0)
    while tl.max(left, 0) > 0:
        j = tl.argmax(left, 0)
        exact = tl.zeros([BLOCK_A], tl.float32)
        for start in range(0, D, STEP):
            difference = load_rows(a.first, a.count, start, D, BLOCK_A, STEP) - load_vector(
                b.first + j * D, D, start, STEP
            )
            exact += tl.sum(difference * difference, 1)
        chosen = tl.arange(0, BLOCK_B) == j
        squared = tl.where(chosen[None, :], exact[:, None], squared)
        left = tl.where(chosen, 0, left)
    return squared
