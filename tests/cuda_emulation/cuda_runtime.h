// Enough of CUDA to compile csrc/cuda with a C++ compiler and run it on the CPU: a block's threads are fibers, switched where
// they wait for each other. Blocks run one after the other, their threads in a different order each. Shared memory starts
// as NaN, and what is written past its end is an error. Not found: races that the order of the fibers does not bring out.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <tuple>

#include "cuda_fp16.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(bytes)
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 blockIdx, threadIdx, gridDim;

// The runtime's calls: one device, which fails where a block wants more shared memory than it has.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
inline int emulated(const char* variable, int otherwise) { return getenv(variable) ? atoi(getenv(variable)) : otherwise; }
constexpr int MOST_SHARED_BYTES = 232448;  // of compute capability 9.0
inline int shared_bytes_of_device() { return emulated("DRIFT_EMULATED_SHARED_BYTES", 166912); }  // as of compute capability 8.0
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "too much shared memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int shared_bytes) {
    return shared_bytes <= shared_bytes_of_device() ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    *value = which == cudaDevAttrMultiProcessorCount ? emulated("DRIFT_EMULATED_MULTIPROCESSORS", 1) : shared_bytes_of_device();
    return cudaSuccess;
}

namespace drift::cuda {
alignas(16) inline unsigned char shared_memory[MOST_SHARED_BYTES + 1024];
}

namespace emulation {

constexpr int MOST_THREADS = 256, WARP = 32;
constexpr size_t STACK_BYTES = 256 * 1024;

struct Barrier {
    int size = 0, arrived = 0;
    long passed = 0;
};

struct Fiber {
    jmp_buf state;
    bool started, done;
    Barrier* waiting;
    long passed;  // of `waiting`, when the fiber came to it
};

inline Fiber fibers[MOST_THREADS];
inline char* stacks = static_cast<char*>(malloc(MOST_THREADS * STACK_BYTES));
inline ucontext_t scheduler_context, start_context;
inline jmp_buf scheduler;
inline Barrier block_barrier, warp_barriers[MOST_THREADS / WARP];
inline int any_true[2];
inline double exchanged[2][MOST_THREADS];  // by parity of the warp's barrier: the next exchange leaves this one's alone
inline const void* rows[2][MOST_THREADS];
inline float operands[2][MOST_THREADS][12];
inline void (*body)(void*);
inline void* body_arguments;
inline int current;

inline void fail(const char* what) {
    fprintf(stderr, "emulated CUDA: %s\n", what);
    abort();
}

inline void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.passed;
        return;
    }
    Fiber& fiber = fibers[current];
    fiber.waiting = &barrier, fiber.passed = barrier.passed;
    if (!_setjmp(fiber.state)) _longjmp(scheduler, 1);
}
inline Barrier& own_warp() { return warp_barriers[current / WARP]; }

inline void fiber_main() {
    body(body_arguments);
    Fiber& fiber = fibers[current];
    fiber.done = true;
    --block_barrier.size, --own_warp().size;
    for (Barrier* barrier : {&block_barrier, &own_warp()})
        if (barrier->size > 0 && barrier->arrived == barrier->size) fail("a thread ended while others wait for it");
    _longjmp(scheduler, 1);
}

inline void resume(int thread) {
    current = thread;
    threadIdx = dim3(thread);
    Fiber& fiber = fibers[thread];
    fiber.waiting = nullptr;
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    getcontext(&start_context);
    start_context.uc_stack.ss_sp = stacks + thread * STACK_BYTES;
    start_context.uc_stack.ss_size = STACK_BYTES;
    start_context.uc_link = nullptr;
    makecontext(&start_context, fiber_main, 0);
    setcontext(&start_context);
}

inline void run_block(int threads, int stride) {
    block_barrier = Barrier{threads};
    for (int w = 0; w < threads / WARP; ++w) warp_barriers[w] = Barrier{WARP};
    for (int t = 0; t < threads; ++t) fibers[t].started = fibers[t].done = false, fibers[t].waiting = nullptr;
    any_true[0] = any_true[1] = 0;
    for (bool progress = true, left = true; left;) {
        progress = left = false;
        for (int n = 0; n < threads; ++n) {
            const int t = n * stride % threads;
            const Fiber& fiber = fibers[t];
            if (fiber.done) continue;
            left = true;
            if (fiber.waiting && fiber.waiting->passed == fiber.passed) continue;
            resume(t);
            progress = true;
        }
        if (left && !progress) fail("threads wait for each other for ever");
    }
}

// Tensor cores line terms up with the largest, to two bits more than a float has, and cut off what lies below.
inline float sum_of_tensor_core(const double (&terms)[9]) {
    double largest = 0, sum = 0;
    for (double x : terms) largest = std::fmax(largest, std::fabs(x));
    if (!std::isfinite(largest) || largest == 0) {
        for (double x : terms) sum += x;
        return float(sum);
    }
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 25);
    for (double x : terms) sum += std::trunc(x / unit) * unit;
    float rounded = float(sum);
    if (std::fabs(double(rounded)) > std::fabs(sum)) rounded = std::nextafter(rounded, 0.0f);
    return rounded;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block_barrier); }
inline bool __syncthreads_or(bool mine) {
    int& any = emulation::any_true[emulation::block_barrier.passed & 1];
    any |= mine;
    __syncthreads();
    const bool result = any;
    __syncthreads();
    any = 0;
    return result;
}
inline void __syncwarp() { emulation::wait(emulation::own_warp()); }
template <class T> T __shfl_xor_sync(unsigned, T x, int lanes) {
    double* exchanged = emulation::exchanged[emulation::own_warp().passed & 1];
    exchanged[threadIdx.x] = x;
    __syncwarp();
    return T(exchanged[threadIdx.x ^ lanes]);
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
    for (int lanes = 1; lanes < emulation::WARP; lanes *= 2) {
        const unsigned other = __shfl_xor_sync(mask, x, lanes);
        x = x > other ? x : other;
    }
    return x;
}

// What these functions of halves.cuh do on a device.
namespace drift::cuda {
template <bool TRANSPOSED> void load_matrices(unsigned (&to)[4], const __half* row) {
    auto& rows = emulation::rows[emulation::own_warp().passed & 1];
    rows[threadIdx.x] = row;
    __syncwarp();
    const int lane = threadIdx.x % 32, warp = threadIdx.x - lane;
    for (int m = 0; m < 4; ++m) {
        __half found[2];
        for (int e = 0; e < 2; ++e) {
            const int r = TRANSPOSED ? lane % 4 * 2 + e : lane / 4, c = TRANSPOSED ? lane / 4 : lane % 4 * 2 + e;
            const __half* of_row = static_cast<const __half*>(rows[warp + 8 * m + r]);
            if (reinterpret_cast<uintptr_t>(of_row) % 16) emulation::fail("a row of load_matrices is not aligned");
            found[e] = of_row[c];
        }
        memcpy(&to[m], found, 4);
    }
}
inline void mma_halves(float& c0, float& c1, float& c2, float& c3, const unsigned (&a)[4], const unsigned* b) {
    auto& operands = emulation::operands[emulation::own_warp().passed & 1];
    __half halves[12];
    memcpy(halves, a, 16), memcpy(halves + 8, b, 8);
    for (int n = 0; n < 12; ++n) operands[threadIdx.x][n] = __half2float(halves[n]);
    __syncwarp();
    const int lane = threadIdx.x % 32, warp = threadIdx.x - lane;
    float* c[4] = {&c0, &c1, &c2, &c3};
    for (int e = 0; e < 4; ++e) {
        const int row = lane / 4, col = lane % 4 * 2 + e % 2;
        for (int first = 0; first < 2; ++first) {  // eight terms at a time: compute capability 8.0
            double terms[9] = {*c[e]};
            for (int k = 0; k < 8; ++k) {
                const float *of_row = operands[warp + row * 4 + k / 2], *of_col = operands[warp + col * 4 + k / 2];
                terms[1 + k] = double(of_row[first * 4 + e / 2 * 2 + k % 2]) * of_col[8 + first * 2 + k % 2];
            }
            *c[e] = emulation::sum_of_tensor_core(terms);
        }
    }
}
}  // namespace drift::cuda

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    using namespace emulation;
    auto call = [&] { kernel(arguments...); };
    body = [](void* c) { (*static_cast<decltype(call)*>(c))(); };
    body_arguments = &call;
    gridDim = config->gridDim;
    unsigned char *memory = drift::cuda::shared_memory, *end = memory + sizeof drift::cuda::shared_memory;
    if (config->dynamicSmemBytes > size_t(shared_bytes_of_device())) return cudaErrorInvalidValue;
    for (unsigned block = 0; block < config->gridDim.x; ++block) {
        blockIdx = dim3(block);
        memset(memory, 0xff, end - memory);  // NaN
        run_block(int(config->blockDim.x), int(2 * (block % 7) + 1) * 37 % 256 | 1);
        for (unsigned char* past = memory + config->dynamicSmemBytes; past < end; ++past)
            if (*past != 0xff) fail("write past the end of shared memory");
    }
    return cudaSuccess;
}
