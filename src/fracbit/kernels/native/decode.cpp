// Decodes rows of a packed weight: a task is a number of rows, and the kernel of an instruction set decodes each.
#include "decode.h"

#include <algorithm>

#include "pool.h"
#include "scratch.h"
#include "tasks.h"

namespace fracbit {
namespace {

struct Call {
    const Weight& weight;
    const Isa& isa;
    DecodeJob job;
    int64_t first;
    int64_t last;
    Matrix out;
    int64_t rows;  // of a task
    float* scratch;
    int64_t scratch_floats;  // of a worker
};

// What a worker holds: a row of weights, scales and offsets of its group along out, a whole row with its outliers, the outliers.
struct RowScratch {
    float *weights, *scales, *offsets, *whole, *outliers;

    RowScratch(const Weight& w, float* memory)
        : weights(memory), scales(weights + aligned(w.coded)), offsets(scales + aligned(w.coded)), whole(offsets + aligned(w.coded)),
          outliers(whole + aligned(w.columns)) {}

    static int64_t floats(const Weight& w) { return 3 * aligned(w.coded) + aligned(w.columns) + aligned(w.outliers.count()); }
};

// Scales and offsets of a group of rows; zero codes are offsets of -scale * T[zero].
void load_group(const Call& call, int64_t group, const RowScratch& to) {
    const Weight& w = call.weight;
    const Float type = w.scales.type;
    call.isa.to_float(w.scales_of_group(group), type, w.coded, to.scales);
    std::fill(to.offsets, to.offsets + w.coded, 0.0f);
    if (w.scales.offsets != nullptr) call.isa.to_float(w.offsets_of_group(group), type, w.coded, to.offsets);
    if (w.scales.zeros.empty()) return;
    const uint8_t* zeros = w.zeros_of_group(group);
    for (int64_t i = 0; i < w.coded; ++i) to.offsets[i] = -to.scales[i] * w.table.values[zeros[i]];
}

// The row with its outliers in their places.
const float* with_outliers(const Call& call, int64_t row, const RowScratch& scratch) {
    const Outliers& outliers = call.weight.outliers;
    if (outliers.columns.empty()) return scratch.weights;
    const float* next = scratch.weights;
    for (const int32_t column : outliers.coded) scratch.whole[column] = *next++;
    call.isa.to_float(outliers.row(row), outliers.type, outliers.count(), scratch.outliers);
    next = scratch.outliers;
    for (const int32_t column : outliers.columns) scratch.whole[column] = *next++;
    return scratch.whole;
}

void decode_row(const Call& call, int64_t row, const RowScratch& scratch) {
    const Weight& w = call.weight;
    auto [weights, scales, offsets, whole, outliers] = scratch;
    call.isa.weights_of_row(call.job, call.isa, row, weights);
    if (w.blocks.along_out)
        for (int64_t i = 0; i < w.coded; ++i) weights[i] = weights[i] * scales[i] + offsets[i];
    call.isa.from_float(with_outliers(call, row, scratch), call.out.type, w.columns, call.out.row(row - call.first));
}

void decode_task(void* context, int64_t index, int worker) {
    const auto& call = *static_cast<const Call*>(context);
    const BlockLayout& blocks = call.weight.blocks;
    const int64_t begin = call.first + index * call.rows, end = std::min(begin + call.rows, call.last);
    const RowScratch scratch(call.weight, call.scratch + worker * call.scratch_floats);
    for (int64_t row = begin; row < end; ++row) {
        if (blocks.along_out && (row == begin || row % blocks.size == 0)) load_group(call, row / blocks.size, scratch);
        decode_row(call, row, scratch);
    }
}

}  // namespace

void decode(const Weight& w, const Isa& isa, int64_t first, int64_t last, const Matrix& out, int threads) {
    if (first >= last) return;
    threads = std::clamp(threads, 1, kMaxThreads);
    static thread_local Scratch scratch;
    scratch.reset();
    const int64_t rows = rows_per_task(last - first, w.stride(), threads), floats = RowScratch::floats(w);
    Call call{w, isa, decode_job_of(w), first, last, out, rows, scratch.floats(floats * threads), floats};
    run_tasks(threads, tasks_for(last - first, rows), decode_task, &call);
}

}  // namespace fracbit
