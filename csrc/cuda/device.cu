// Whether there is a device at all.
#include "launch.cuh"

namespace drift::cuda {

const char* device_error() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    cudaGetLastError();  // clears it
    return error != cudaSuccess ? cudaGetErrorString(error) : count == 0 ? "there is none" : nullptr;
}

}  // namespace drift::cuda
