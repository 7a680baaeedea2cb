// Loads activations, brings them into lane order, rounds them, and folds scales into them: activations.h says when.
#include "activations.h"

#include <algorithm>
#include <numeric>

#include "floats.h"

namespace fracbit {
namespace {

static_assert(kAlignedFloats % kLanes == 0, "the kernels read the sums of 16 blocks at once");

constexpr int64_t kFoldChunks = 4;       // activations folded at a time: they stay in the first-level cache
constexpr int64_t kFoldBytes = 1 << 12;  // codes asked for meanwhile

// Blocks of a row, padded: the kernels read 16 sums at once.
int64_t sums_stride(const Weight& w) { return aligned(w.blocks.along_out ? 1 : w.blocks.count); }

// Row n of x as floats; `row` is room for one.
void load_row(const Weight& w, const Isa& isa, const Matrix& x, int64_t n, const Activations& to, float* row) {
    float* coded = to.coded + n * to.width;
    std::fill(coded + w.coded, coded + to.width, 0.0f);
    if (w.outliers.columns.empty()) return isa.to_float(x.row(n), x.type, w.coded, coded);
    isa.to_float(x.row(n), x.type, w.columns, row);
    float* outliers = to.outliers + n * w.outliers.count();
    for (const int32_t column : w.outliers.coded) *coded++ = row[column];
    for (const int32_t column : w.outliers.columns) *outliers++ = row[column];
}

// `count` chunks of row n from `first` on, given in natural order, into lane order.
void fill(const Weight& w, const Isa& isa, const float* natural, int64_t n, bool int8, int64_t first, int64_t count, const LaneActivations& to) {
    const int64_t chunk = n * w.chunks() + first;
    float* x = to.x + chunk * kChunk;
    const RoundedLanes rounded = to.rounded.from(chunk);
    isa.transpose(natural, count, x);
    if (int8) {
        isa.quantize(x, count, w.bits, rounded);
    } else {
        isa.lane_sums(x, count, rounded.sum);
    }
}

// Sums of the activations of every block of row n, from those of the lanes.
void sum_blocks(const Weight& w, int64_t n, const LaneActivations& to) {
    const int64_t all = w.chunks() * kLanes;
    const float* lane_sums = to.rounded.sum + n * all;
    float* sums = to.sums.data + n * to.sums.stride;
    std::fill(sums, sums + to.sums.stride, 0.0f);
    if (w.blocks.along_out || w.blocks.count == 1) {
        sums[0] = sum_floats(lane_sums, all);
        return;
    }
    const int64_t lanes = w.blocks.size / kLaneInputs;
    for (int64_t b = 0; b < w.blocks.count; ++b)
        sums[b] = std::accumulate(lane_sums + b * lanes, lane_sums + std::min((b + 1) * lanes, all), 0.0f);
}

}  // namespace

int64_t LaneActivations::floats(const Weight& w, int64_t batch) {
    const int64_t bytes_as_floats = kChunk / static_cast<int64_t>(sizeof(float));
    return batch * (w.chunks() * (kChunk + 2 * kLanes + bytes_as_floats) + sums_stride(w));
}

LaneActivations::LaneActivations(float* memory, const Weight& w, int64_t batch) {
    const int64_t chunks = batch * w.chunks();
    x = memory;
    rounded.sum = x + chunks * kChunk;
    rounded.scale = rounded.sum + chunks * kLanes;
    sums = {rounded.scale + chunks * kLanes, sums_stride(w)};
    rounded.a = reinterpret_cast<int8_t*>(sums.data + batch * sums.stride);
}

Activations load(const Weight& w, const Isa& isa, const Matrix& x, int64_t batch, bool int8, Scratch& scratch) {
    Activations to;
    to.batch = batch;
    to.int8 = int8;
    to.width = w.chunks() * kChunk;
    to.coded = scratch.floats(batch * to.width);
    to.outliers = scratch.floats(batch * w.outliers.count());
    float* row = scratch.floats(w.columns);
    for (int64_t n = 0; n < batch; ++n) load_row(w, isa, x, n, to, row);
    if (w.blocks.along_out || !w.blocks.whole_lanes) return to;
    to.lanes = LaneActivations(scratch.floats(LaneActivations::floats(w, batch)), w, batch);
    for (int64_t n = 0; n < batch; ++n) {
        fill(w, isa, to.row(n), n, int8, 0, w.chunks(), to.lanes);
        sum_blocks(w, n, to.lanes);
    }
    return to;
}

bool same_form(const Weight& a, const Weight& b) {
    const BlockLayout &first = a.blocks, &second = b.blocks;
    const bool columns = a.outliers.columns.empty() && b.outliers.columns.empty() && a.columns == b.columns;
    const bool lanes = !first.along_out && !second.along_out && first.whole_lanes && second.whole_lanes;
    const bool blocks = first.count == second.count && first.size == second.size;
    return columns && lanes && blocks && (a.bits == 4) == (b.bits == 4);  // nibbles have an order of their own
}

void fold(const Weight& w, const Isa& isa, const Activations& x, int64_t n, int64_t group, const LaneActivations& to, Upcoming codes) {
    const Float type = w.scales.type;
    const bool at_once = isa.fold != nullptr && x.int8 && w.scales.zeros.empty();  // zero codes are multiplied by x itself
    for (int64_t c = 0; c < w.chunks(); c += kFoldChunks) {
        const int64_t first = c * kChunk, count = std::min(kFoldChunks, w.chunks() - c), coded = std::min(count * kChunk, w.coded - first);
        if (n == 0) {  // memory would idle for as long as the codes of a few rows take to arrive
            const int64_t begin = c / kFoldChunks * kFoldBytes, end = std::min(begin + kFoldBytes, codes.bytes);
            for (int64_t i = begin; i < end; i += kCacheLine) FRACBIT_PREFETCH(codes.data + i, 2);
        }
        const void* scales = number_at(w.scales_of_group(group), type, first);
        const float* natural = x.row(n) + first;
        if (at_once && coded == count * kChunk) {
            isa.fold(natural, scales, type, count, w.bits, to.rounded.from(n * w.chunks() + c));
            continue;
        }
        float scaled[kFoldChunks * kChunk];
        isa.to_float(scales, type, coded, scaled);
        for (int64_t i = 0; i < coded; ++i) scaled[i] *= natural[i];
        std::fill(scaled + coded, scaled + count * kChunk, 0.0f);
        fill(w, isa, scaled, n, x.int8, c, count, to);
    }
    sum_blocks(w, n, to);
}

}  // namespace fracbit
