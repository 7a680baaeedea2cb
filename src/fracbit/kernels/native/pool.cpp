// Threads of torch, threads of our own, and the choice between them: pool.h says why there are both.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fracbit {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSpin = std::chrono::microseconds(60);  // a decode step calls the next layer within this time
constexpr int kSpinsPerLook = 64;                       // at the clock, which takes longer than a look for a job
constexpr auto kLate = std::chrono::microseconds(500);  // more than a short job takes: a thread had to wait for another process
constexpr auto kRest = std::chrono::milliseconds(100);  // how long torch's threads are then left alone; measured in docs/LOG.md

// --- threads of torch --------------------------------------------------------------------------------------------------

// OpenMP as GCC calls it: `body(data)` on that many threads, the caller's among them; 0 is the number that the caller has set.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// The function that torch's parallel loops call, or null.
Parallel parallel_of_torch() {
#if defined(__linux__)
    static const Parallel found = [] {
        void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        void* own = torch == nullptr ? nullptr : dlsym(torch, "GOMP_parallel");
        void* preloaded = own == nullptr ? nullptr : dlsym(RTLD_DEFAULT, "GOMP_parallel");
        return reinterpret_cast<Parallel>(preloaded != nullptr ? preloaded : own);
    }();
    return found;
#else
    return nullptr;
#endif
}

struct TorchJob {
    int threads;
    int64_t count;
    Task task;
    void* context;
    std::thread::id caller = std::this_thread::get_id();
    Clock::duration work = Clock::duration::max();  // of the caller, when it was among those that work
    std::atomic<int> workers{0};
    std::atomic<int64_t> next{0};
};

void work_for_torch(void* data) {
    auto& job = *static_cast<TorchJob*>(data);
    const auto begin = Clock::now();
    const int worker = job.workers.fetch_add(1, std::memory_order_relaxed);
    if (worker >= job.threads) return;
    for (int64_t index; (index = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.task(job.context, index, worker);
    if (std::this_thread::get_id() == job.caller) job.work = Clock::now() - begin;
}

// Runs tasks on as many threads as torch's own loops take, since OpenMP ends and starts threads whenever that number changes; at most
// `threads` of them work. Returns whether the caller, its own tasks done, had to wait for a thread that was set aside.
bool run_on_torch(Parallel parallel, int threads, int64_t count, Task task, void* context) {
    TorchJob job{threads, count, task, context};
    const auto begin = Clock::now();
    parallel(work_for_torch, &job, 0, 0);
    const auto whole = Clock::now() - begin;
    return whole > job.work && whole - job.work > std::max<Clock::duration>(kLate, job.work);
}

// --- threads of our own ------------------------------------------------------------------------------------------------

// One job at a time, which is open while `epoch_` is odd. Threads are started when a job first needs them.
class Pool {
  public:
    void run(int threads, int64_t count, Task task, void* context) {
        while (static_cast<int>(workers_.size()) < threads - 1) start_worker();
        task_ = task;
        context_ = context;
        count_ = count;
        threads_ = threads;
        next_.store(0, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            epoch_.fetch_add(1, std::memory_order_release);
        }
        if (sleepers_.load(std::memory_order_acquire) > 0) wake_.notify_all();
        work(0);
        // Close the job, then wait for the workers that entered it.
        epoch_.fetch_add(1, std::memory_order_seq_cst);
        while (inside_.load(std::memory_order_seq_cst) != 0) pause_thread();
    }

  private:
    void start_worker() {
        const int number = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, number] { serve(number); });
        workers_.back().detach();
    }

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

    // Returns the epoch of the next job after `seen`.
    uint64_t wait_for_job(uint64_t seen) {
        const auto open = [&] {
            const uint64_t epoch = epoch_.load(std::memory_order_acquire);
            return (epoch & 1) != 0 && epoch != seen ? epoch : 0;
        };
        const auto until = Clock::now() + kSpin;
        do {
            for (int i = 0; i < kSpinsPerLook; ++i) {
                if (const uint64_t epoch = open()) return epoch;
                pause_thread();
            }
        } while (Clock::now() < until);
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_release);
        uint64_t epoch = 0;
        wake_.wait(lock, [&] { return (epoch = open()) != 0; });
        sleepers_.fetch_sub(1, std::memory_order_release);
        return epoch;
    }

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

// --- which of them -----------------------------------------------------------------------------------------------------

std::atomic<bool> forked{false};
std::atomic<bool> torch_allowed{true};

// Whoever may use more than one thread now, and whose they are. Threads of OpenMP wait for each other after a job: on a busy machine
// one that is set aside keeps all of them for a time slice. Then they rest, and our pool works, which waits only for threads that have a task.
// Never destroyed: sleeping threads may outlive static destructors. A fork copies no threads, so the child forgets them.
struct Threads {
    std::mutex busy;
    Parallel parallel = forked ? nullptr : parallel_of_torch();
    Clock::time_point rested{};
    std::unique_ptr<Pool> pool;

    void run(int threads, int64_t count, Task task, void* context) {
        if (parallel != nullptr && torch_allowed && Clock::now() >= rested) {
            if (run_on_torch(parallel, threads, count, task, context)) rested = Clock::now() + kRest;
            return;
        }
        if (pool == nullptr) pool = std::make_unique<Pool>();
        pool->run(static_cast<int>(std::min<int64_t>(threads, count)), count, task, context);
    }
};
std::atomic<Threads*> current{nullptr};

#if defined(__unix__) || defined(__APPLE__)
// Registered when the library is loaded: torch may have threads before a fork while we have none.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
    forked = true;
    current.store(nullptr, std::memory_order_release);
});
#endif

Threads& the_threads() {
    Threads* found = current.load(std::memory_order_acquire);
    if (found != nullptr) return *found;
    auto* made = new Threads;
    if (!current.compare_exchange_strong(found, made, std::memory_order_acq_rel)) {
        delete made;
        return *found;
    }
    return *made;
}

}  // namespace

void allow_threads_of_torch(bool allowed) { torch_allowed = allowed; }

bool on_threads_of_torch() { return torch_allowed && the_threads().parallel != nullptr; }

void run_tasks(int threads, int64_t count, Task task, void* context) {
    threads = std::min(threads, kMaxThreads);
    if (threads > 1 && count > 1) {
        Threads& all = the_threads();
        const std::unique_lock<std::mutex> caller(all.busy, std::try_to_lock);
        if (caller.owns_lock()) return all.run(threads, count, task, context);
    }
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
}

}  // namespace fracbit
