// Products of layers: jobs for the kernels, tasks for the threads, and calls from outside, in this order.
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

// Rows [first, last) of a task.
struct Rows {
    int64_t first, last;
};

// What a worker needs besides for a task along out.
struct GroupScratch {
    float* offsets;  // [width] of the group, in natural order
    float* zeros;    // [width] of the group, in lane order
    float* shifts;   // [batch]
    LaneActivations lanes;
    float* rest;

    GroupScratch(const ProductCall& call, float* memory)
        : offsets(memory), zeros(offsets + call.x.width), shifts(zeros + call.x.width),
          lanes(shifts + aligned(call.x.batch), call.weight(), call.x.batch),
          rest(shifts + aligned(call.x.batch) + LaneActivations::floats(call.weight(), call.x.batch)) {}

    static int64_t floats(const Weight& w, const Activations& x) {
        return 2 * x.width + aligned(x.batch) + LaneActivations::floats(w, x.batch);
    }
};

// --- jobs for the kernels ----------------------------------------------------------------------------------------------

// The constant part of the value of a code, in steps.
float bias_of(const ProductCall& call) {
    const StoredTable& table = call.weight().table;
    const int bits = call.weight().bits;
    if (!call.x.int8) return uses_numbers(table.affine, bits) ? table.constant : 0.0f;
    if (!table.affine) return call.isa->biased ? -static_cast<float>(kSplitBias) : 0.0f;
    // Products that take bytes as signed see codes of 8 bits minus 128.
    return table.constant + (bits == 8 && !call.isa->biased ? static_cast<float>(kHighBias) : 0.0f);
}

RowJob row_job_of(const ProductCall& call, const LaneActivations& lanes) {
    const Weight& w = call.weight();
    return {codes_of(w), table_of(w), scales_along_rows(w), lane_blocks_of(w), lanes.sums, bias_of(call), call.x.batch, call.y};
}

// `scratch`: room for a row of weights and its outliers.
void run_rows(const ProductCall& call, const LaneActivations& lanes, Rows rows, float* scratch) {
    const Weight& w = call.weight();
    const Isa& isa = *call.isa;
    if (!w.blocks.whole_lanes) {
        isa.multiply_decoded({decode_job_of(w), call.x.coded, call.x.batch, call.y, scratch}, isa, rows.first, rows.last);
    } else if (call.x.int8) {
        isa.multiply_int8({row_job_of(call, lanes), split_table_of(w), lanes.rounded.a, lanes.rounded.scale}, rows.first, rows.last);
    } else {
        isa.multiply_float({row_job_of(call, lanes), lanes.x}, rows.first, rows.last);
    }
}

// y += outlier columns times their activations, for one row.
void add_outliers(const ProductCall& call, int64_t row, float* scratch) {
    const Outliers& outliers = call.weight().outliers;
    const int64_t count = outliers.count();
    call.isa->to_float(outliers.row(row), outliers.type, count, scratch);
    for (int64_t n = 0; n < call.x.batch; ++n) {
        const float* x = call.x.outliers + n * count;
        float sum = 0.0f;
        for (int64_t i = 0; i < count; ++i) sum += scratch[i] * x[i];
        call.y.at(n, row) += sum;
    }
}

void multiply_rows(const ProductCall& call, const LaneActivations& lanes, Rows rows, float* scratch) {
    run_rows(call, lanes, rows, scratch);
    if (call.weight().outliers.columns.empty()) return;
    for (int64_t row = rows.first; row < rows.last; ++row) add_outliers(call, row, scratch);
}

// --- tasks -------------------------------------------------------------------------------------------------------------

// Offsets of a group of rows, one per input and the same for all its rows. Zero codes come as -T[zero] in lane order, padded, for
// activations that are folded and rounded already; floats as they are, in natural order.
void load_offsets(const ProductCall& call, int64_t group, const GroupScratch& to) {
    const Weight& w = call.weight();
    if (w.scales.offsets != nullptr) call.isa->to_float(w.offsets_of_group(group), w.scales.type, w.coded, to.offsets);
    if (w.scales.zeros.empty()) return;
    const uint8_t* zeros = w.zeros_of_group(group);
    for (int64_t i = 0; i < w.coded; ++i) to.offsets[i] = -w.table.values[zeros[i]];
    std::fill(to.offsets + w.coded, to.offsets + call.x.width, 0.0f);
    call.isa->transpose(to.offsets, w.chunks(), to.zeros);
}

// What the offsets of a group add to every row of it.
float shift_of(const ProductCall& call, int64_t n, const GroupScratch& group) {
    const int64_t width = call.x.width;
    if (!call.weight().scales.zeros.empty()) return dot_floats(group.zeros, group.lanes.x + n * width, width);
    if (call.weight().scales.offsets != nullptr) return dot_floats(group.offsets, call.x.row(n), call.weight().coded);
    return 0.0f;
}

// Rows of one group. Its scales are folded into the activations; what is left is a plain dot product.
void multiply_group(const ProductCall& call, int64_t group, Rows rows, float* scratch) {
    const Weight& w = call.weight();
    const GroupScratch here(call, scratch);
    load_offsets(call, group, here);
    const Upcoming codes{w.codes + rows.first * w.stride(), (rows.last - rows.first) * w.stride()};
    for (int64_t n = 0; n < call.x.batch; ++n) {
        fold(w, *call.isa, call.x, n, group, here.lanes, codes);
        here.shifts[n] = shift_of(call, n, here);
    }
    multiply_rows(call, here.lanes, rows, here.rest);
    if (!call.has_shifts()) return;
    for (int64_t n = 0; n < call.x.batch; ++n)
        for (int64_t row = rows.first; row < rows.last; ++row) call.y.at(n, row) += here.shifts[n];
}

// --- calls -------------------------------------------------------------------------------------------------------------

Rows rows_of(const Projection& layer, const Tasks& tasks, int64_t index) {
    if (tasks.per_group == 0) return {index * tasks.rows, std::min((index + 1) * tasks.rows, layer.rows)};
    const int64_t size = layer.packed->blocks.size, begin = index / tasks.per_group * size, end = std::min(begin + size, layer.rows);
    const int64_t first = begin + index % tasks.per_group * tasks.rows;
    return {std::min(first, end), std::min(first + tasks.rows, end)};
}

// A group shares its folded activations: cut it only when there are too few groups to go round.
Tasks tasks_along_out(const Weight& w, int threads) {
    const int64_t size = w.blocks.size, groups = tasks_for(w.rows, size), height = std::min(size, w.rows);
    const int64_t parts = groups >= 2 * threads ? 1 : tasks_for(kTasksPerThread * threads, groups);
    const int64_t rows = std::max<int64_t>(tasks_for(height, parts), 1), per_group = tasks_for(height, rows);
    return {groups * per_group, rows, per_group};
}

// Tasks of about `bytes`.
Tasks tasks_of(const Projection& layer, int64_t bytes, int threads) {
    if (layer.packed != nullptr && layer.packed->blocks.along_out) return tasks_along_out(*layer.packed, threads);
    const int64_t rows = std::clamp<int64_t>(bytes / std::max<int64_t>(layer.row_bytes(), 1), 1, std::max<int64_t>(layer.rows, 1));
    return {tasks_for(layer.rows, rows), rows, 0};
}

void run_dense(const Product& product, const Isa& isa, int64_t batch, Rows rows) {
    const Projection& p = *product.layer;
    const DenseJob job{p.dense, p.type, p.rows, p.columns, static_cast<const float*>(product.x.data), product.x.stride, batch,
                       {static_cast<float*>(product.y.data), product.y.stride}};
    isa.multiply_dense(job, rows.first, rows.last);
}

// The bias, and the curve that the results go through.
void complete(const Product& product, const Isa& isa, const Results& y, int64_t batch, Rows rows) {
    const float* bias = product.layer->bias;
    for (int64_t n = 0; n < batch; ++n) {
        if (bias != nullptr)
            for (int64_t i = rows.first; i < rows.last; ++i) y.at(n, i) += bias[i];
        if (product.after.function != Function::identity) isa.apply(product.after, &y.at(n, rows.first), rows.last - rows.first);
    }
}

}  // namespace

int64_t Products::prepare(const Product* products, size_t count, const Isa& isa, int64_t batch, bool int8, int threads, Scratch& scratch) {
    calls_.resize(count);
    int64_t bytes = 0, tasks = 0;
    for (size_t i = 0; i < count; ++i) bytes += products[i].layer->rows * products[i].layer->row_bytes();
    bytes = bytes_per_task(bytes, threads);
    for (size_t i = 0; i < count; ++i) {
        ProductCall& call = calls_[i];
        call.product = products[i];
        call.isa = &isa;
        call.tasks = tasks_of(*products[i].layer, bytes, threads);
        tasks += call.tasks.count;
        const Matrix &x = products[i].x, &y = products[i].y;
        const int64_t rows = products[i].batch > 0 ? products[i].batch : batch;
        call.y = y.type == Float::f32 ? Results{static_cast<float*>(y.data), y.stride}
                                      : Results{scratch.floats(rows * products[i].layer->rows), products[i].layer->rows};
        call.x.batch = rows;
        if (products[i].layer->packed == nullptr) continue;
        const Weight& w = call.weight();
        const ProductCall* before = i == 0 || calls_[i - 1].product.layer->packed == nullptr ? nullptr : &calls_[i - 1];
        const bool shared = before != nullptr && before->product.x.data == x.data && before->x.batch == rows && same_form(before->weight(), w);
        call.x = shared ? before->x : load(w, isa, x, rows, int8, scratch);
        call.scratch_floats = aligned(call.x.width + w.outliers.count()) + (w.blocks.along_out ? GroupScratch::floats(w, call.x) : 0);
        call.scratch = scratch.floats(call.scratch_floats * threads);
    }
    return tasks;
}

void Products::run(int64_t index, int worker) const {
    const ProductCall* call = calls_.data();
    for (; index >= call->tasks.count; ++call) index -= call->tasks.count;
    const Rows rows = rows_of(*call->product.layer, call->tasks, index);
    if (rows.first >= rows.last) return;
    if (call->product.layer->packed == nullptr) {
        run_dense(call->product, *call->isa, call->x.batch, rows);
    } else {
        float* scratch = call->scratch + worker * call->scratch_floats;
        call->tasks.per_group > 0 ? multiply_group(*call, index / call->tasks.per_group, rows, scratch) : multiply_rows(*call, call->x.lanes, rows, scratch);
    }
    complete(call->product, *call->isa, call->y, call->x.batch, rows);
}

void Products::finish() const {
    for (const ProductCall& call : calls_) {
        const Matrix& y = call.product.y;
        if (y.type == Float::f32) continue;
        for (int64_t n = 0; n < call.x.batch; ++n) call.isa->from_float(&call.y.at(n, 0), y.type, call.product.layer->rows, y.row(n));
    }
}

Upcoming first_read(const Projection* const* layers, size_t count, int threads, int worker) {
    int64_t bytes = 0, tasks = 0;
    for (size_t i = 0; i < count; ++i) bytes += layers[i]->rows * layers[i]->row_bytes();
    bytes = bytes_per_task(bytes, threads);
    for (size_t i = 0; i < count; ++i) tasks += tasks_of(*layers[i], bytes, threads).count;
    int64_t index = share_begin(tasks, threads, worker);
    for (size_t i = 0; i < count; ++i) {
        const Tasks own = tasks_of(*layers[i], bytes, threads);
        if (index >= own.count) {
            index -= own.count;
            continue;
        }
        const int64_t first = rows_of(*layers[i], own, index).first;
        return {static_cast<const uint8_t*>(layers[i]->row(first)), (layers[i]->rows - first) * layers[i]->row_bytes()};
    }
    return {nullptr, 0};
}

namespace {

// One job: products of at most kBatchRows rows.
void multiply_job(const Product* products, size_t count, const Isa& isa, int64_t batch, bool int8, int threads) {
    static thread_local Scratch scratch;
    static thread_local Products some;
    threads = std::clamp(threads, 1, kMaxThreads);
    scratch.reset();
    const int64_t tasks = some.prepare(products, count, isa, batch, int8, threads, scratch);
    run_tasks(threads, tasks, [](void* all, int64_t index, int worker) { static_cast<const Products*>(all)->run(index, worker); }, &some);
    some.finish();
}

}  // namespace

void multiply(std::vector<Product> products, const Isa& isa, int64_t batch, bool int8, int threads) {
    for (int64_t n = 0; n < batch; n += kBatchRows) {
        multiply_job(products.data(), products.size(), isa, std::min(kBatchRows, batch - n), int8, threads);
        for (Product& product : products) {
            product.x = product.x.from_row(kBatchRows);
            product.y = product.y.from_row(kBatchRows);
        }
    }
}

void multiply_each(const std::vector<Product>& products, const Isa& isa, bool int8, int threads) {
    std::vector<Product> pieces;
    for (Product product : products) {
        for (int64_t left = product.batch; left > 0; left -= kBatchRows) {
            product.batch = std::min(kBatchRows, left);
            pieces.push_back(product);
            product.x = product.x.from_row(kBatchRows);
            product.y = product.y.from_row(kBatchRows);
        }
    }
    for (size_t first = 0, last; first < pieces.size(); first = last) {
        int64_t rows = 0;
        for (last = first; last < pieces.size() && rows < kJobRows; ++last) rows += pieces[last].batch;
        multiply_job(pieces.data() + first, last - first, isa, 0, int8, threads);
    }
}

}  // namespace fracbit
