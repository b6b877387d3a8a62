"""Sinkhorn's iterations on the tile of a group, which stays in registers: they move no memory.

They are in the scaling domain: ``K = exp2(L + u + v)`` once, and then every iteration finds factors of rows and
columns, ``a = 1/(K b)`` and ``b = shares/(Kᵀ a)``. Where a factor would exceed MOST, an iteration takes logarithms
instead: the factors go into the potentials u and v, and these into K (Schmitzer's stabilisation).
"""

import triton
import triton.language as tl

from ..tiles import NOTHING, finite_shift

MOST = tl.constexpr(2.0**40)  # of a factor, so that what was lost when K was rounded to 0 matters nowhere


@triton.jit
def log_sums_of_rows(L):
    """Over all tiles, to the base 2; −∞ where nothing is left."""
    top = tl.max(L[0], 1)
    for n in tl.static_range(1, len(L)):
        top = tl.maximum(top, tl.max(L[n], 1))
    level = finite_shift(top)
    total = level * 0.0
    for n in tl.static_range(len(L)):
        total += tl.sum(tl.exp2(L[n] - level[:, None]), 1)
    return tl.where(total == 0, NOTHING, level + tl.log2(tl.where(total == 0, 1.0, total)))


@triton.jit
def log_sums_of_columns(L):
    """Of every tile."""
    found = ()
    for n in tl.static_range(len(L)):
        level = finite_shift(tl.max(L[n], 0))
        total = tl.sum(tl.exp2(L[n] - level[None, :]), 0)
        found = found + (tl.where(total == 0, NOTHING, level + tl.log2(tl.where(total == 0, 1.0, total))),)
    return found


@triton.jit
def _exponentials(L, u, v):
    K = ()
    for n in tl.static_range(len(L)):
        K = K + (tl.exp2(L[n] + (u[:, None] + v[n][None, :])),)
    return K


@triton.jit
def _with_factors(potentials, factors):
    """Potentials that factors have gone into; −∞ where a factor is 0."""
    found = ()
    for n in tl.static_range(len(factors)):
        f = factors[n]
        found = found + (tl.where(f == 0, NOTHING, potentials[n] + tl.log2(tl.where(f == 0, 1.0, f))),)
    return found


@triton.jit
def _scale(K, b, shares, empty):
    """Factors of rows, sums of columns under these, and the largest factor or sum."""
    total = tl.sum(K[0] * b[0][None, :], 1)
    for n in tl.static_range(1, len(K)):
        total += tl.sum(K[n] * b[n][None, :], 1)
    a = tl.where(empty, 0.0, 1 / total)
    largest = tl.max(tl.where(empty, 0.0, tl.maximum(total, a)))
    sums = ()
    for n in tl.static_range(len(K)):
        of_columns = tl.sum(K[n] * a[:, None], 0)
        sums = sums + (of_columns,)
        most = tl.maximum(of_columns, shares[n] / of_columns)
        largest = tl.maximum(largest, tl.max(tl.where(shares[n] == 0, 0.0, most)))
    return a, sums, largest


@triton.jit
def _error(sums, shares):
    """Of the sums of columns."""
    error = 0.0
    for n in tl.static_range(len(sums)):
        error += tl.sum(tl.where(shares[n] == 0, 0.0, tl.abs(sums[n] - shares[n])))
    return error


@triton.jit
def _factors(sums, shares):
    found = ()
    for n in tl.static_range(len(sums)):
        found = found + (tl.where(shares[n] == 0, 0.0, shares[n] / sums[n]),)
    return found


@triton.jit
def _products(b, sums):
    found = ()
    for n in tl.static_range(len(sums)):
        found = found + (b[n] * sums[n],)
    return found


@triton.jit
def _scale_logarithms(L, v, shares):
    """An iteration from potentials of columns: those of rows and columns, and the sums of columns in between."""
    shifted = ()
    for n in tl.static_range(len(L)):
        shifted = shifted + (L[n] + v[n][None, :],)
    log_sum = log_sums_of_rows(shifted)
    u = tl.where(log_sum == NOTHING, 0.0, -log_sum)
    shifted = ()
    for n in tl.static_range(len(L)):
        shifted = shifted + (L[n] + u[:, None],)
    log_sums = log_sums_of_columns(shifted)
    sums = ()
    potentials = ()
    for n in tl.static_range(len(L)):
        log_sum = tl.where(log_sums[n] == NOTHING, 0.0, log_sums[n])
        sums = sums + (tl.exp2(log_sum + v[n]),)
        positive = shares[n] > 0
        potentials = potentials + (tl.where(positive, tl.log2(tl.where(positive, shares[n], 1.0)) - log_sum, NOTHING),)
    return u, potentials, sums


@triton.jit
def sinkhorn(L, shares, ITERATIONS: tl.constexpr, targets):
    """r and c of the plan of logits L, a tuple of tiles, with rows that sum to 1 and columns that sum to ``shares``;
    and the mean error of the sums of columns, of so many targets, before they were scaled for the last time."""
    log_sum = log_sums_of_rows(L)
    empty = log_sum == NOTHING
    u = tl.where(empty, 0.0, -log_sum)
    a = u * 0.0
    v = ()
    b = ()
    for n in tl.static_range(len(L)):
        v = v + (shares[n] * 0.0,)
        b = b + (shares[n] * 0.0 + 1.0,)
    K = _exponentials(L, u, v)
    found = b  # sums of columns before they were scaled for the last time
    for _ in range(ITERATIONS):
        a, sums, largest = _scale(K, b, shares, empty)
        if largest < MOST:
            found = _products(b, sums)
            b = _factors(sums, shares)
        else:
            u, v, found = _scale_logarithms(L, _with_factors(v, b), shares)
            b = _factors(shares, shares)
            a = tl.where(empty, 0.0, 1.0)
            K = _exponentials(L, u, v)
    row = tl.where(empty, float("inf"), -(u + tl.log2(tl.where(empty, 1.0, a))))
    col = ()
    v = _with_factors(v, b)
    for n in tl.static_range(len(L)):
        col = col + (-v[n],)
    return row, col, _error(found, shares) / targets
