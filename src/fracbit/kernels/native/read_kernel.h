// Reading bytes and nothing else: the speed that a product can reach at best, for `fracbit bench` and bench/kernels.
#pragma once

#include <cstring>

#include "layout.h"

namespace fracbit {
namespace {

constexpr int64_t kReadWords = 32;  // 64-bit sums side by side: enough to hide the latency of each

// The xor of all of them, so that no compiler leaves the reading out.
inline uint64_t read_bytes(const uint8_t* data, int64_t count) {
    uint64_t part[kReadWords] = {};
    int64_t i = 0;
    for (; i + 8 * kReadWords <= count; i += 8 * kReadWords)
        for (int64_t j = 0; j < kReadWords; ++j) {
            uint64_t word;
            std::memcpy(&word, data + i + 8 * j, 8);
            part[j] ^= word;
        }
    uint64_t sum = 0;
    for (; i < count; ++i) sum ^= data[i];
    for (const uint64_t word : part) sum ^= word;
    return sum;
}

}  // namespace
}  // namespace fracbit
