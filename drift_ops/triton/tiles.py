"""What every kernel computes on a tile of queries × keys: distances, logits, softmax statistics, affinities.

The doubly normalised affinity is ``A_ij = sqrt(softmax_j(L)_ij · softmax_i(L)_ij)``. With the row maximum m_i and the
row sum ``s_i = Σ_j exp(L_ij − m_i)``, and likewise n_j, t_j for columns,
``A_ij = exp(L_ij − (m_i + n_j)/2) · (s_i·t_j)^-½``: two statistics a row and a column, one exponential an element, no
matrix kept.

Points are rows of contiguous ``[…, D]`` arrays. A tile of them is given as a pointer to its first row and the number of
rows that exist; callers do the 64-bit arithmetic that leads to that pointer, offsets inside a tile fit in 32 bits.
"""

import triton
import triton.language as tl

# Pairs with d² below this share of their squared norms (5 bits lost in ‖q‖² + ‖k‖² − 2q·k) are worked out from
# differences.
CLOSE = tl.constexpr(1 / 32)

# Up to this dimension differences cost no more than products and a look for close pairs.
DIFFERENCES_UP_TO = 16

NOTHING = tl.constexpr(float("-inf"))  # a logit whose softmax is exactly 0


@triton.jit
def load_rows(points, count, start, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Dimensions [start, start + BLOCK_D) of rows [0, count), float32 [BLOCK, BLOCK_D]; zero where there is nothing."""
    row = tl.arange(0, BLOCK)[:, None]
    dim = start + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(points + row * D + dim, mask=(row < count) & (dim < D), other=0.0).to(tl.float32)


@triton.jit
def load_vector(x, count, start, BLOCK: tl.constexpr):
    """Entries [start, start + BLOCK) of x [count], float32; zero where there is nothing."""
    n = start + tl.arange(0, BLOCK)
    return tl.load(x + n, mask=n < count, other=0.0).to(tl.float32)


@triton.jit
def pairs_within(q_count, k_count, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which pairs of a tile exist: bool [BLOCK_Q, BLOCK_K]."""
    return (tl.arange(0, BLOCK_Q)[:, None] < q_count) & (tl.arange(0, BLOCK_K)[None, :] < k_count)


@triton.jit
def self_pairs(shift, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where key j of the tile is query i of the tile: ``i + shift == j``. ``shift`` is first query − first key."""
    return tl.arange(0, BLOCK_Q)[:, None] + shift == tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def squared_differences(q, k, q_count, k_count, D, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """``Σ (q_i − k_j)²`` [BLOCK_Q, BLOCK_K], dimension by dimension: exact, and slow where D is large."""
    i = tl.arange(0, BLOCK_Q)
    j = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
    for dim in range(D):
        a = tl.load(q + i * D + dim, mask=i < q_count, other=0.0).to(tl.float32)
        b = tl.load(k + j * D + dim, mask=j < k_count, other=0.0).to(tl.float32)
        difference = a[:, None] - b[None, :]
        total += difference * difference
    return total


@triton.jit
def at_least(x, least):
    """``max(x, least)``; NaN stays NaN."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def roots(squared, least, shift, HAS_SELF: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """``max(sqrt(squared), least)``; NaN stays NaN. With HAS_SELF, self pairs are exactly ``least``."""
    d = tl.sqrt(at_least(squared, least * least))
    if HAS_SELF:
        d = tl.where(self_pairs(shift, BLOCK_Q, BLOCK_K), least, d)
    return d


@triton.jit
def distances_from_products(
    products,  # q_i·k_j of centred points [BLOCK_Q, BLOCK_K]
    q_norms,  # squared norms of the same centred points [BLOCK_Q]
    k_norms,  # [BLOCK_K]
    q,  # the points, for a tile with close pairs
    k,
    q_count,
    k_count,
    D,
    least,
    shift,  # first query − first key, for HAS_SELF
    HAS_SELF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``max(‖q_i − k_j‖, least)`` from products, or from differences where the tile holds a close pair."""
    norms = q_norms[:, None] + k_norms[None, :]
    squared = norms - 2 * products
    margin = tl.where(pairs_within(q_count, k_count, BLOCK_Q, BLOCK_K), squared - norms * CLOSE, 0.0)
    if HAS_SELF:
        margin = tl.where(self_pairs(shift, BLOCK_Q, BLOCK_K), 0.0, margin)
    if tl.min(margin) < 0:
        squared = squared_differences(q, k, q_count, k_count, D, BLOCK_Q, BLOCK_K)
    return roots(squared, least, shift, HAS_SELF, BLOCK_Q, BLOCK_K)


@triton.jit
def distances(
    q,
    k,
    q_count,
    k_count,
    D,
    least,
    shift,  # first query − first key, for HAS_SELF
    HAS_SELF: tl.constexpr,
    DIFFERENCES: tl.constexpr,  # D <= DIFFERENCES_UP_TO
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``max(‖q_i − k_j‖, least)`` [BLOCK_Q, BLOCK_K] of centred points; finite where there is no pair."""
    if DIFFERENCES:
        squared = squared_differences(q, k, q_count, k_count, D, BLOCK_Q, BLOCK_K)
        return roots(squared, least, shift, HAS_SELF, BLOCK_Q, BLOCK_K)
    else:
        products = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
        q_norms = tl.zeros([BLOCK_Q], dtype=tl.float32)
        k_norms = tl.zeros([BLOCK_K], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            a = load_rows(q, q_count, start, D, BLOCK_Q, BLOCK_D)
            b = load_rows(k, k_count, start, D, BLOCK_K, BLOCK_D)
            q_norms += tl.sum(a * a, 1)
            k_norms += tl.sum(b * b, 1)
            products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
        return distances_from_products(
            products, q_norms, k_norms, q, k, q_count, k_count, D, least, shift, HAS_SELF, BLOCK_Q, BLOCK_K
        )


@triton.jit
def kernel_logits(d, exists, width, temperature, GAUSSIAN: tl.constexpr):
    """``L = −d/width`` (Laplace) or ``exp(−d²/(2·width²))/temperature`` (Gaussian); NOTHING unless ``exists``."""
    if GAUSSIAN:
        logits = tl.exp(d * d * (-0.5 / (width * width))) * (1 / temperature)
    else:
        logits = d * (-1 / width)
    return tl.where(exists, logits, NOTHING)


@triton.jit
def finite_shift(top):
    """The maximum to subtract in a softmax: 0 where nothing is unmasked, so that exp(−∞ − shift) is 0 and not NaN."""
    return tl.where(top == NOTHING, 0.0, top)


@triton.jit
def finish_statistics(top, total):
    """Maximum and sum of exp(L − maximum) to the statistics (maximum, sum^-½); (0, 0) where nothing is unmasked."""
    empty = total == 0
    return tl.where(empty, 0.0, top), tl.where(empty, 0.0, tl.rsqrt(tl.where(empty, 1.0, total)))


@triton.jit
def affinities(logits, row_max, row_factor, col_max, col_factor, least):
    """``max(A, least)`` of the logits, from finished statistics; ``least`` is the square root of the affinity floor.

    Pairs that do not exist or are masked get ``least`` too: the caller sets them to 0.
    """
    exponent = logits - (row_max * 0.5)[:, None] - (col_max * 0.5)[None, :]
    A = tl.exp(exponent) * (row_factor[:, None] * col_factor[None, :])
    return tl.where(A < least, least, A)
