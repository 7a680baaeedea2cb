// Runs the operations of a decode step as stages: one thread does what is small, all of them share products and attention.
#include "step.h"

#include <algorithm>

#include "operations.h"
#include "pool.h"
#include "stages.h"

namespace fracbit {
namespace {

constexpr int64_t kPiece = 16 * kCacheLine;         // bytes asked for between two looks
constexpr int64_t kMostAsked = int64_t{96} << 10;  // bytes: a part of the second-level cache

using Operations = std::vector<std::unique_ptr<const Operation>>;

class StepStages : public Stages {
  public:
    StepStages(const Operations& operations, const std::vector<Upcoming>& reads, Run& run) : operations_(operations), reads_(reads), run_(run) {}

    int64_t next() override {
        while (++at_ < static_cast<int64_t>(operations_.size())) {
            run_.scratch.reset();
            if (const int64_t tasks = current().begin(run_)) return tasks;
        }
        return 0;
    }

    void task(int64_t index, int worker) override { current().task(run_, index, worker); }

    bool ask_ahead(int64_t stage, int worker, int64_t part) const override {
        const int64_t index = stage * run_.threads + worker;
        if (index >= static_cast<int64_t>(reads_.size())) return false;
        const Upcoming& read = reads_[static_cast<size_t>(index)];
        const int64_t begin = part * kPiece, end = std::min({begin + kPiece, read.bytes, kMostAsked});
        for (int64_t i = begin; i < end; i += kCacheLine) FRACBIT_PREFETCH(read.data + i, 2);
        return begin < end;
    }

  private:
    const Operation& current() const { return *operations_[static_cast<size_t>(at_)]; }

    const Operations& operations_;
    const std::vector<Upcoming>& reads_;
    Run& run_;
    int64_t at_ = -1;
};

}  // namespace

Program::Program(const Isa& isa, bool int8, int64_t vocabulary) : run_(std::make_unique<Run>(isa, int8)) { add_register(vocabulary); }
Program::~Program() = default;

int64_t Program::add_register(int64_t width) {
    run_->widths.push_back(width);
    return registers() - 1;
}

int64_t Program::width(int64_t reg) const { return run_->widths[static_cast<size_t>(reg)]; }
int64_t Program::registers() const { return static_cast<int64_t>(run_->widths.size()); }
void Program::add(std::unique_ptr<const Operation> operation) {
    operations_.push_back(std::move(operation));
    planned_ = 0;
}

void Program::plan_reads(int threads) {
    first_reads_.clear();
    for (const auto& operation : operations_) {
        const auto layers = operation->reads();
        for (int worker = 0; worker < threads && operation->has_tasks(); ++worker)
            first_reads_.push_back(first_read(layers.data(), layers.size(), threads, worker));
    }
    planned_ = threads;
}

void Program::advance(const Store& store, int threads) {
    threads = std::clamp(threads, 1, kMaxThreads);
    if (planned_ != threads) plan_reads(threads);
    run_->start(store, threads);
    StepStages stages(operations_, first_reads_, *run_);
    run_stages(threads, stages);
}

}  // namespace fracbit
