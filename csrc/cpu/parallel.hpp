// Threads: units of work, each taken by whoever is free. Threads that wait sleep, so that a core which another process
// holds costs its share and no more, and nobody waits for a thread that has not begun.
#pragma once
#include <algorithm>
#include <cstdint>

namespace drift {

// While it lives, this thread's results that would be subnormal are 0. Affinities far from 1 make many of them, nothing
// depends on their digits, and each would hold up some processors for a hundred cycles and more.
class SubnormalsAreZero {
#if defined(__SSE2__)
    const unsigned before = __builtin_ia32_stmxcsr();

  public:
    SubnormalsAreZero() { __builtin_ia32_ldmxcsr(before | 0x8000); }
    ~SubnormalsAreZero() { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__)
    const unsigned before = __builtin_aarch64_get_fpcr();

  public:
    SubnormalsAreZero() { __builtin_aarch64_set_fpcr(before | 1u << 24); }
    ~SubnormalsAreZero() { __builtin_aarch64_set_fpcr(before); }
#else
  public:
    SubnormalsAreZero() {}
    ~SubnormalsAreZero() {}
#endif
    SubnormalsAreZero(const SubnormalsAreZero&) = delete;
};

// Of `threads`, as many as pay for waking them up: one for every 2^18 multiplications or so.
inline int threads_for(int64_t multiplications, int threads) {
    return int(std::min<int64_t>(threads, 1 + (multiplications >> 18)));
}

// Calls body(context, unit, worker) once for each unit in [0, units), on at most `threads` threads, of which this is one;
// no two calls at a time have the same worker, a number below `threads`. Returns when all are done.
void run_units(int64_t units, int threads, void (*body)(void*, int64_t unit, int worker), void* context);

template <class Body> void parallel(int64_t units, int threads, Body body) {
    if (threads > 1 && units > 1)
        return run_units(units, threads, [](void* context, int64_t unit, int worker) { (*static_cast<Body*>(context))(unit, worker); }, &body);
    const SubnormalsAreZero here;
    for (int64_t unit = 0; unit < units; ++unit) body(unit, 0);
}

}  // namespace drift
