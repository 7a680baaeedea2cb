// Reads bytes in tasks: what a product would take if its arithmetic took no time.
#include "read.h"

#include <algorithm>
#include <atomic>

#include "pool.h"
#include "tasks.h"

namespace fracbit {
namespace {

struct Call {
    const Isa& isa;
    const uint8_t* data;
    int64_t count;
    std::atomic<uint64_t> sum{0};
};

void read_task(void* context, int64_t index, int) {
    auto& call = *static_cast<Call*>(context);
    const int64_t first = index * kMostTaskBytes;
    const uint64_t sum = call.isa.read(call.data + first, std::min(kMostTaskBytes, call.count - first));
    call.sum.fetch_xor(sum, std::memory_order_relaxed);
}

}  // namespace

uint64_t read(const Isa& isa, const uint8_t* data, int64_t count, int threads) {
    Call call{isa, data, count};
    run_tasks(std::clamp(threads, 1, kMaxThreads), tasks_for(count, kMostTaskBytes), read_task, &call);
    return call.sum.load();
}

}  // namespace fracbit
