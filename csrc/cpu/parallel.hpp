// Threads: units of work run on the OpenMP team the process already has (torch's), so that two thread pools never
// compete for the cores; where there is none, on std::threads.
#pragma once
#include <algorithm>
#include <cstdint>

namespace drift {

// Of `threads`, as many as pay for waking them up: one for every 2^18 multiplications or so.
inline int threads_for(int64_t multiplications, int threads) {
    return int(std::min<int64_t>(threads, 1 + (multiplications >> 18)));
}

// Calls body(context, unit) once for each unit in [0, units), at most `units` of them at a time. Returns when all are done.
void run_units(int units, void (*body)(void*, int), void* context);

template <class Body> void parallel(int units, Body body) {
    if (units == 1) return body(0);
    run_units(units, [](void* context, int unit) { (*static_cast<Body*>(context))(unit); }, &body);
}

}  // namespace drift
