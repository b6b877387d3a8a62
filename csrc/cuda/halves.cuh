// float32 products out of float16 ones: x·2^e = hi + lo, two parts of 11 bits, and x·y ≈ hi·hi + hi·lo + lo·hi. The power of
// two brings the largest entry near the top of float16's range; entries down to 2^-16 of it keep all their bits. After Ootomo
// and Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
// performance", 2022.
//
// In shared memory, 32 floats of a row become 32 high halves and, after them, the 32 low ones.
#pragma once
#include <cuda_fp16.h>

#include "launch.cuh"

namespace drift::cuda {

constexpr int WARPS = THREADS / 32, BLOCK_OF_HALVES = 32;

struct Scale {
    float by, back;  // 2^e and 2^-e
};

// Brings the float of these bits into [2^13, 2^14), as far as 2^126 can; 1 for 0 and what is not finite.
__device__ __forceinline__ Scale scale_for(unsigned largest) {
    const unsigned exponent = largest >> 23;
    const unsigned by = exponent == 0 || exponent == 255 ? 127 : exponent < 14 ? 253 : 267 - exponent;
    return {__uint_as_float(by << 23), __uint_as_float((254 - by) << 23)};
}

__device__ __forceinline__ unsigned largest_of_warp(float x) { return __reduce_max_sync(0xffffffffu, __float_as_uint(x)); }

// The largest of a block's x ≥ 0: each warp's to shared memory; after a __syncthreads that of all.
__device__ __forceinline__ void put_largest(float x, unsigned* of_warps) {
    const unsigned largest = largest_of_warp(x);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
}
__device__ __forceinline__ unsigned largest_of_block(const unsigned* of_warps) {
    unsigned largest = of_warps[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) largest = std::max(largest, of_warps[w]);
    return largest;
}

struct SplitPair {
    __half2 hi, lo;
    __device__ __forceinline__ SplitPair(float x, float y) : hi(__floats2half2_rn(x, y)) {
        const float2 rounded = __half22float2(hi);
        lo = __floats2half2_rn(x - rounded.x, y - rounded.y);
    }
};

__device__ __forceinline__ unsigned bits_of(__half2 pair) { return *reinterpret_cast<unsigned*>(&pair); }

// Where the high half of a row's column is; its low half is a BLOCK_OF_HALVES further.
__device__ __forceinline__ __half* half_of(float* row, int column) {
    return reinterpret_cast<__half*>(row + column / BLOCK_OF_HALVES * BLOCK_OF_HALVES) + column % BLOCK_OF_HALVES;
}
__device__ __forceinline__ const __half* half_of(const float* row, int column) { return half_of(const_cast<float*>(row), column); }

__device__ __forceinline__ void put_halves(float* row, int column, const float (&x)[4], float scale) {
    const SplitPair first(x[0] * scale, x[1] * scale), last(x[2] * scale, x[3] * scale);
    __half* to = half_of(row, column);
    *reinterpret_cast<uint2*>(to) = {bits_of(first.hi), bits_of(last.hi)};
    *reinterpret_cast<uint2*>(to + BLOCK_OF_HALVES) = {bits_of(first.lo), bits_of(last.lo)};
}

// Rows of floats become halves in place; what undoes a row's scaling goes behind its columns. A warp has a row.
__device__ __forceinline__ void split_rows(float* rows, int count, int ld, int columns) {
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < count; i += WARPS) {
        float *row = rows + i * ld, largest = 0;
        for (int j = lane; j < columns; j += 32) largest = std::fmax(largest, std::fabs(row[j]));
        const Scale scale = scale_for(largest_of_warp(largest));
        for (int j = lane; j < columns; j += 32) {
            const SplitPair x(row[j] * scale.by, 0);
            __syncwarp();  // everyone has read these columns
            half_of(row, j)[0] = __low2half(x.hi), half_of(row, j)[BLOCK_OF_HALVES] = __low2half(x.lo);
        }
        if (lane == 0) row[columns] = scale.back;
    }
}

#ifdef __CUDACC__
// Four matrices of 8×8 halves, row n of matrix m at the address that lane 8·m + n gives: of each, lane l gets the two halves
// (l/4, 2·(l%4)…), or of its transpose.
template <bool TRANSPOSED> __device__ __forceinline__ void load_matrices(unsigned (&to)[4], const __half* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
}

// c[16×8] += a[16×16] · b[16×8] of a warp; b is half of what load_matrices gives, its first or its last two.
__device__ __forceinline__ void mma_halves(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], const unsigned* b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace drift::cuda
