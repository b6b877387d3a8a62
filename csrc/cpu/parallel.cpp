#include "parallel.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace drift {
namespace {

constexpr int GLANCES = 2000;  // some 50 µs, for which a waiting thread looks before it sleeps

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// Threads that work on one job at a time, made when first wanted. They outlive every job, and end with the process.
class Pool {
    std::mutex in_use, state;
    std::condition_variable job_is_there, job_is_done;
    int helpers = 0;

    // The job. All but `next` and the two that are glanced at change under `state` only.
    void (*body)(void*, int64_t, int) = nullptr;
    void* context = nullptr;
    int64_t units = 0;
    std::atomic<int64_t> next{0};
    int places = 0;  // for helpers that may still join
    int joined = 0;
    std::atomic<int> busy{0};
    std::atomic<unsigned> jobs{0};

    void work(int worker) {
        const SubnormalsAreZero here;
        for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) body(context, unit, worker);
    }

    void help() {
        std::unique_lock lock(state);
        for (unsigned seen = 0;;) {
            if (places == 0 || seen == jobs) {
                seen = jobs;
                lock.unlock();
                for (int n = 0; n < GLANCES && jobs.load(std::memory_order_relaxed) == seen; ++n) pause();
                lock.lock();
                job_is_there.wait(lock, [&] { return places > 0 && seen != jobs; });
            }
            seen = jobs, --places, ++busy;
            const int worker = ++joined;
            lock.unlock();
            work(worker);
            lock.lock();
            if (--busy == 0) job_is_done.notify_one();
        }
    }

    void add_helpers(int wanted) {
        try {
            for (; helpers < wanted; ++helpers) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
        }
    }

  public:
    // Whether the job was done: not while another thread has one here.
    bool run(int64_t count, int threads, void (*what)(void*, int64_t, int), void* with) {
        const std::unique_lock only_job(in_use, std::try_to_lock);
        if (!only_job) return false;
        const int wanted = int(std::min<int64_t>(threads, count)) - 1;
        {
            const std::lock_guard lock(state);
            add_helpers(wanted);
            body = what, context = with, units = count, next = 0;
            places = std::min(wanted, helpers), joined = 0;
            ++jobs;
        }
        wanted == 1 ? job_is_there.notify_one() : job_is_there.notify_all();
        work(0);
        std::unique_lock lock(state);
        places = 0;  // whoever has not begun need not
        if (busy > 0) {
            lock.unlock();
            for (int n = 0; n < GLANCES && busy.load(std::memory_order_relaxed) > 0; ++n) pause();
            lock.lock();
            job_is_done.wait(lock, [&] { return busy == 0; });
        }
        return true;
    }
};

// After a fork the child has none of the threads, and starts anew; what the parent's threads held then is left alone.
Pool* pool = nullptr;
std::mutex* making_pool = new std::mutex;

Pool& the_pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = nullptr, making_pool = new std::mutex; });
    (void)registered;
    const std::lock_guard lock(*making_pool);
    if (!pool) pool = new Pool;
    return *pool;
}

}  // namespace

void run_units(int64_t units, int threads, void (*body)(void*, int64_t, int), void* context) {
    if (the_pool().run(units, threads, body, context)) return;
    const SubnormalsAreZero here;
    for (int64_t unit = 0; unit < units; ++unit) body(context, unit, 0);
}

}  // namespace drift
