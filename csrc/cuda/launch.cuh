// Launching kernels on a device and a stream, every call checked.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.hpp"

namespace drift::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("drift_ops._cuda: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current for the lifetime of the object.
class OnDevice {
    int previous = 0;

  public:
    explicit OnDevice(Device device) {
        check(cudaGetDevice(&previous), "cudaGetDevice");
        if (device.index != previous) check(cudaSetDevice(device.index), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(previous); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
};

inline int attribute(cudaDeviceAttr which, Device device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device.index), "cudaDeviceGetAttribute");
    return value;
}

// Blocks that fill the device twice: what a launch is cut into where the problem is too small to fill it by itself.
inline int64_t enough_blocks(Device device) { return 2 * attribute(cudaDevAttrMultiProcessorCount, device); }

// Whether a block may have so much shared memory. The least of compute capability 8.0 and later is 101,376 bytes (8.6, 8.9, 12.0);
// what may want more asks here first, and has another way.
inline bool fits(size_t shared_bytes, Device device) {
    return shared_bytes <= size_t(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out scratch memory piece by piece; where there is none it only counts.
struct Scratch {
    double* memory;
    int64_t doubles = 0;
    template <class T> T* take(int64_t count) {
        double* piece = memory ? memory + doubles : nullptr;
        doubles += ceil_div(count * int64_t(sizeof(T)), 16) * 2;
        return reinterpret_cast<T*>(piece);
    }
};

constexpr int THREADS = 256;  // of every block

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Device device, int64_t blocks, size_t shared_bytes, Arguments... arguments) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error(std::string("drift_ops._cuda: ") + name + ": too many blocks");
    if (shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(device.stream);
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
    check(cudaGetLastError(), name);
}

}  // namespace drift::cuda
