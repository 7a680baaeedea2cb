// Checks and derives the parts of a packed weight: weight.h says what they are.
#include "weight.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "checks.h"

namespace fracbit {
namespace {

constexpr int64_t kMostChannels = (int64_t{1} << 31) - 1;  // lane positions are 32-bit
constexpr int64_t kMostBlock = int64_t{1} << 62;           // sums of a block and a size must not overflow
constexpr double kAffineTolerance = 2e-7;  // of the range of a table: evenly spaced numbers that were rounded to fp32

int64_t blocks_in(int64_t length, int64_t size) { return length / size + (length % size != 0); }

void set_lanes(Weight& w) {
    BlockLayout& blocks = w.blocks;
    blocks.whole_lanes = blocks.along_out || (!blocks.flat && (blocks.size % kLaneInputs == 0 || blocks.count == 1));
    const bool one_scale = blocks.along_out || !blocks.whole_lanes || blocks.count == 1;
    blocks.period = one_scale ? 0 : std::min(blocks.size / kLaneInputs, w.chunks());
    blocks.lane.resize(static_cast<size_t>(blocks.period * kLanes));
    for (size_t i = 0; i < blocks.lane.size(); ++i)
        blocks.lane[i] = static_cast<int32_t>(static_cast<int64_t>(i) * kLaneInputs / blocks.size);
}

// Row `row` of the table in 15 bits: the largest magnitude takes the whole range.
void split_row(StoredTable& to, int64_t row, int64_t width) {
    const float* values = to.values.data() + row * width;
    float top = 0.0f;
    for (int64_t i = 0; i < width; ++i) top = std::max(top, std::fabs(values[i]));
    const float step = top > 0 && std::isfinite(top) ? top / static_cast<float>(kSplitMost) : 1.0f;
    to.steps[static_cast<size_t>(row)] = step;
    for (int64_t i = 0; i < width; ++i) {
        const float scaled = std::isfinite(values[i]) ? values[i] / step : 0.0f;
        const float clipped = std::clamp(scaled, -static_cast<float>(kSplitBias), static_cast<float>(kSplitMost));
        const int q = static_cast<int>(std::lround(clipped)) + kSplitBias;
        to.high[static_cast<size_t>(row * width + i)] = static_cast<uint8_t>(q >> kLowBits);
        to.low[static_cast<size_t>(row * width + i)] = static_cast<uint8_t>(q & (kHighBias - 1));
    }
}

void detect_affine(StoredTable& to, const float* table, int64_t levels) {
    if (to.rows != 1 || levels < 2) return;
    const double first = table[0], range = static_cast<double>(table[levels - 1]) - first;
    const double step = range / static_cast<double>(levels - 1);
    if (!(step > 0) || !std::isfinite(step)) return;
    for (int64_t i = 0; i < levels; ++i)
        if (std::fabs(first + step * static_cast<double>(i) - table[i]) > kAffineTolerance * std::fabs(range)) return;
    to.affine = true;
    to.steps[0] = static_cast<float>(step);
    to.constant = static_cast<float>(first / step);
}

}  // namespace

int64_t Weight::derived_bytes() const {
    const size_t bytes = scales.zeros.size() + table.high.size() + table.low.size();
    const size_t floats = table.values.size() + table.steps.size();
    const size_t integers = blocks.lane.size() + outliers.coded.size() + outliers.columns.size();
    return static_cast<int64_t>(bytes + sizeof(float) * floats + sizeof(int32_t) * integers);
}

void set_size(Weight& w, int64_t rows, int64_t columns, int64_t bits, int64_t outliers) {
    w.rows = in_range(rows, "rows", kMostChannels);
    w.columns = in_range(columns, "columns", kMostChannels);
    w.bits = static_cast<int>(in_range(bits, "bits", 8));
    w.coded = w.columns - outliers;
    if (w.coded < 1) refuse("every column is an outlier: nothing is quantized");
}

std::vector<int64_t> set_blocks(Weight& w, const std::string& kind, int64_t block) {
    in_range(block, "block", kMostBlock);
    BlockLayout& blocks = w.blocks;
    std::vector<int64_t> stored;
    if (kind == "in") {
        blocks.size = std::min(block, w.coded);
        blocks.count = blocks.stride = blocks_in(w.coded, blocks.size);
        stored = {w.rows, blocks.count};
    } else if (kind == "out") {
        blocks.along_out = true;
        blocks.size = std::min(block, w.rows);
        blocks.count = blocks_in(w.rows, blocks.size);
        stored = {blocks.count, w.coded};
    } else if (kind == "tensor") {
        blocks.size = w.coded;
        blocks.count = 1;
        stored = {1, 1};
    } else if (kind == "flat") {
        blocks.size = std::min(block, w.rows * w.coded);
        blocks.flat = w.coded % blocks.size != 0;  // otherwise no block crosses rows, and the scales of a row lie together
        if (!blocks.flat) blocks.stride = w.coded / blocks.size;
        blocks.count = blocks.flat ? w.coded / blocks.size + 2 : blocks.stride;
        stored = {blocks_in(w.rows * w.coded, blocks.size)};
    } else {
        refuse("blocks must be 'in', 'out', 'tensor' or 'flat', got '" + kind + "'");
    }
    set_lanes(w);
    return stored;
}

void set_table(Weight& w, const float* table, int64_t rows, int64_t levels) {
    if (rows != 1 && rows != w.rows) refuse("table must have 1 row or one per row of the weight");
    if (levels < 1 || levels > (int64_t{1} << w.bits)) refuse("table must have 1 to 2^bits levels, got " + std::to_string(levels));
    const int64_t width = table_width(w.bits);
    StoredTable& to = w.table;
    to.rows = rows;
    to.values.resize(static_cast<size_t>(rows * width));
    to.high.resize(to.values.size());
    to.low.resize(to.values.size());
    to.steps.resize(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < width; ++i)  // codes beyond the last level are its value
            to.values[static_cast<size_t>(row * width + i)] = table[row * levels + std::min(i, levels - 1)];
        split_row(to, row, width);
    }
    detect_affine(to, table, levels);
}

void set_zeros(Weight& w, const uint8_t* packed, int64_t rows, int64_t columns) {
    if (w.table.rows != 1) refuse("zero codes need one table for all rows");
    const int64_t stride = code_bytes(columns, w.bits);
    w.scales.zeros.resize(static_cast<size_t>(rows * columns));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < columns; ++i)
            w.scales.zeros[static_cast<size_t>(row * columns + i)] = static_cast<uint8_t>(code_at(packed + row * stride, stride, w.bits, i));
}

void set_outlier_columns(Weight& w, std::vector<int32_t> columns) {
    if (columns.empty()) return;
    for (size_t i = 0; i < columns.size(); ++i)
        if (columns[i] < 0 || columns[i] >= w.columns || (i > 0 && columns[i] <= columns[i - 1]))
            refuse("outlier columns must ascend and lie in 0.." + std::to_string(w.columns - 1));
    auto next = columns.begin();
    for (int32_t i = 0; i < w.columns; ++i) {
        if (next != columns.end() && *next == i) {
            ++next;
        } else {
            w.outliers.coded.push_back(i);
        }
    }
    w.outliers.columns = std::move(columns);
}

Codes codes_of(const Weight& w) { return {w.codes, w.stride(), w.coded, w.chunks(), w.bits}; }

Table table_of(const Weight& w) {
    const int64_t stride = w.table.rows == 1 ? 0 : table_width(w.bits);
    return {w.table.values.data(), w.table.steps.data(), stride, w.table.affine};
}

SplitTable split_table_of(const Weight& w) { return {w.table.high.data(), w.table.low.data()}; }

Scales scales_along_rows(const Weight& w) {
    if (w.blocks.along_out) return {nullptr, nullptr, nullptr, w.scales.type, 0};
    return {w.scales.values, w.scales.offsets, w.scales.zeros.empty() ? nullptr : w.scales.zeros.data(), w.scales.type, w.blocks.stride};
}

LaneBlocks lane_blocks_of(const Weight& w) {
    return {w.blocks.along_out ? 1 : w.blocks.count, w.blocks.period, w.blocks.lane.data()};
}

DecodeJob decode_job_of(const Weight& w) {
    return {codes_of(w), table_of(w), scales_along_rows(w), {w.blocks.size, w.blocks.flat}};
}

}  // namespace fracbit
