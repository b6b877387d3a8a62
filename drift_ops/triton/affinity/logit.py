"""The logit, a function of the distance, and its derivative: all that the kernels know of it.

It is chosen by its name, ``LOGIT``; one more is one more branch in each of these functions, where an infinite distance,
that of pairs that do not exist, must have the logit −∞. Logits are to the base 2: softmaxes are ratios of ``2^L``. The
square of the distance serves sums over pairs only, which need no level.
"""

import math

import triton
import triton.language as tl

from ..group import one_of
from ..tiles import NOTHING, self_pairs

LOG2E = tl.constexpr(math.log2(math.e))
UNKNOWN = tl.constexpr("unknown logit")


@triton.jit
def logits(d, width, temperature, LOGIT: tl.constexpr):
    """``L·log2(e)`` of distances; NaN stays NaN."""
    if LOGIT == "laplace":  # L = −d/width
        return d * (-LOG2E / width)
    elif LOGIT == "gaussian":  # L = exp(−d²/(2·width²))/temperature
        L = tl.exp2(d * d * (-0.5 * LOG2E / (width * width))) * (LOG2E / temperature)
        return tl.where(d == float("inf"), NOTHING, L)
    elif LOGIT == "square":  # L = −d²/width
        return d * d * (-LOG2E / width)
    else:
        tl.static_assert(False, UNKNOWN)


@triton.jit
def slopes(L, d, width, LOGIT: tl.constexpr):
    """``(∂L/∂d)/d``, with which the gradient of L w.r.t. a query is its difference to the key; 0 where there is none.

    ``L`` are the logits to the base 2, the slopes those of the logits themselves.
    """
    if LOGIT == "laplace":
        return tl.where(d > 0, 1 / d, 0.0) * (-1 / width)
    elif LOGIT == "gaussian":
        return L * (-1 / (LOG2E * width * width))
    elif LOGIT == "square":
        return -2 / width
    else:
        tl.static_assert(False, UNKNOWN)


@triton.jit
def width_of(pairs, s, g):
    """The s-th width, for problem g."""
    if pairs.IN_MEMORY:
        return tl.load(pairs.widths + s * pairs.G + g)
    else:
        return one_of(pairs.widths, s)


@triton.jit
def tile_logits(pairs, d, s, g, shift, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr):
    """Of a tile of distances of problem g, for the s-th width; ``shift`` is the first of a − the first of b."""
    L = logits(d, width_of(pairs, s, g), pairs.temperature, pairs.LOGIT)
    if pairs.self_logits is not None:
        if (shift > -BLOCK_A) & (shift < BLOCK_B):
            own = self_pairs(shift, BLOCK_A, BLOCK_B) & (d != float("inf"))
            L = tl.where(own, tl.load(pairs.self_logits + s * pairs.G + g), L)
    return L


@triton.jit
def first_level(temperature, LOGIT: tl.constexpr):
    """A guess at logits, to which sums of exponentials are relative at first."""
    if LOGIT == "laplace":
        return 0.0
    elif LOGIT == "gaussian":
        return 0.5 * LOG2E / temperature
    else:
        tl.static_assert(False, UNKNOWN)


@triton.jit
def better_level(level, tops, LOGIT: tl.constexpr):
    """The level for logits whose maxima ``tops`` left its range."""
    if LOGIT == "laplace":  # the geometric mean of negative logits, which outliers hardly move
        sizes = tl.where(tops == NOTHING, 0.0, tl.log2(tl.maximum(-tops, 1.0)))
        counts = tl.where(tops == NOTHING, 0.0, 1.0)
        return -tl.exp2(tl.sum(sizes, 0) / tl.maximum(tl.sum(counts, 0), 1.0))
    elif LOGIT == "gaussian":  # all lie within 1/temperature
        return level
    else:
        tl.static_assert(False, UNKNOWN)
