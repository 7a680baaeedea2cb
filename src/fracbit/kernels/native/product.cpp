// Products of packed weights: jobs for the kernels, tasks for the threads, and calls from outside, in this order.
//
// Along in, a task is a number of rows, and all tasks read the same activations. Along out, a task lies inside one group of rows that
// share scales: it folds the scales into activations of its own first.
#include "product.h"

#include <algorithm>

#include "activations.h"
#include "floats.h"
#include "pool.h"
#include "tasks.h"

namespace fracbit {
namespace {

constexpr int64_t kBatchRows = 32;  // rows of activations at a time: what is derived from them stays small

// How the rows of a weight are cut into tasks. Along out a task lies inside one group of rows.
struct Tasks {
    int64_t count;
    int64_t rows;       // of a task
    int64_t per_group;  // along out
};

struct Call {
    const Weight* weight;
    const Isa* isa;
    Activations x;
    Results y;
    Tasks tasks;
    float* scratch;
    int64_t scratch_floats;  // of a worker

    bool has_shifts() const { return weight->scales.offsets != nullptr || !weight->scales.zeros.empty(); }
};

// What a worker needs besides for a task along out.
struct GroupScratch {
    float* offsets;  // [width] of the group, in natural order
    float* zeros;    // [width] of the group, in lane order
    float* shifts;   // [batch]
    LaneActivations lanes;
    float* rest;

    GroupScratch(const Call& call, float* memory)
        : offsets(memory), zeros(offsets + call.x.width), shifts(zeros + call.x.width),
          lanes(shifts + aligned(call.x.batch), *call.weight, call.x.batch),
          rest(shifts + aligned(call.x.batch) + LaneActivations::floats(*call.weight, call.x.batch)) {}

    static int64_t floats(const Weight& w, const Activations& x) {
        return 2 * x.width + aligned(x.batch) + LaneActivations::floats(w, x.batch);
    }
};

// --- jobs for the kernels ----------------------------------------------------------------------------------------------

// The constant part of the value of a code, in steps.
float bias_of(const Call& call) {
    const StoredTable& table = call.weight->table;
    const int bits = call.weight->bits;
    if (!call.x.int8) return uses_numbers(table.affine, bits) ? table.constant : 0.0f;
    if (!table.affine) return call.isa->biased ? -static_cast<float>(kSplitBias) : 0.0f;
    // Products that take bytes as signed see codes of 8 bits minus 128.
    return table.constant + (bits == 8 && !call.isa->biased ? static_cast<float>(kHighBias) : 0.0f);
}

RowJob row_job_of(const Call& call, const LaneActivations& lanes) {
    const Weight& w = *call.weight;
    return {codes_of(w), table_of(w), scales_along_rows(w), lane_blocks_of(w), lanes.sums, bias_of(call), call.x.batch, call.y};
}

// Rows [first, last); `scratch`: room for a row of weights and its outliers.
void run_rows(const Call& call, const LaneActivations& lanes, int64_t first, int64_t last, float* scratch) {
    const Weight& w = *call.weight;
    const Isa& isa = *call.isa;
    if (!w.blocks.whole_lanes) {
        isa.multiply_decoded({decode_job_of(w), call.x.coded, call.x.batch, call.y, scratch}, isa, first, last);
    } else if (call.x.int8) {
        isa.multiply_int8({row_job_of(call, lanes), split_table_of(w), lanes.rounded.a, lanes.rounded.scale}, first, last);
    } else {
        isa.multiply_float({row_job_of(call, lanes), lanes.x}, first, last);
    }
}

// y += outlier columns times their activations, for one row.
void add_outliers(const Call& call, int64_t row, float* scratch) {
    const Outliers& outliers = call.weight->outliers;
    const int64_t count = outliers.count();
    call.isa->to_float(outliers.row(row), outliers.type, count, scratch);
    for (int64_t n = 0; n < call.x.batch; ++n) {
        const float* x = call.x.outliers + n * count;
        float sum = 0.0f;
        for (int64_t i = 0; i < count; ++i) sum += scratch[i] * x[i];
        call.y.at(n, row) += sum;
    }
}

void multiply_rows(const Call& call, const LaneActivations& lanes, int64_t first, int64_t last, float* scratch) {
    run_rows(call, lanes, first, last, scratch);
    if (call.weight->outliers.columns.empty()) return;
    for (int64_t row = first; row < last; ++row) add_outliers(call, row, scratch);
}

// --- tasks -------------------------------------------------------------------------------------------------------------

void task_along_in(const Call& call, int64_t index, float* scratch) {
    const int64_t first = index * call.tasks.rows;
    multiply_rows(call, call.x.lanes, first, std::min(first + call.tasks.rows, call.weight->rows), scratch);
}

// Offsets of a group of rows, one per input and the same for all its rows. Zero codes come as -T[zero] in lane order, padded, for
// activations that are folded and rounded already; floats as they are, in natural order.
void load_offsets(const Call& call, int64_t group, const GroupScratch& to) {
    const Weight& w = *call.weight;
    if (w.scales.offsets != nullptr) call.isa->to_float(w.offsets_of_group(group), w.scales.type, w.coded, to.offsets);
    if (w.scales.zeros.empty()) return;
    const uint8_t* zeros = w.zeros_of_group(group);
    for (int64_t i = 0; i < w.coded; ++i) to.offsets[i] = -w.table.values[zeros[i]];
    std::fill(to.offsets + w.coded, to.offsets + call.x.width, 0.0f);
    call.isa->transpose(to.offsets, w.chunks(), to.zeros);
}

// What the offsets of a group add to every row of it.
float shift_of(const Call& call, int64_t n, const GroupScratch& group) {
    const int64_t width = call.x.width;
    if (!call.weight->scales.zeros.empty()) return dot_floats(group.zeros, group.lanes.x + n * width, width);
    if (call.weight->scales.offsets != nullptr) return dot_floats(group.offsets, call.x.row(n), call.weight->coded);
    return 0.0f;
}

// The scales of a group of rows are folded into its activations; what is left is a plain dot product.
void task_along_out(const Call& call, int64_t index, float* scratch) {
    const Weight& w = *call.weight;
    const int64_t group = index / call.tasks.per_group, part = index % call.tasks.per_group;
    const int64_t begin = group * w.blocks.size, end = std::min(begin + w.blocks.size, w.rows);
    const int64_t first = begin + part * call.tasks.rows, last = std::min(first + call.tasks.rows, end);
    if (first >= last) return;
    const GroupScratch here(call, scratch);
    load_offsets(call, group, here);
    const Upcoming codes{w.codes + first * w.stride(), (last - first) * w.stride()};
    for (int64_t n = 0; n < call.x.batch; ++n) {
        fold(w, *call.isa, call.x, n, group, here.lanes, codes);
        here.shifts[n] = shift_of(call, n, here);
    }
    multiply_rows(call, here.lanes, first, last, here.rest);
    if (!call.has_shifts()) return;
    for (int64_t n = 0; n < call.x.batch; ++n)
        for (int64_t row = first; row < last; ++row) call.y.at(n, row) += here.shifts[n];
}

// A group shares its folded activations: cut it only when there are too few groups to go round.
Tasks tasks_along_out(const Weight& w, int threads) {
    const int64_t size = w.blocks.size, groups = tasks_for(w.rows, size), height = std::min(size, w.rows);
    const int64_t parts = groups >= 2 * threads ? 1 : tasks_for(kTasksPerThread * threads, groups);
    const int64_t rows = std::max<int64_t>(tasks_for(height, parts), 1), per_group = tasks_for(height, rows);
    return {groups * per_group, rows, per_group};
}

Tasks tasks_along_in(const Weight& w, int threads) {
    const int64_t rows = rows_per_task(w.rows, w.stride(), threads);
    return {tasks_for(w.rows, rows), rows, 0};
}

// --- calls -------------------------------------------------------------------------------------------------------------

struct Calls {
    Call call[kMostTogether];
};

void multiply_task(void* context, int64_t index, int worker) {
    const Call* call = static_cast<const Calls*>(context)->call;
    for (; index >= call->tasks.count; ++call) index -= call->tasks.count;
    float* scratch = call->scratch + worker * call->scratch_floats;
    call->weight->blocks.along_out ? task_along_out(*call, index, scratch) : task_along_in(*call, index, scratch);
}

// `before`: the product before it, or null. Results of another type than fp32 go to memory of our own first.
Call prepare(const Product& product, const Isa& isa, const Matrix& x, int64_t batch, bool int8, int threads, const Call* before, Scratch& scratch) {
    const Weight& w = *product.weight;
    Call call{};
    call.weight = &w;
    call.isa = &isa;
    const bool direct = product.y.type == Float::f32;
    call.y = direct ? Results{static_cast<float*>(product.y.data), product.y.stride} : Results{scratch.floats(batch * w.rows), w.rows};
    const bool shared = before != nullptr && same_form(*before->weight, w);
    call.x = shared ? before->x : load(w, isa, x, batch, int8, scratch);
    call.tasks = w.blocks.along_out ? tasks_along_out(w, threads) : tasks_along_in(w, threads);
    call.scratch_floats = aligned(call.x.width + w.outliers.count()) + (w.blocks.along_out ? GroupScratch::floats(w, call.x) : 0);
    call.scratch = scratch.floats(call.scratch_floats * threads);
    return call;
}

void copy_results(const Call& call, const Matrix& y) {
    if (y.type == Float::f32) return;
    for (int64_t n = 0; n < call.x.batch; ++n) call.isa->from_float(&call.y.at(n, 0), y.type, call.weight->rows, y.row(n));
}

// At most kMostTogether products of the rows [from, from + batch) of activations, at most kBatchRows.
void multiply_some(const Product* products, int64_t count, const Isa& isa, const Matrix& x, int64_t from, int64_t batch, bool int8, int threads) {
    static thread_local Scratch scratch;
    scratch.reset();
    Calls calls;
    int64_t tasks = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Product product{products[i].weight, products[i].y.from_row(from)};
        calls.call[i] = prepare(product, isa, x.from_row(from), batch, int8, threads, i == 0 ? nullptr : &calls.call[i - 1], scratch);
        tasks += calls.call[i].tasks.count;
    }
    run_tasks(threads, tasks, multiply_task, &calls);
    for (int64_t i = 0; i < count; ++i) copy_results(calls.call[i], products[i].y.from_row(from));
}

}  // namespace

void multiply(const Product* products, int64_t count, const Isa& isa, const Matrix& x, int64_t batch, bool int8, int threads) {
    threads = std::clamp(threads, 1, kMaxThreads);
    for (int64_t first = 0; first < count; first += kMostTogether)
        for (int64_t n = 0; n < batch; n += kBatchRows)
            multiply_some(products + first, std::min(kMostTogether, count - first), isa, x, n, std::min(kBatchRows, batch - n), int8, threads);
}

}  // namespace fracbit
