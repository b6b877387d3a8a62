// One SIMD vector type per scalar type, written in the compiler's vector extensions so that the same source serves
// every instruction set: the width is what DRIFT_VECTOR_BYTES says, the instructions are what the flags allow.
#pragma once
#include <cstdint>
#include <limits>
#include <utility>

namespace drift::DRIFT_ISA {

#define DRIFT_INLINE inline __attribute__((always_inline))

template <class T> struct Simd;
template <> struct Simd<float> {
    typedef float vec __attribute__((vector_size(DRIFT_VECTOR_BYTES)));
    typedef int32_t ivec __attribute__((vector_size(DRIFT_VECTOR_BYTES)));
    typedef uint32_t uvec __attribute__((vector_size(DRIFT_VECTOR_BYTES)));
    typedef float unaligned __attribute__((vector_size(DRIFT_VECTOR_BYTES), aligned(4), may_alias));
};
template <> struct Simd<double> {
    typedef double vec __attribute__((vector_size(DRIFT_VECTOR_BYTES)));
    typedef int64_t ivec __attribute__((vector_size(DRIFT_VECTOR_BYTES)));
    typedef uint64_t uvec __attribute__((vector_size(DRIFT_VECTOR_BYTES)));
    typedef double unaligned __attribute__((vector_size(DRIFT_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T> using Vec = typename Simd<T>::vec;
template <class T> constexpr int WIDTH = DRIFT_VECTOR_BYTES / sizeof(T);

template <class T> DRIFT_INLINE Vec<T> load(const T* p) { return *reinterpret_cast<const typename Simd<T>::unaligned*>(p); }
template <class T> DRIFT_INLINE void store(T* p, Vec<T> v) { *reinterpret_cast<typename Simd<T>::unaligned*>(p) = v; }
template <class T> DRIFT_INLINE Vec<T> load_up_to(const T* p, int64_t count) {  // zeros past `count`
    if (count >= WIDTH<T>) return load<T>(p);
    Vec<T> v{};
    for (int l = 0; l < count; ++l) v[l] = p[l];
    return v;
}
template <class T> DRIFT_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }

// a where a > b, else b: a NaN in `a` is dropped, a NaN in `b` kept.
template <class T> DRIFT_INLINE Vec<T> greater(Vec<T> a, Vec<T> b) { return a > b ? a : b; }

// NaN stays NaN.
template <class T> DRIFT_INLINE Vec<T> at_least(Vec<T> v, T least) { return v < least ? splat<T>(least) : v; }

// The lanes of v, `by` further on.
template <int BY, class V, int... LANE> DRIFT_INLINE V rotated(V v, std::integer_sequence<int, LANE...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(v, v, ((LANE + BY) % int(sizeof...(LANE)))...);
#else
    return V{v[(LANE + BY) % int(sizeof...(LANE))]...};
#endif
}

// What `combine` makes of all lanes, or of those PERIOD apart, in every lane: a tree of log2(LANES) steps.
template <int LANES, int BY = LANES / 2, int PERIOD = 1, class V, class Combine> DRIFT_INLINE V folded(V v, Combine combine) {
    if constexpr (BY < PERIOD)
        return v;
    else
        return folded<LANES, BY / 2, PERIOD>(combine(v, rotated<BY>(v, std::make_integer_sequence<int, LANES>())), combine);
}

template <class T> DRIFT_INLINE bool any(typename Simd<T>::ivec mask) {
    return folded<WIDTH<T>>(mask, [](auto a, auto b) { return a | b; })[0] != 0;
}
template <class T> DRIFT_INLINE T horizontal_sum(Vec<T> v) {
    return folded<WIDTH<T>>(v, [](auto a, auto b) { return a + b; })[0];
}
template <class T> DRIFT_INLINE T horizontal_max(Vec<T> v) {
    return folded<WIDTH<T>>(v, [](auto a, auto b) { return a > b ? a : b; })[0];
}

// {a0, b0, a1, b1, …} of the lower (first = 0) or upper (first = WIDTH/2) halves of a and b.
template <class T, int FIRST, int... LANE>
DRIFT_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (LANE % 2 * WIDTH<T> + LANE / 2 + FIRST)...);
#else
    return Vec<T>{(LANE % 2 ? b : a)[LANE / 2 + FIRST]...};
#endif
}

// out[n] = the sum of the lanes of v[n], or its first lane: each step makes one vector, of alternating lanes, of two.
template <class T, int COUNT> DRIFT_INLINE void fold_lanes(Vec<T> (&v)[COUNT], bool first_lane, T* out) {
    if (first_lane) {
        for (int n = 0; n < COUNT; ++n) out[n] = v[n][0];
    } else if constexpr (COUNT > WIDTH<T>) {
        for (int n = 0; n < COUNT; ++n) out[n] = horizontal_sum<T>(v[n]);
    } else {
        constexpr auto lanes = std::make_integer_sequence<int, WIDTH<T>>();
        for (int half = COUNT / 2; half > 0; half /= 2)
            for (int n = 0; n < half; ++n)
                v[n] = interleave<T, 0>(v[n], v[n + half], lanes) + interleave<T, WIDTH<T> / 2>(v[n], v[n + half], lanes);
        const Vec<T> sums = folded<WIDTH<T>, WIDTH<T> / 2, COUNT>(v[0], [](auto a, auto b) { return a + b; });
        for (int n = 0; n < COUNT; ++n) out[n] = sums[n];
    }
}

// Transposes a square of WIDTH vectors: after log2(WIDTH) perfect shuffles of the rows, row i holds column i.
template <class T> DRIFT_INLINE void transpose(Vec<T> (&square)[WIDTH<T>]) {
    constexpr int HALF = WIDTH<T> / 2;
    constexpr auto lanes = std::make_integer_sequence<int, WIDTH<T>>();
    for (int stage = 1; stage < WIDTH<T>; stage *= 2) {
        Vec<T> shuffled[WIDTH<T>];
        for (int i = 0; i < HALF; ++i) {
            shuffled[2 * i] = interleave<T, 0>(square[i], square[i + HALF], lanes);
            shuffled[2 * i + 1] = interleave<T, HALF>(square[i], square[i + HALF], lanes);
        }
        for (int i = 0; i < WIDTH<T>; ++i) square[i] = shuffled[i];
    }
}

// exp(x) for x <= 0 (in fact up to 127.5·ln(2), or 1023.5·ln(2)): range reduction to |r| <= ln(2)/2, a polynomial, 2^n by exponent bits. About 1 ulp; results that
// would be subnormal are 0; NaN stays NaN (the comparison is false for it).
DRIFT_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
    const Vec<float> shifted = x * 1.44269504f + 12582912.0f;  // 1.5·2^23: the low mantissa bits now hold round(x/ln 2)
    const Vec<float> n = shifted - 12582912.0f;
    const Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes expf
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    typedef Simd<float>::uvec uvec;  // unsigned, because it overflows where x < -87, and the result is 0 anyway
    const Vec<float> power = (Vec<float>)(((uvec)shifted << 23) + 0x3f800000u);
    return x < -87.0f ? Vec<float>{} : p * power;
}
DRIFT_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
    const Vec<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5·2^52
    const Vec<double> n = shifted - 6755399441055744.0;
    const Vec<double> r = x - n * 6.93145751953125e-1 - n * 1.42860682030941723212e-6;
    Vec<double> p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;  // Taylor to r^13/13!: |r| <= 0.35 leaves 4e-18
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    typedef Simd<double>::uvec uvec;
    const Vec<double> power = (Vec<double>)(((uvec)shifted << 52) + 0x3ff0000000000000u);
    return x < -708.0 ? Vec<double>{} : p * power;
}

// exp(x) for any x; what comes near the largest number is infinite.
template <class T> DRIFT_INLINE Vec<T> exponential(Vec<T> x) {
    const Vec<T> value = exp_nonpositive(x);
    return x > T(sizeof(T) == 4 ? 88.3 : 709.3) ? splat<T>(std::numeric_limits<T>::infinity()) : value;
}

template <class T> DRIFT_INLINE Vec<T> square_root(Vec<T> v) {
    Vec<T> root;
    for (int l = 0; l < WIDTH<T>; ++l) root[l] = sizeof(T) == 4 ? __builtin_sqrtf(v[l]) : __builtin_sqrt(v[l]);
    return root;
}

}  // namespace drift::DRIFT_ISA
