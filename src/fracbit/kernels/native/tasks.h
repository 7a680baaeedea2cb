// How much work makes a task for the threads of pool.h.
#pragma once

#include <algorithm>

#include "layout.h"

namespace fracbit {

// Bytes of weights that a task reads: enough to hide what claiming it and starting a stream from memory cost, and few enough to share
// the work evenly.
constexpr int64_t kMostTaskBytes = 1 << 17;
constexpr int64_t kLeastTaskBytes = 1 << 14;
constexpr int64_t kTasksPerThread = 4;  // at least, where that many are large enough

static inline int64_t tasks_for(int64_t rows, int64_t rows_per_task) { return (rows + rows_per_task - 1) / rows_per_task; }

// Bytes of a task when `bytes` are read in all.
static inline int64_t bytes_per_task(int64_t bytes, int threads) {
    return std::clamp(bytes / (kTasksPerThread * threads), kLeastTaskBytes, kMostTaskBytes);
}

// Rows of `stride` bytes that make a task.
static inline int64_t rows_per_task(int64_t rows, int64_t stride, int threads) {
    stride = std::max<int64_t>(stride, 1);
    return std::clamp<int64_t>(bytes_per_task(rows * stride, threads) / stride, 1, std::max<int64_t>(rows, 1));
}

}  // namespace fracbit
