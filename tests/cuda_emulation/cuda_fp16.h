// Half precision of CUDA for a C++ compiler, see cuda_runtime.h.
#pragma once
#include <cmath>
#include <cstdint>

struct float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct __half {
    uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};

inline __half __float2half_rn(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double size = std::fabs(double(x));
    if (std::isnan(x)) return {0x7fff};
    if (size >= 65520) return {uint16_t(sign | 0x7c00)};
    const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
    return {uint16_t(sign | (((exponent + 14) << 10) + int(std::nearbyint(std::ldexp(size, 10 - exponent)))))};
}
inline float __half2float(__half h) {
    const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
    float size = mantissa * 0x1p-24f;
    if (exponent == 31) size = mantissa ? NAN : INFINITY;
    else if (exponent) size = (1024 + mantissa) * float(1 << exponent) * 0x1p-25f;
    return h.bits & 0x8000 ? -size : size;
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half __low2half(__half2 pair) { return pair.x; }
