// The threads of stages.h: who takes which task, who goes on to the next stage, and how the others wait.
#include "stages.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "pool.h"
#include "product.h"

namespace fracbit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSpin = std::chrono::microseconds(50);  // most stages of a small model are shorter
constexpr int kLooks = 32;                              // between two looks at the clock

// The tasks of a share that nobody has taken: the stage, the end and the next one in one word, so that who comes late cannot take a task
// of a stage that is over. A million tasks of 16 KB are more than any layer has.
constexpr int kIndexBits = 20;
constexpr uint64_t kIndexMask = (uint64_t{1} << kIndexBits) - 1;

struct alignas(kCacheLine) Share {
    std::atomic<uint64_t> word{0};

    void open(uint64_t stage, int64_t begin, int64_t end) {
        word.store(stage << (2 * kIndexBits) | static_cast<uint64_t>(end) << kIndexBits | static_cast<uint64_t>(begin), std::memory_order_release);
    }
    // A task, or -1.
    int64_t take() {
        if (left(word.load(std::memory_order_relaxed)) <= 0) return -1;
        const uint64_t taken = word.fetch_add(1, std::memory_order_acq_rel);
        return left(taken) > 0 ? static_cast<int64_t>(taken & kIndexMask) : -1;
    }
    static int64_t left(uint64_t word) {
        return static_cast<int64_t>(word >> kIndexBits & kIndexMask) - static_cast<int64_t>(word & kIndexMask);
    }
};

class Crew {
  public:
    Crew(int threads, Stages& stages) : threads_(threads), stages_(stages) { go_on(); }

    void work(int worker) {
        while (!over_.load(std::memory_order_acquire)) {
            const uint64_t stage = stage_.load(std::memory_order_acquire);
            bool found = false;
            for (int i = 0; i < threads_; ++i) found = work_off(shares_[(worker + i) % threads_], worker) || found;
            if (!found) wait(stage, worker);
        }
    }

  private:
    bool work_off(Share& share, int worker) {
        bool found = false;
        for (int64_t index; (index = share.take()) >= 0; found = true) {
            stages_.task(index, worker);
            if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) go_on();
        }
        return found;
    }

    // To the next stage; no other thread has a task now.
    void go_on() {
        const int64_t count = stages_.next();
        left_.store(count, std::memory_order_relaxed);
        const uint64_t stage = stage_.load(std::memory_order_relaxed) + 1;
        for (int i = 0; i < threads_; ++i) shares_[i].open(stage, share_begin(count, threads_, i), share_begin(count, threads_, i + 1));
        if (count == 0) over_.store(true, std::memory_order_release);
        stage_.store(stage, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
        const std::lock_guard<std::mutex> lock(sleep_);
        wake_.notify_all();
    }

    // Until the stage after `stage`, which is the next one of stages_ too: stages are counted from 1 here.
    void wait(uint64_t stage, int worker) {
        const auto gone = [&] { return stage_.load(std::memory_order_seq_cst) != stage; };
        for (int64_t part = 0; stages_.ask_ahead(static_cast<int64_t>(stage), worker, part); ++part)
            if (gone()) return;
        const auto until = Clock::now() + kSpin;
        do {
            for (int i = 0; i < kLooks; ++i) {
                if (gone()) return;
                pause_thread();
            }
        } while (Clock::now() < until);
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, gone);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }

    const int threads_;
    Stages& stages_;
    Share shares_[kMaxThreads];
    alignas(kCacheLine) std::atomic<int64_t> left_{0};
    alignas(kCacheLine) std::atomic<uint64_t> stage_{0};
    std::atomic<bool> over_{false};
    std::atomic<int> sleepers_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
};

}  // namespace

void run_stages(int threads, Stages& stages) {
    threads = std::clamp(threads, 1, kMaxThreads);
    if (threads == 1) {
        for (int64_t count; (count = stages.next()) > 0;)
            for (int64_t index = 0; index < count; ++index) stages.task(index, 0);
        return;
    }
    Crew crew(threads, stages);
    run_tasks(threads, threads, [](void* all, int64_t worker, int) { static_cast<Crew*>(all)->work(static_cast<int>(worker)); }, &crew);
}

}  // namespace fracbit
