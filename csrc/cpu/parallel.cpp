#include "parallel.hpp"

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

namespace drift {
namespace {

struct Team {
    int units;
    void (*body)(void*, int);
    void* context;
    std::atomic<int> next{0};
};

// Units are taken from a counter, so that a team smaller than asked for (nested regions, limits) still does them all.
void work(void* team_pointer) {
    Team& team = *static_cast<Team*>(team_pointer);
    for (int unit; (unit = team.next.fetch_add(1)) < team.units;) team.body(team.context, unit);
}

}  // namespace

void run_units(int units, void (*body)(void*, int), void* context) {
    Team team{units, body, context};
    using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);  // entry point of an OpenMP parallel region
    static const auto openmp = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (openmp) return openmp(work, &team, units, 0);
    std::vector<std::thread> others;
    for (int i = 1; i < units; ++i) others.emplace_back(work, &team);
    work(&team);
    for (auto& thread : others) thread.join();
}

}  // namespace drift
