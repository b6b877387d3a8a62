"""What the kernels share that work on tiles of queries × keys: loads, differences, self pairs.

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
def squared_differences(
    q, k, q_count, k_count, D, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, q_stride=None, k_stride=None
):
    """``Σ (q_i − k_j)²`` [BLOCK_Q, BLOCK_K], dimension by dimension: exact, and slow where D is large.

    The strides are those of rows, None for D.
    """
    i = tl.arange(0, BLOCK_Q)
    j = tl.arange(0, BLOCK_K)
    in_q = i * D if q_stride is None else i.to(tl.int64) * q_stride
    in_k = j * D if k_stride is None else j.to(tl.int64) * k_stride
    total = tl.zeros([BLOCK_Q, BLOCK_K], dtype=tl.float32)
    for dim in range(D):
        a = tl.load(q + in_q + dim, mask=i < q_count, other=0.0).to(tl.float32)
        b = tl.load(k + in_k + dim, mask=j < k_count, other=0.0).to(tl.float32)
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
def finite_shift(top):
    """The maximum to subtract in a softmax: 0 where nothing is unmasked, so that exp(−∞ − shift) is 0 and not NaN."""
    return tl.where(top == NOTHING, 0.0, top)
