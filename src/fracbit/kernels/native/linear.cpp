#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>

#include "pool.h"
#include "scratch.h"

namespace fracbit {
namespace {

constexpr int64_t kMostTaskBytes = 1 << 17;   // codes read per task: enough to hide claiming it and starting a stream,
constexpr int64_t kLeastTaskBytes = 1 << 14;  // few enough to share evenly
constexpr int64_t kFoldChunks = 4;      // activations folded at a time: they stay in the first-level cache
constexpr int64_t kFoldBytes = 1 << 12; // codes asked for meanwhile

int64_t width(Float type) { return type == Float::f32 ? 4 : 2; }

const char* at(const void* data, Float type, int64_t index) { return static_cast<const char*>(data) + index * width(type); }

void set_tables(Weight& w, const float* table, int64_t levels) {
    const int64_t width = table_width(w.bits);
    w.values.assign(static_cast<size_t>(w.table_rows * width), 0.0f);
    w.high.assign(w.values.size(), 128);
    w.low.assign(w.values.size(), 0);
    w.steps.assign(static_cast<size_t>(w.table_rows), 1.0f);
    for (int64_t row = 0; row < w.table_rows; ++row) {
        float* values = w.values.data() + row * width;
        float top = 0.0f;
        for (int64_t i = 0; i < width; ++i) {
            values[i] = table[row * levels + std::min(i, levels - 1)];
            top = std::max(top, std::fabs(values[i]));
        }
        const float step = top > 0 && std::isfinite(top) ? top / 16383.0f : 1.0f;
        w.steps[static_cast<size_t>(row)] = step;
        for (int64_t i = 0; i < width; ++i) {
            const float scaled = std::isfinite(values[i]) ? values[i] / step : 0.0f;
            const int q = static_cast<int>(std::lround(std::clamp(scaled, -16384.0f, 16383.0f))) + 16384;
            w.high[static_cast<size_t>(row * width + i)] = static_cast<uint8_t>(q >> kLowBits);
            w.low[static_cast<size_t>(row * width + i)] = static_cast<uint8_t>(q & ((1 << kLowBits) - 1));
        }
    }
}

// Evenly spaced tables need no look-up: the code is the number.
void detect_affine(Weight& w, const float* table, int64_t levels) {
    if (w.table_rows != 1 || levels < 2) return;
    const double first = table[0], step = (static_cast<double>(table[levels - 1]) - first) / static_cast<double>(levels - 1);
    if (!(step > 0) || !std::isfinite(step)) return;
    for (int64_t i = 0; i < levels; ++i)
        if (std::fabs(first + step * static_cast<double>(i) - table[i]) > 2e-7 * std::fabs(static_cast<double>(table[levels - 1]) - first)) return;
    w.affine = true;
    w.steps[0] = static_cast<float>(step);
    w.constant = static_cast<float>(first / step);
}

void set_lanes(Weight& w) {
    const int64_t chunks = w.chunks();
    w.whole_lanes = w.along_out || (!w.flat && (w.block % 8 == 0 || w.blocks == 1));
    w.period = w.along_out || !w.whole_lanes || w.blocks == 1 ? 0 : std::min(w.block / 8, chunks);
    w.lane.resize(static_cast<size_t>(w.period * kLanes));
    for (size_t i = 0; i < w.lane.size(); ++i) w.lane[i] = static_cast<int32_t>(static_cast<int64_t>(i) * 8 / w.block);
}

void set_columns(Weight& w, const int32_t* outlier_columns, int64_t outliers) {
    if (outliers == 0) return;
    w.other_columns.assign(outlier_columns, outlier_columns + outliers);
    std::vector<bool> other(static_cast<size_t>(w.columns), false);
    for (const int32_t column : w.other_columns) other[static_cast<size_t>(column)] = true;
    for (int64_t i = 0; i < w.columns; ++i)
        if (!other[static_cast<size_t>(i)]) w.kept_columns.push_back(static_cast<int32_t>(i));
}

// Activations in fp32, natural order, padded with zeros to whole chunks; and those of the outlier columns.
struct Activations {
    int64_t width = 0;
    float* kept = nullptr;    // [batch, width]
    float* others = nullptr;  // [batch, outliers]
};

void load(const Weight& w, const Isa& isa, const Matrix& x, int64_t n, const Activations& to, float* row) {
    float* kept = to.kept + n * to.width;
    const char* source = at(x.data, x.type, n * x.stride);
    if (w.other_columns.empty()) {
        isa.to_float(source, x.type, w.kept, kept);
    } else {
        isa.to_float(source, x.type, w.columns, row);
        for (int64_t i = 0; i < w.kept; ++i) kept[i] = row[w.kept_columns[static_cast<size_t>(i)]];
        const auto p = static_cast<int64_t>(w.other_columns.size());
        for (int64_t i = 0; i < p; ++i) to.others[n * p + i] = row[w.other_columns[static_cast<size_t>(i)]];
    }
    std::fill(kept + w.kept, kept + to.width, 0.0f);
}

// What the constant part of a code's value contributes per unit of activation, in units of a step.
float bias_of(const Weight& w, const Isa& isa, bool int8) {
    if (!int8) return uses_numbers(w.affine, w.bits) ? w.constant : 0.0f;
    if (w.affine) return w.constant + (w.bits == 8 && !isa.biased ? 128.0f : 0.0f);
    return isa.biased ? -16384.0f : 0.0f;
}

// Activations in lane order, for one row of scales of a weight.
struct Lanes {
    float* x;        // [batch, chunks, 8, 16]
    float* x_sum;    // [batch, chunks, 16]
    float* a_scale;  // [batch, chunks, 16]
    int8_t* a;       // [batch, chunks, 128]
    static int64_t floats(int64_t batch, int64_t chunks) { return batch * chunks * (kChunk + 2 * kLanes + kChunk / 4); }
    Lanes(float* memory, int64_t batch, int64_t chunks)
        : x(memory),
          x_sum(x + batch * chunks * kChunk),
          a_scale(x_sum + batch * chunks * kLanes),
          a(reinterpret_cast<int8_t*>(a_scale + batch * chunks * kLanes)) {}
};

// `count` chunks of row n from `first` on, given in natural order.
void fill(const Lanes& lanes, const Weight& w, const Isa& isa, const float* natural, int64_t n, bool int8, int64_t first, int64_t count) {
    const int64_t c = n * w.chunks() + first;
    float* x = lanes.x + c * kChunk;
    float* sum = lanes.x_sum + c * kLanes;
    isa.transpose(natural, count, x);
    if (int8) {
        isa.quantize(x, count, w.bits, lanes.a + c * kChunk, lanes.a_scale + c * kLanes, sum);
    } else {
        isa.lane_sums(x, count, sum);
    }
}

float total(const float* x, int64_t lanes) {
    float part[kLanes] = {};
    for (int64_t i = 0; i < lanes; i += kLanes)
        for (int64_t d = 0; d < kLanes; ++d) part[d] += x[i + d];
    return std::accumulate(part, part + kLanes, 0.0f);
}

// Blocks of a row, padded as the kernels read them.
int64_t sums_stride(const Weight& w) { return aligned(w.along_out ? 1 : w.blocks); }

// Sums of the activations of every block, from those of the lanes.
void sum_blocks(const Weight& w, const float* lane_sums, float* block_sums) {
    std::fill(block_sums, block_sums + sums_stride(w), 0.0f);
    if (w.along_out || w.blocks == 1) {
        block_sums[0] = total(lane_sums, w.chunks() * kLanes);
        return;
    }
    const int64_t lanes = w.block / 8, all = w.chunks() * kLanes;
    for (int64_t b = 0; b < w.blocks; ++b)
        block_sums[b] = std::accumulate(lane_sums + b * lanes, lane_sums + std::min((b + 1) * lanes, all), 0.0f);
}

RowJob job_of(const Weight& w) {
    RowJob job{};
    job.codes = w.codes;
    job.stride = w.stride();
    job.chunks = w.chunks();
    job.bits = w.bits;
    job.affine = w.affine;
    job.values = w.values.data();
    job.high = w.high.data();
    job.low = w.low.data();
    job.steps = w.steps.data();
    job.table_stride = w.table_rows == 1 ? 0 : table_width(w.bits);
    job.scale_type = w.scale_type;
    job.blocks = w.along_out ? 1 : w.blocks;
    job.sums_stride = sums_stride(w);
    job.block = w.block;
    job.kept = w.kept;
    job.period = w.period;
    job.lane = w.lane.data();
    if (!w.along_out) {
        job.scales = w.scales;
        job.offsets = w.offsets;
        job.zeros = w.zeros.empty() ? nullptr : w.zeros.data();
        job.scale_stride = w.scale_stride;
        job.flat = w.flat;
    }
    return job;
}

void with_lanes(RowJob& job, const Lanes& lanes, const float* block_sums) {
    job.x = lanes.x;
    job.a = lanes.a;
    job.a_scale = lanes.a_scale;
    job.block_sums = block_sums;
}

// y [batch, rows] += outlier columns times their activations, for one row.
void add_outliers(const Weight& w, const Isa& isa, const Activations& x, int64_t batch, int64_t row, const RowJob& job, float* scratch) {
    const auto p = static_cast<int64_t>(w.other_columns.size());
    isa.to_float(at(w.outliers, w.outlier_type, row * p), w.outlier_type, p, scratch);
    for (int64_t n = 0; n < batch; ++n) {
        float sum = 0.0f;
        for (int64_t i = 0; i < p; ++i) sum += scratch[i] * x.others[n * p + i];
        job.y[n * job.y_stride + row] += sum;
    }
}

struct Call {
    const Weight* w;
    const Isa* isa;
    int64_t batch;
    bool int8;
    Activations x;
    float* sums;         // [batch, sums_stride]
    int64_t rows_per_task;
    int64_t tasks_per_block;
    int64_t tasks;
    int64_t thread_floats;
    float* thread_scratch;
    RowJob job;

    float* scratch(int worker) const { return thread_scratch + worker * thread_floats; }
};

void run_rows(const Call& call, RowJob job, int64_t first, int64_t last, float* scratch) {
    job.scratch = scratch;
    if (!call.w->whole_lanes) {
        call.isa->multiply_weights(job, *call.isa, first, last);
    } else if (call.int8) {
        call.isa->multiply_int8(job, first, last);
    } else {
        call.isa->multiply_float(job, first, last);
    }
    if (call.w->other_columns.empty()) return;
    for (int64_t row = first; row < last; ++row) add_outliers(*call.w, *call.isa, call.x, call.batch, row, job, scratch);
}

void task_along_in(const Call& call, int64_t index, int worker) {
    const int64_t first = index * call.rows_per_task;
    run_rows(call, call.job, first, std::min(first + call.rows_per_task, call.w->rows), call.scratch(worker));
}

float dot(const float* a, const float* b, int64_t count) {
    float part[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t d = 0; d < kLanes; ++d) part[d] += a[i + d] * b[i + d];
    for (; i < count; ++i) part[0] += a[i] * b[i];
    float sum = 0.0f;
    for (const float value : part) sum += value;
    return sum;
}

// Offsets of a group of rows, one per input; the same for all its rows. Zero codes come as -T[zero] in lane order, padded,
// for activations that are folded and rounded already; floats as they are, in natural order.
void offsets_of(const Weight& w, const Isa& isa, int64_t group, int64_t width, float* offset, float* lane_order) {
    if (w.offsets != nullptr) isa.to_float(at(w.offsets, w.scale_type, group * w.kept), w.scale_type, w.kept, offset);
    if (w.zeros.empty()) return;
    const uint8_t* zeros = w.zeros.data() + group * w.kept;
    for (int64_t i = 0; i < w.kept; ++i) offset[i] = -w.values[zeros[i]];
    std::fill(offset + w.kept, offset + width, 0.0f);
    isa.transpose(offset, width / kChunk, lane_order);
}

// Activations of row n times the scales of a group, in lane order. Memory would idle for as long as the codes of a few rows take
// to arrive, so the first of them are asked for meanwhile.
void fold(const Call& call, const Lanes& lanes, int64_t n, const void* scales, const uint8_t* codes, int64_t bytes) {
    const Weight& w = *call.w;
    const Isa& isa = *call.isa;
    const float* x = call.x.kept + n * call.x.width;
    const bool at_once = isa.fold != nullptr && call.int8 && w.zeros.empty();
    for (int64_t c = 0; c < w.chunks(); c += kFoldChunks) {
        const int64_t first = c * kChunk, count = std::min(kFoldChunks, w.chunks() - c), kept = std::min(count * kChunk, w.kept - first);
        if (n == 0)
            for (int64_t i = c / kFoldChunks * kFoldBytes, stop = std::min(i + kFoldBytes, bytes); i < stop; i += 64) prefetch(codes + i);
        const char* from = at(scales, w.scale_type, first);
        if (at_once && kept == count * kChunk) {
            const int64_t to = n * w.chunks() + c;
            isa.fold(x + first, from, w.scale_type, count, w.bits, lanes.a + to * kChunk, lanes.a_scale + to * kLanes, lanes.x_sum + to * kLanes);
            continue;
        }
        float scaled[kFoldChunks * kChunk];
        isa.to_float(from, w.scale_type, kept, scaled);
        for (int64_t i = 0; i < kept; ++i) scaled[i] *= x[first + i];
        std::fill(scaled + kept, scaled + count * kChunk, 0.0f);
        fill(lanes, w, isa, scaled, n, call.int8, c, count);
    }
}

// Blocks of output channels: the scales of the group are folded into its activations, the rest is a plain dot product.
void task_along_out(const Call& call, int64_t index, int worker) {
    const Weight& w = *call.w;
    const int64_t group = index / call.tasks_per_block, part = index % call.tasks_per_block;
    const int64_t begin = group * w.block, end = std::min(begin + w.block, w.rows);
    const int64_t first = begin + part * call.rows_per_task, last = std::min(first + call.rows_per_task, end);
    if (first >= last) return;
    const int64_t width = call.x.width, chunks = w.chunks();
    float* memory = call.scratch(worker);
    float *offset = memory, *zero = offset + width, *shift = zero + width;
    float* sums = shift + aligned(call.batch);
    const Lanes lanes(sums + call.batch * sums_stride(w), call.batch, chunks);
    float* rest = sums + call.batch * sums_stride(w) + Lanes::floats(call.batch, chunks);
    const void* scales = at(w.scales, w.scale_type, group * w.kept);
    offsets_of(w, *call.isa, group, width, offset, zero);
    for (int64_t n = 0; n < call.batch; ++n) {
        fold(call, lanes, n, scales, w.codes + first * w.stride(), (last - first) * w.stride());
        sum_blocks(w, lanes.x_sum + n * chunks * kLanes, sums + n * sums_stride(w));
        shift[n] = 0.0f;
        if (w.offsets != nullptr) shift[n] = dot(offset, call.x.kept + n * width, w.kept);
        if (!w.zeros.empty()) shift[n] = dot(zero, lanes.x + n * width, width);
    }
    RowJob job = call.job;
    with_lanes(job, lanes, sums);
    run_rows(call, job, first, last, rest);
    if (w.offsets == nullptr && w.zeros.empty()) return;
    for (int64_t n = 0; n < call.batch; ++n)
        for (int64_t row = first; row < last; ++row) job.y[n * job.y_stride + row] += shift[n];
}

int64_t rows_per_task(const Weight& w, int64_t rows, int threads) {
    const int64_t stride = std::max<int64_t>(w.stride(), 1);
    const int64_t bytes = std::clamp(rows * stride / (4 * threads), kLeastTaskBytes, kMostTaskBytes);
    return std::clamp<int64_t>(bytes / stride, 1, std::max<int64_t>(rows, 1));
}

struct DecodeCall {
    const Weight* w;
    const Isa* isa;
    RowJob job;
    int64_t first;
    int64_t last;
    Matrix out;
    int threads;
    int64_t thread_floats;
    float* thread_scratch;
};

// What the worker of a task holds: a row of weights, scales and offsets of its group along out, a row with outliers.
struct DecodeScratch {
    float *weights, *scale, *offset, *full;
    DecodeScratch(const Weight& w, float* memory)
        : weights(memory), scale(weights + aligned(w.kept)), offset(scale + aligned(w.kept)), full(offset + aligned(w.kept)) {}
};

void scales_of(const DecodeCall& call, int64_t group, const DecodeScratch& to) {
    const Weight& w = *call.w;
    call.isa->to_float(at(w.scales, w.scale_type, group * w.kept), w.scale_type, w.kept, to.scale);
    std::fill(to.offset, to.offset + w.kept, 0.0f);
    if (w.offsets != nullptr) call.isa->to_float(at(w.offsets, w.scale_type, group * w.kept), w.scale_type, w.kept, to.offset);
    if (w.zeros.empty()) return;  // they come with one table for all rows
    for (int64_t i = 0; i < w.kept; ++i) to.offset[i] = -to.scale[i] * w.values[w.zeros[static_cast<size_t>(group * w.kept + i)]];
}

void decode_row(const DecodeCall& call, int64_t row, const DecodeScratch& scratch) {
    const Weight& w = *call.w;
    auto [weights, scale, offset, full] = scratch;
    call.isa->weights_of_row(call.job, *call.isa, row, weights);
    if (w.along_out)
        for (int64_t i = 0; i < w.kept; ++i) weights[i] = weights[i] * scale[i] + offset[i];
    const float* result = weights;
    if (!w.other_columns.empty()) {
        const auto p = static_cast<int64_t>(w.other_columns.size());
        for (int64_t i = 0; i < w.kept; ++i) full[w.kept_columns[static_cast<size_t>(i)]] = weights[i];
        float* others = full + aligned(w.columns);
        call.isa->to_float(at(w.outliers, w.outlier_type, row * p), w.outlier_type, p, others);
        for (int64_t i = 0; i < p; ++i) full[w.other_columns[static_cast<size_t>(i)]] = others[i];
        result = full;
    }
    auto* target = static_cast<char*>(call.out.data) + (row - call.first) * call.out.stride * width(call.out.type);
    call.isa->from_float(result, call.out.type, w.columns, target);
}

void decode_task(void* context, int64_t index, int worker) {
    const auto& call = *static_cast<DecodeCall*>(context);
    const int64_t step = rows_per_task(*call.w, call.last - call.first, call.threads);
    const int64_t begin = call.first + index * step, end = std::min(begin + step, call.last);
    const DecodeScratch scratch(*call.w, call.thread_scratch + worker * call.thread_floats);
    for (int64_t row = begin; row < end; ++row) {
        if (call.w->along_out && (row == begin || row % call.w->block == 0)) scales_of(call, row / call.w->block, scratch);
        decode_row(call, row, scratch);
    }
}

}  // namespace

void derive(Weight& w, const float* table, int64_t levels, const uint8_t* packed_zeros, int64_t zero_rows,
            int64_t zero_columns, const int32_t* outlier_columns, int64_t outliers) {
    set_tables(w, table, levels);
    detect_affine(w, table, levels);
    set_lanes(w);
    set_columns(w, outlier_columns, outliers);
    if (packed_zeros == nullptr) return;
    w.zeros.resize(static_cast<size_t>(zero_rows * zero_columns));
    const int64_t stride = (zero_columns * w.bits + 7) / 8;
    for (int64_t row = 0; row < zero_rows; ++row) {
        for (int64_t i = 0; i < zero_columns; ++i) {
            const int64_t bit = i * w.bits;
            const uint8_t* p = packed_zeros + row * stride;
            unsigned word = p[bit >> 3];
            if ((bit >> 3) + 1 < stride) word |= static_cast<unsigned>(p[(bit >> 3) + 1]) << 8;
            w.zeros[static_cast<size_t>(row * zero_columns + i)] =
                static_cast<uint8_t>((word >> (bit & 7)) & ((1u << w.bits) - 1u));
        }
    }
}

namespace {

// The activations of one weight serve another.
bool same_form(const Weight& a, const Weight& b) {
    const bool plain = a.other_columns.empty() && b.other_columns.empty() && a.columns == b.columns;
    const bool lanes = !a.along_out && !b.along_out && a.whole_lanes && b.whole_lanes && a.blocks == b.blocks && a.block == b.block;
    return plain && lanes && (a.bits == 4) == (b.bits == 4) && sums_stride(a) == sums_stride(b);
}

void load_activations(Call& call, const Matrix& x, Scratch& scratch) {
    const Weight& w = *call.w;
    const int64_t chunks = w.chunks(), batch = call.batch;
    call.x.width = chunks * kChunk;
    call.x.kept = scratch.floats(batch * call.x.width);
    call.x.others = scratch.floats(batch * static_cast<int64_t>(w.other_columns.size()));
    float* row = scratch.floats(w.columns);
    for (int64_t n = 0; n < batch; ++n) load(w, *call.isa, x, n, call.x, row);
    if (!w.whole_lanes) call.job.x = call.x.kept;
    if (w.along_out || !w.whole_lanes) return;
    const Lanes lanes(scratch.floats(Lanes::floats(batch, chunks)), batch, chunks);
    call.sums = scratch.floats(batch * sums_stride(w));
    for (int64_t n = 0; n < batch; ++n) {
        fill(lanes, w, *call.isa, call.x.kept + n * call.x.width, n, call.int8, 0, chunks);
        sum_blocks(w, lanes.x_sum + n * chunks * kLanes, call.sums + n * sums_stride(w));
    }
    with_lanes(call.job, lanes, call.sums);
}

void share_activations(Call& call, const Call& from) {
    call.x = from.x;
    call.sums = from.sums;
    call.job.x = from.job.x;
    call.job.a = from.job.a;
    call.job.a_scale = from.job.a_scale;
    call.job.block_sums = from.job.block_sums;
}

void cut_into_tasks(Call& call, int threads, Scratch& scratch) {
    const Weight& w = *call.w;
    const int64_t chunks = w.chunks(), batch = call.batch;
    const auto p = static_cast<int64_t>(w.other_columns.size());
    call.thread_floats = aligned(chunks * kChunk + p);
    if (w.along_out) {
        call.thread_floats += 2 * call.x.width + aligned(batch) + batch * sums_stride(w) + Lanes::floats(batch, chunks);
        const int64_t groups = (w.rows + w.block - 1) / w.block, height = std::min(w.block, w.rows);
        // A group shares its folded activations: cut it only when there are too few groups to go round.
        const int64_t parts = groups >= 2 * threads ? 1 : (4 * threads + groups - 1) / groups;
        call.rows_per_task = std::max<int64_t>((height + parts - 1) / parts, 1);
        call.tasks_per_block = (height + call.rows_per_task - 1) / call.rows_per_task;
        call.tasks = groups * call.tasks_per_block;
    } else {
        call.rows_per_task = rows_per_task(w, w.rows, threads);
        call.tasks = (w.rows + call.rows_per_task - 1) / call.rows_per_task;
    }
    call.thread_scratch = scratch.floats(call.thread_floats * threads);
}

struct Calls {
    Call call[kMostTogether];
    int64_t count;
};

void multiply_task(void* context, int64_t index, int worker) {
    const auto& calls = *static_cast<Calls*>(context);
    const Call* call = calls.call;
    for (; index >= call->tasks; ++call) index -= call->tasks;
    call->w->along_out ? task_along_out(*call, index, worker) : task_along_in(*call, index, worker);
}

Matrix rows_from(const Matrix& m, int64_t n) {
    return {static_cast<char*>(m.data) + n * m.stride * width(m.type), m.type, m.stride};
}

// At most kBatchRows rows of activations.
void multiply_some(const Product* products, int64_t count, const Isa& isa, const Matrix& x, int64_t from, int64_t batch, bool int8, int threads) {
    static thread_local Scratch scratch;
    scratch.reset();
    Calls calls;
    calls.count = count;
    int64_t tasks = 0;
    for (int64_t i = 0; i < count; ++i) {
        Call& call = calls.call[i];
        call = Call{};
        call.w = products[i].weight;
        call.isa = &isa;
        call.batch = batch;
        call.int8 = int8;
        call.job = job_of(*call.w);
        call.job.batch = batch;
        call.job.bias = bias_of(*call.w, isa, int8);
        const Matrix y = rows_from(products[i].y, from);
        const bool direct = y.type == Float::f32;
        call.job.y = direct ? static_cast<float*>(y.data) : scratch.floats(batch * call.w->rows);
        call.job.y_stride = direct ? y.stride : call.w->rows;
        if (i > 0 && same_form(*calls.call[i - 1].w, *call.w)) {
            share_activations(call, calls.call[i - 1]);
        } else {
            load_activations(call, rows_from(x, from), scratch);
        }
        cut_into_tasks(call, threads, scratch);
        tasks += call.tasks;
    }
    run_tasks(threads, tasks, multiply_task, &calls);
    for (int64_t i = 0; i < count; ++i) {
        const Matrix y = rows_from(products[i].y, from);
        if (y.type == Float::f32) continue;
        const Call& call = calls.call[i];
        for (int64_t n = 0; n < batch; ++n)
            isa.from_float(call.job.y + n * call.w->rows, y.type, call.w->rows, rows_from(y, n).data);
    }
}

}  // namespace

void multiply(const Product* products, int64_t count, const Isa& isa, const Matrix& x, int64_t batch, bool int8, int threads) {
    threads = std::clamp(threads, 1, kMaxThreads);
    for (int64_t first = 0; first < count; first += kMostTogether)
        for (int64_t n = 0; n < batch; n += kBatchRows)
            multiply_some(products + first, std::min(kMostTogether, count - first), isa, x, n, std::min(kBatchRows, batch - n), int8, threads);
}

void multiply(const Weight& weight, const Isa& isa, const Matrix& x, const Matrix& y, int64_t batch, bool int8, int threads) {
    const Product product{&weight, y};
    multiply(&product, 1, isa, x, batch, int8, threads);
}

void decode(const Weight& w, const Isa& isa, int64_t first, int64_t last, const Matrix& out, int threads) {
    if (first >= last) return;
    threads = std::clamp(threads, 1, kMaxThreads);
    const auto p = static_cast<int64_t>(w.other_columns.size());
    DecodeCall call{&w, &isa, job_of(w), first, last, out, threads, 3 * aligned(w.kept) + aligned(w.columns) + aligned(p), nullptr};
    static thread_local Scratch scratch;
    scratch.reset();
    call.thread_scratch = scratch.floats(call.thread_floats * threads);
    const int64_t step = rows_per_task(w, last - first, threads);
    run_tasks(threads, (last - first + step - 1) / step, decode_task, &call);
}

uint64_t read(const Isa& isa, const uint8_t* data, int64_t count, int threads) {
    struct Read {
        const Isa* isa;
        const uint8_t* data;
        int64_t count;
        std::atomic<uint64_t> sum{0};
    } call{&isa, data, count};
    const auto task = [](void* context, int64_t index, int) {
        auto& c = *static_cast<Read*>(context);
        const int64_t first = index * kMostTaskBytes;
        c.sum.fetch_xor(c.isa->read(c.data + first, std::min(kMostTaskBytes, c.count - first)), std::memory_order_relaxed);
    };
    run_tasks(std::clamp(threads, 1, kMaxThreads), (count + kMostTaskBytes - 1) / kMostTaskBytes, task, &call);
    return call.sum.load();
}

std::vector<const Isa*> instruction_sets() {
    std::vector<const Isa*> found;
    for (const Isa* isa : {isa_avx512(), isa_avx2(), isa_neon_dot(), isa_neon(), isa_plain()})
        if (isa != nullptr) found.push_back(isa);
    return found;
}

}  // namespace fracbit
