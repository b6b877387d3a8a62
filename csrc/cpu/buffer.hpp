// Aligned scratch memory, allocated before threads start so that running out of it can be reported.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace drift {

template <class T> class Buffer {
    T* data;

  public:
    explicit Buffer(int64_t count) : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
        if (!data) throw std::bad_alloc();
    }
    Buffer(Buffer&& other) noexcept : data(other.data) { other.data = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data); }
    operator T*() const { return data; }
};

}  // namespace drift
