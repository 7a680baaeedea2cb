// Stages: tasks in parts that follow one another, which the same threads work through as one job of pool.h.
//
// Between two stages one thread does what only one can do: the one that finished the last task. There is no barrier that all threads
// must reach: a stage is over when its tasks are done, so a thread that was set aside keeps nobody waiting, unless it holds a task.
// A worker has a share of neighbouring tasks, so that it reads one stream of memory, and takes over those of others at the end. Whoever
// finds no task asks for memory that the next stage will read, spins for some microseconds, then sleeps.
#pragma once

#include <cstdint>

namespace fracbit {

class Stages {
  public:
    virtual ~Stages() = default;
    // Called by one thread at a time: does what comes before the next stage; returns its number of tasks, 0 at the end.
    virtual int64_t next() = 0;
    virtual void task(int64_t index, int worker) = 0;
    // Asks for the `part`-th piece of what a worker will read first in stage `stage`, counted from 0. Returns whether there was one.
    virtual bool ask_ahead(int64_t stage, int worker, int64_t part) const = 0;
};

void run_stages(int threads, Stages& stages);

}  // namespace fracbit
