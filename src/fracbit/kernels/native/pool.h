// A small pool of worker threads that share out numbered tasks.
//
// Tasks are claimed one by one, the caller claims too: a worker that is late or descheduled costs nothing, because what it
// does not claim the others do. Workers spin for some microseconds after a job, since the next layer follows soon, then sleep.
// A forked child starts a pool of its own. A second caller finds the pool taken and runs its tasks alone.
#pragma once

#include <cstdint>

namespace fracbit {

using Task = void (*)(void* context, int64_t index, int worker);

// Run task(context, i, worker) for i in [0, count) on at most `threads` threads, the caller included; 0 <= worker < threads.
void run_tasks(int threads, int64_t count, Task task, void* context);

// The most threads that `run_tasks` ever uses.
constexpr int kMaxThreads = 64;

}  // namespace fracbit
