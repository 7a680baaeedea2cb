// Threads that share out numbered tasks.
//
// Tasks are claimed one by one, the caller claims too: a worker that is late or descheduled costs nothing, because what it
// does not claim the others do. The workers are torch's, where it has an OpenMP library with GNU's interface: two pools on the
// same processors take turns instead of working, since the workers of either spin after a job. Without one, in a forked child,
// where that library's threads are missing, and while other processes want the processors, they belong to a pool of our own,
// spin for some microseconds, since the next layer follows soon, then sleep. A second caller at a time runs its tasks alone.
#pragma once

#include <cstdint>

namespace fracbit {

using Task = void (*)(void* context, int64_t index, int worker);

// Run task(context, i, worker) for i in [0, count) on at most `threads` threads, the caller included; 0 <= worker < threads.
void run_tasks(int threads, int64_t count, Task task, void* context);

// Whether torch's threads were found.
bool on_threads_of_torch();

// The most threads that `run_tasks` ever uses.
constexpr int kMaxThreads = 64;

}  // namespace fracbit
