// Threads that share numbered tasks.
//
// Tasks are claimed one by one, and the caller claims too: a thread that is late costs nothing, since the others do its tasks. A
// second caller at the same time runs its tasks alone.
//
// The threads are those of torch, where it has an OpenMP library with GNU's interface: threads of both kinds spin after a job, so two
// pools on the same processors would take turns instead of working. A pool of our own works without such a library, in a forked child
// (which has none of that library's threads), while other processes keep torch's threads waiting, and when a user turns torch's off.
// Its threads spin for some microseconds, since the next layer follows soon, then sleep.
#pragma once

#include <cstdint>

namespace fracbit {

using Task = void (*)(void* context, int64_t index, int worker);

// Run task(context, i, worker) for i in [0, count) on at most `threads` threads, the caller included; 0 <= worker < threads.
void run_tasks(int threads, int64_t count, Task task, void* context);

// Whether the threads of torch may be used; they are unless this says no.
void allow_threads_of_torch(bool allowed);

// Whether they are: allowed and found.
bool on_threads_of_torch();

// Tells the processor that this thread only waits for another.
inline void pause_thread() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The most threads that `run_tasks` ever uses.
constexpr int kMaxThreads = 64;

}  // namespace fracbit
