"""The streaming kernels' points in float16 parts (:mod:`.halves`), made once a call, and the distances of a tile.

The parts lie in memory as the kernels want them: dimensions padded with zeros to ``depth``, so that loads are aligned
and go straight to where the tensor cores read.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.linalg import vector_norm

from . import launch
from .halves import add_product, exponent, product, split
from .streaming_tiles import Blocks, correct_close_keys
from .tiles import CLOSE, DIFFERENCES_UP_TO, load_vector, pairs_within, self_pairs, squared_differences

LOG2E = tl.constexpr(math.log2(math.e))

# An affinity is at most 1; float16 has most bits for numbers between 2^-14 and 2^15.
AFFINITY_BITS = tl.constexpr(15)
AFFINITY_SCALE = tl.constexpr(2.0**15)

WHOLE_UP_TO = 256  # dimensions of a tile of points that is loaded as one


# By kernel and precision: where distances are worked out from differences, from products of up to 64 dimensions, and
# of more.
BLOCKS = {
    ("statistics", "high"): (Blocks(64, 64, 16, 0, 16, 2), Blocks(64, 64, 64, 0, 4, 3), Blocks(64, 64, 256, 0, 4, 2)),
    ("statistics", "highest"): (
        Blocks(64, 64, 16, 0, 16, 2),
        Blocks(64, 64, 64, 0, 4, 3),
        Blocks(64, 64, 64, 0, 4, 3),
    ),
    ("sums", "high"): (Blocks(64, 64, 16, 16, 8, 2), Blocks(64, 64, 64, 64, 4, 3), Blocks(64, 64, 256, 256, 4, 2)),
    ("sums", "highest"): (Blocks(64, 64, 16, 16, 8, 2), Blocks(64, 64, 64, 64, 4, 2), Blocks(128, 64, 64, 128, 8, 3)),
}
SMALL = {"statistics": Blocks(64, 64, 32, 0, 4, 2), "sums": Blocks(64, 32, 32, 64, 4, 2)}  # from products
# Too few rows for products in tensor memory, on which Triton 3.6 fails.
TENSOR_MEMORY = {"statistics": Blocks(32, 32, 64, 0, 4, 3), "sums": Blocks(32, 64, 64, 128, 4, 3)}
LARGE_SHARED_BYTES = 220_000  # what BLOCKS are for: Hopper and later


def choose_blocks(kernel: str, q: Tensor, k: Tensor) -> Blocks:
    """The blocks of a kernel of the forward, no larger than the problem."""
    (N, D), M = q.shape[1:], k.shape[1]
    by_dimensions = BLOCKS[kernel, "highest" if launch.splits_products() else "high"]
    blocks = by_dimensions[(D > DIFFERENCES_UP_TO) + (D > 64)]
    limits = launch.limits(q.device)
    if D > DIFFERENCES_UP_TO and limits.tensor_memory:
        blocks = TENSOR_MEMORY[kernel]
    elif D > DIFFERENCES_UP_TO and limits.shared_bytes < LARGE_SHARED_BYTES:
        blocks = SMALL[kernel]
    elif D > WHOLE_UP_TO:
        blocks = blocks._replace(depth=64, stages=3)
    return blocks.within(N, M, padded_depth(D))


def common_arguments(q: Tensor, k: Tensor, split: int, has_self: bool) -> dict[str, Any]:
    """Arguments of the same name and meaning in all kernels."""
    (N, D), M = q.shape[1:], k.shape[1]
    return parts_of_pairs(q, k, has_self) | {
        "q": q,
        "k": k,
        "norms": (q, k) if D <= DIFFERENCES_UP_TO else tuple(vector_norm(t, dim=2).square_() for t in (q, k)),
        "N": N,
        "M": M,
        "D": D,
        "split": split or M,
        "SELF": "masked" if has_self else "none",
    }


def forward_arguments(
    q: Tensor,
    k: Tensor,
    split: int,
    has_self: bool,
    least_distance: float,
    self_distance: float,
    unit: Tensor | None,
) -> dict[str, Any]:
    """Those that are the same in the kernels of the forward."""
    arguments = common_arguments(q, k, split, has_self) | {
        "unit": None if unit is None else unit.float(),
        "least": least_distance or None,
        "self_distance": self_distance,
    }
    return arguments | ({"SELF": "apart"} if has_self and self_distance < math.inf else {})


def padded_depth(D: int) -> int:
    """Dimensions of the parts of points of D dimensions."""
    return launch.padded_block(D) if D <= WHOLE_UP_TO else triton.cdiv(D, 64) * 64


def largest_entries(x: Tensor) -> Tensor:
    """The largest absolute value of every problem of ``x [G, …]``, ``[G]``; NaN where there is one. Makes no copy."""
    return vector_norm(x.flatten(1), ord=math.inf, dim=1)


Halves = tuple[Tensor, Tensor, Tensor]


def split_points(x: Tensor, w: Tensor | None, largest: Tensor) -> Halves:
    """``(hi, lo, largest)`` of ``x [G, count, D]``, times ``w [G, count]``: ``x·2^e = hi + lo`` in float16
    ``[G, count, depth]`` with the e of ``largest [G]``, which no entry of a problem exceeds. At "high" lo is hi, and
    unused."""
    G, count, D = x.shape
    shape, exact = (G, count, padded_depth(D)), launch.splits_products()
    hi = x.new_empty(shape, dtype=torch.float16)
    lo = torch.empty_like(hi) if exact else hi
    block_d = min(256, launch.padded_block(D))
    rows = max(1, 4096 // block_d)
    split_kernel[triton.cdiv(G * count, rows),](
        x,
        w,
        largest,
        hi,
        lo,
        G * count,
        count,
        D,
        DEPTH=shape[2],
        SPLIT=exact,
        BLOCK=rows,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return hi, lo, largest


def parts_of_pairs(q: Tensor, k: Tensor, has_self: bool) -> dict[str, Any]:
    """Arguments of the kernels: the parts of queries and keys. Without any up to DIFFERENCES_UP_TO dimensions."""
    G, N, D = q.shape
    exact = launch.splits_products()
    if D <= DIFFERENCES_UP_TO:  # the kernels do not look at the parts
        unused = dict.fromkeys(("q_halves", "k_halves"), (q, q, q))
        return unused | {"q_rows": N, "DEPTH": padded_depth(D), "SPLIT": exact, "DIFFERENCES": True}
    shared = has_self or q is k  # the first keys are the queries
    largest = largest_entries(k) if shared else torch.maximum(largest_entries(q), largest_entries(k))
    of_k = split_points(k, None, largest)
    of_q = of_k if shared else split_points(q, None, largest)
    return {
        "q_halves": of_q,
        "k_halves": of_k,
        "q_rows": of_q[0].shape[1],  # from one problem's first query to the next's, in the parts
        "DEPTH": of_k[0].shape[2],
        "SPLIT": exact,
        "DIFFERENCES": False,
    }


@triton.jit
def power_of_two(e):
    """``2^e`` of a whole number e."""
    return ((e.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_kernel(
    x,  # [rows, D]
    w,  # [rows] or None
    largest,  # [problems]
    hi,  # [rows, DEPTH]
    lo,  # [rows, DEPTH]
    rows,
    count,  # rows of a problem
    D,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The parts of some rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = power_of_two(exponent(tl.load(largest + row // count, mask=row < rows, other=0.0)))
    if w is not None:
        factor *= tl.load(w + row, mask=row < rows, other=0.0)
    for start in range(0, DEPTH, BLOCK_D):
        dim = start + tl.arange(0, BLOCK_D)
        given = (row < rows)[:, None] & (dim < D)[None, :]
        values = tl.load(x + row[:, None] * D + dim[None, :], mask=given, other=0.0)
        values_hi, values_lo = split(values * factor[:, None])
        at = row[:, None] * DEPTH + dim[None, :]
        inside = (row < rows)[:, None] & (dim < DEPTH)[None, :]
        tl.store(hi + at, values_hi, mask=inside)
        if SPLIT:
            tl.store(lo + at, values_lo, mask=inside)


@triton.jit
def load_part(part, count, start, DEPTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions [start, start + BLOCK_D) of rows [0, count) of a part; zero where there is nothing."""
    row = tl.arange(0, BLOCK)[:, None]
    dim = start + tl.arange(0, BLOCK_D)[None, :]
    inside = row < count
    if DEPTH % BLOCK_D != 0:
        inside = inside & (dim < DEPTH)
    return tl.load(part + row * DEPTH + dim, mask=inside, other=0.0)


@triton.jit
def rows_of(halves, row, DEPTH: tl.constexpr):
    """Where the parts of rows from ``row`` on are."""
    return halves[0] + row * DEPTH, halves[1] + row * DEPTH


@triton.jit
def load_parts(
    parts, count, start, SPLIT: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The same of both parts; hi twice unless SPLIT."""
    hi = load_part(parts[0], count, start, DEPTH, BLOCK, BLOCK_D)
    if SPLIT:
        return hi, load_part(parts[1], count, start, DEPTH, BLOCK, BLOCK_D)
    else:
        return hi, hi


@triton.jit
def load_whole(
    halves,
    row,
    count,
    SPLIT: tl.constexpr,
    DIFFERENCES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All dimensions of both parts, if a block holds them; else where they are."""
    parts = rows_of(halves, row, DEPTH)
    if DIFFERENCES or BLOCK_D < DEPTH:
        return parts
    else:
        return load_parts(parts, count, 0, SPLIT, DEPTH, BLOCK, BLOCK_D)


@triton.jit
def products_of_parts(
    a,  # see load_whole
    b,
    a_count,
    b_count,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``a_i·b_j`` [BLOCK_A, BLOCK_B] of the rows of two tiles, with the scales of both."""
    if BLOCK_D >= DEPTH:
        return product(a[0], a[1], tl.trans(b[0]), tl.trans(b[1]), SPLIT)
    else:
        total = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for start in range(0, DEPTH, BLOCK_D):
            a_hi, a_lo = load_parts(a, a_count, start, SPLIT, DEPTH, BLOCK_A, BLOCK_D)
            b_hi, b_lo = load_parts(b, b_count, start, SPLIT, DEPTH, BLOCK_B, BLOCK_D)
            total = add_product(total, a_hi, a_lo, tl.trans(b_hi), tl.trans(b_lo), SPLIT, False)
        return total


@triton.jit
def has_diagonal(shift, SELF: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether a tile holds self pairs. ``shift`` is first query − first key."""
    if SELF == "none":
        return False
    else:
        return (shift > -BLOCK_Q) & (shift < BLOCK_K)


@triton.jit
def hide_missing(
    logits, hidden, q_count, k_count, shift, SELF: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """``logits``, or ``hidden`` where there is no pair or a masked one. Most tiles have none."""
    special = (q_count < BLOCK_Q) | (k_count < BLOCK_K)
    if SELF == "masked":
        special = special | has_diagonal(shift, SELF, BLOCK_Q, BLOCK_K)
    if special:
        exists = pairs_within(q_count, k_count, BLOCK_Q, BLOCK_K)
        if SELF == "masked":
            exists = exists & (self_pairs(shift, BLOCK_Q, BLOCK_K) == 0)
        logits = tl.where(exists, logits, hidden)
    return logits


@triton.jit
def tile_distances(
    q_parts,  # see load_whole
    k_parts,
    q,  # first row of the tile
    k,
    q_norms,  # of the tile
    k_norms,
    undo,  # of the products of parts to q·k
    q_count,  # rows from there to the end
    k_count,
    shift,  # first query − first key
    D,
    least,  # or None for 0
    per_unit,
    self_distance,
    SELF: tl.constexpr,  # key i is query i, and "masked", or "apart" by self_distance; else "none"
    SPLIT: tl.constexpr,
    DIFFERENCES: tl.constexpr,  # D is so small that they serve all pairs: there are no parts and no norms
    DEPTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``δ = max(d, least)/unit``, plus ``self_distance`` on self pairs that are apart, of a tile.

    Anything where there is no pair or a masked one.
    """
    if DIFFERENCES:
        squared = squared_differences(q, k, q_count, k_count, D, BLOCK_Q, BLOCK_K)
    else:
        q_part = load_vector(q_norms, q_count, 0, BLOCK_Q)
        k_part = load_vector(k_norms, k_count, 0, BLOCK_K)
        products = products_of_parts(q_parts, k_parts, q_count, k_count, SPLIT, DEPTH, BLOCK_Q, BLOCK_K, BLOCK_D)
        norms = q_part[:, None] + k_part[None, :]
        squared = norms - products * (2 * undo)
        margin = squared - norms * CLOSE
        # of no pair it is 0 or more: its points are zero
        if tl.min(tl.min(margin, 1), 0) < 0:
            close = margin < 0
            if SELF != "none":
                close = close & (self_pairs(shift, BLOCK_Q, BLOCK_K) == 0)
            squared = correct_close_keys(squared, close, q, k, q_count, D, BLOCK_Q, BLOCK_K, 16)
    d = tl.sqrt(squared)  # a self pair's may be NaN
    if SELF == "apart":
        if has_diagonal(shift, SELF, BLOCK_Q, BLOCK_K):
            d = tl.where(self_pairs(shift, BLOCK_Q, BLOCK_K), 0.0, d)
    if least is not None:
        d = tl.where(d < least, least, d)
    d *= per_unit
    if SELF == "apart":
        if has_diagonal(shift, SELF, BLOCK_Q, BLOCK_K):
            d = tl.where(self_pairs(shift, BLOCK_Q, BLOCK_K), d + self_distance, d)
    return d


@triton.jit
def tile_logits(d, width, temperature, GAUSSIAN: tl.constexpr):
    """``L = −d/width`` (Laplace) or ``exp(−d²/(2·width²))/temperature`` (Gaussian), times log2(e)."""
    if GAUSSIAN:
        return tl.exp2(d * d * (-0.5 * LOG2E / (width * width))) * (LOG2E / temperature)
    else:
        return d * (-LOG2E / width)


@triton.jit
def scale_of_products(largest, DIFFERENCES: tl.constexpr):
    """What products of the parts of a problem are multiplied with to undo their scale."""
    if DIFFERENCES:
        return 1.0
    else:
        return power_of_two(-2 * exponent(tl.load(largest)))


@triton.jit
def scale_of(halves, problem):
    """What undoes the scale of the halves of a problem."""
    return power_of_two(-exponent(tl.load(halves[2] + problem)))


@triton.jit
def inverse_of(unit):
    """``1/unit``; 1 for None."""
    if unit is None:
        return 1.0
    else:
        return 1 / tl.load(unit)
