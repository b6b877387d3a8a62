"""Float32 products out of float16 ones: ``x·2^e = hi + lo`` in two float16 parts of 11 bits each.

``x·y ≈ hi·hi + hi·lo + lo·hi`` has 22 bits and costs three products at float16's rate, where three TF32 products of the
same precision cost twice that, and float16 tiles may be transposed on their way to the tensor cores. ``hi·hi`` alone is
as precise as TF32. The power of two brings the largest entry near the top of float16's range: entries down to 2^-16 of
it keep all their bits. After Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
surpassing the FP32 theoretical peak performance", 2022.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(14)  # bits before the point of a scaled entry: |x|·2^e < 2^14


@triton.jit
def exponent(largest):
    """``e`` with ``2^13 <= largest·2^e < 2^14``, float32; 0 where ``largest`` is 0 or not finite."""
    bits = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    e = (-bits + (LARGEST + 126)).to(tl.float32)
    # 2^e and 2^-2e are float32 numbers too
    e = tl.where(e > 60, 60.0, tl.where(e < -60, -60.0, e))
    return tl.where((bits == 0) | (bits == 255), 0.0, e)


@triton.jit
def split(x):
    """``(hi, lo)`` float16 of ``|x| < 2^15``, ``hi + lo ≈ x`` to 22 bits."""
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def product(a_hi, a_lo, b_hi, b_lo, EXACT: tl.constexpr):
    """``a @ b``, the small parts first; of the parts hi alone unless EXACT."""
    if EXACT:
        total = tl.dot(a_lo, b_hi)
        total = tl.dot(a_hi, b_lo, total)
        return tl.dot(a_hi, b_hi, total)
    else:
        return tl.dot(a_hi, b_hi)


@triton.jit
def add_product(total, a_hi, a_lo, b_hi, b_lo, EXACT: tl.constexpr, LONG: tl.constexpr):
    """``total + a @ b``; of the parts hi alone unless EXACT.

    The tensor cores cut what they add, and a sum that runs through them for LONG would drift: then each product starts
    at zero, the small parts first, and is added to ``total`` outside.
    """
    if EXACT and LONG:
        return total + product(a_hi, a_lo, b_hi, b_lo, EXACT)
    else:
        if EXACT:
            total = tl.dot(a_lo, b_hi, total)
            total = tl.dot(a_hi, b_lo, total)
        return tl.dot(a_hi, b_hi, total)
