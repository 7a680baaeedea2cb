// A packed weight as the kernels hold it: pointers into memory of the caller, and what is derived from them once.
//
// It is filled part by part, in the order of the functions below: each checks what it is given, and throws std::invalid_argument
// that says what does not fit.
#pragma once

#include <string>
#include <vector>

#include "isa.h"

namespace fracbit {

// How blocks of weights share scales.
struct BlockLayout {
    bool along_out = false;  // blocks of output channels: scales [count, coded]
    bool flat = false;       // blocks run on from row to row: scales in one line
    int64_t size = 0;
    int64_t count = 0;   // of a row, or along out of a column; flat: the most that a row can touch
    int64_t stride = 0;  // scales from one row to the next

    bool whole_lanes = true;    // every block of a row is a number of lanes
    int64_t period = 0;         // where lanes find their blocks: see LaneBlocks
    std::vector<int32_t> lane;
};

struct StoredScales {
    Float type = Float::f32;
    const void* values = nullptr;
    const void* offsets = nullptr;  // of the same type, or null
    std::vector<uint8_t> zeros;     // zero codes, a byte each, in the order of the scales; empty: none
};

// The values of the data type, padded to [rows, table_width].
struct StoredTable {
    int64_t rows = 1;  // 1: all rows of the weight share it
    std::vector<float> values;
    std::vector<uint8_t> high, low;  // the values in 15 bits: see SplitTable
    std::vector<float> steps;
    bool affine = false;
    float constant = 0;  // affine: value = steps[0] * (code + constant)
};

// Input channels that are stored as floats instead of codes.
struct Outliers {
    Float type = Float::f32;
    const void* values = nullptr;  // [rows, columns.size()]
    std::vector<int32_t> columns;
    std::vector<int32_t> coded;  // the other columns; empty when there are no outliers

    int64_t count() const { return static_cast<int64_t>(columns.size()); }
    const void* row(int64_t index) const { return number_at(values, type, index * count()); }
};

struct Weight {
    int64_t rows = 0;     // output channels
    int64_t columns = 0;  // input channels
    int64_t coded = 0;     // input channels that are quantized
    int bits = 0;
    const uint8_t* codes = nullptr;  // [rows, stride()]
    BlockLayout blocks;
    StoredScales scales;
    StoredTable table;
    Outliers outliers;

    int64_t stride() const { return code_bytes(coded, bits); }
    int64_t chunks() const { return (coded + kChunk - 1) / kChunk; }

    // Scales and offsets of the coded inputs of a group of rows; along out only.
    const void* scales_of_group(int64_t group) const { return number_at(scales.values, scales.type, group * coded); }
    const void* offsets_of_group(int64_t group) const { return number_at(scales.offsets, scales.type, group * coded); }
    const uint8_t* zeros_of_group(int64_t group) const { return scales.zeros.data() + group * coded; }

    // Bytes that were derived, besides the memory of the caller.
    int64_t derived_bytes() const;
};

// --- filling it, in this order -----------------------------------------------------------------------------------------

// `outliers` of the columns are no codes.
void set_size(Weight& weight, int64_t rows, int64_t columns, int64_t bits, int64_t outliers);

// `kind`: "in" and "out" are blocks of `block` channels, "tensor" is one block, "flat" are blocks of the row-major tensor.
// Returns the shape in which scales, offsets and zero codes are stored.
std::vector<int64_t> set_blocks(Weight& weight, const std::string& kind, int64_t block);

// table [rows, levels]; values that are evenly spaced need no look-up.
void set_table(Weight& weight, const float* table, int64_t rows, int64_t levels);

// Packed zero codes [rows, code_bytes(columns)], in the shape of the scales.
void set_zeros(Weight& weight, const uint8_t* packed, int64_t rows, int64_t columns);

// As many columns as set_size was told of.
void set_outlier_columns(Weight& weight, std::vector<int32_t> columns);

// --- parts of it, for jobs ---------------------------------------------------------------------------------------------

Codes codes_of(const Weight& weight);
Table table_of(const Weight& weight);
SplitTable split_table_of(const Weight& weight);
// None along out: there they belong to the activations, or to what is decoded.
Scales scales_along_rows(const Weight& weight);
LaneBlocks lane_blocks_of(const Weight& weight);
DecodeJob decode_job_of(const Weight& weight);

}  // namespace fracbit
