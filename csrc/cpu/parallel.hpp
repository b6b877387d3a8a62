// Threads: units of work run on the OpenMP team the process already has (torch's), so that two thread pools never
// compete for the cores; where there is none, on std::threads.
#pragma once

namespace drift {

// Calls body(context, unit) once for each unit in [0, units), at most `units` of them at a time. Returns when all are done.
void run_units(int units, void (*body)(void*, int), void* context);

template <class Body> void parallel(int units, Body body) {
    if (units == 1) return body(0);
    run_units(units, [](void* context, int unit) { (*static_cast<Body*>(context))(unit); }, &body);
}

}  // namespace drift
