#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fracbit {
namespace {

constexpr auto kSpin = std::chrono::microseconds(60);  // a decode step calls the next layer within this time

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    // False when another caller has the pool.
    bool run(int threads, int64_t count, Task task, void* context) {
        std::unique_lock<std::mutex> caller(busy_, std::try_to_lock);
        if (!caller.owns_lock()) return false;
        while (static_cast<int>(workers_.size()) < threads - 1) {
            const int number = static_cast<int>(workers_.size()) + 1;
            workers_.emplace_back([this, number] { serve(number); });
            workers_.back().detach();
        }
        task_ = task;
        context_ = context;
        count_ = count;
        threads_ = threads;
        next_.store(0, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            epoch_.fetch_add(1, std::memory_order_release);  // odd: open
        }
        if (sleepers_.load(std::memory_order_acquire) > 0) wake_.notify_all();
        work(0);
        // Close the job, then wait for the workers that entered it.
        epoch_.fetch_add(1, std::memory_order_seq_cst);
        while (inside_.load(std::memory_order_seq_cst) != 0) pause();
        return true;
    }

  private:
    void work(int worker) {
        for (;;) {
            const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
            if (index >= count_) return;
            task_(context_, index, worker);
        }
    }

    void serve(int number) {
        uint64_t seen = 0;
        for (;;) {
            const uint64_t epoch = wait_for_job(seen);
            // Enter first, then look again: the caller closes the job first, then looks who is inside.
            inside_.fetch_add(1, std::memory_order_seq_cst);
            if (epoch_.load(std::memory_order_seq_cst) == epoch && number < threads_) work(number);
            inside_.fetch_sub(1, std::memory_order_release);
            seen = epoch;
        }
    }

    uint64_t wait_for_job(uint64_t seen) {
        const auto open = [&] {
            const uint64_t epoch = epoch_.load(std::memory_order_acquire);
            return (epoch & 1) != 0 && epoch != seen ? epoch : 0;
        };
        const auto until = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 64; ++i) {
                if (const uint64_t epoch = open()) return epoch;
                pause();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_release);
        uint64_t epoch = 0;
        wake_.wait(lock, [&] { return (epoch = open()) != 0; });
        sleepers_.fetch_sub(1, std::memory_order_release);
        return epoch;
    }

    std::mutex busy_;
    std::mutex sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int> inside_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<int64_t> next_{0};
    // Written while no worker is inside, published by epoch_.
    Task task_ = nullptr;
    void* context_ = nullptr;
    int64_t count_ = 0;
    int threads_ = 1;
};

// Never destroyed: sleeping workers may outlive static destructors. A fork copies no threads, so the child forgets it.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    Pool* current = pool.load(std::memory_order_acquire);
    if (current != nullptr) return *current;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); });
    (void)registered;
#endif
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(current, made, std::memory_order_acq_rel)) return *made;
    delete made;
    return *current;
}

}  // namespace

void run_tasks(int threads, int64_t count, Task task, void* context) {
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads > count) threads = static_cast<int>(count);
    if (threads > 1 && the_pool().run(threads, count, task, context)) return;
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
}

}  // namespace fracbit
