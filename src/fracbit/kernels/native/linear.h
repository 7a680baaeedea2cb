// y = x W^T for a packed W: what is held for a weight, and the calls on it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "isa.h"

namespace fracbit {

// A packed weight. Pointers belong to the caller, vectors were derived when the weight was made.
struct Weight {
    int64_t rows = 0;     // output channels
    int64_t columns = 0;  // input channels
    int64_t kept = 0;     // input channels that are quantized
    int bits = 0;
    const uint8_t* codes = nullptr;  // [rows, ceil(kept * bits / 8)]

    bool along_out = false;  // blocks of output channels: scales [blocks, kept]
    bool flat = false;       // blocks of the row-major tensor: scales [blocks]
    int64_t block = 0;
    int64_t blocks = 0;        // of a row (along in), or of a column (along out)
    int64_t scale_stride = 0;  // scales from one row of scales to the next
    Float scale_type = Float::f32;
    const void* scales = nullptr;
    const void* offsets = nullptr;
    std::vector<uint8_t> zeros;  // zero codes, one byte each, in the order of the scales

    // Table of the data type, [table rows, table_width].
    int64_t table_rows = 1;
    std::vector<float> values;
    std::vector<uint8_t> high, low;
    std::vector<float> steps;
    bool affine = false;
    float constant = 0;  // affine: value = steps[0] * (code + constant)

    Float outlier_type = Float::f32;
    const void* outliers = nullptr;      // [rows, columns - kept]
    std::vector<int32_t> kept_columns;   // empty: all
    std::vector<int32_t> other_columns;  // those of the outliers

    bool whole_lanes = true;         // every block is a number of lanes
    int64_t period = 0;         // where a lane finds its block: see RowJob
    std::vector<int32_t> lane;

    int64_t stride() const { return (kept * bits + 7) / 8; }
    int64_t chunks() const { return (kept + kChunk - 1) / kChunk; }
};

struct Matrix {
    void* data;
    Float type;
    int64_t stride;  // elements from row to row
};

// Fill in what follows from the pointers and sizes: tables [table_rows, levels], zero codes, lane positions.
void derive(Weight& weight, const float* table, int64_t levels, const uint8_t* packed_zeros, int64_t zero_rows,
            int64_t zero_columns, const int32_t* outlier_columns, int64_t outliers);

// One of several weights that read the same activations, and where its product goes.
struct Product {
    const Weight* weight;
    Matrix y;  // [batch, rows]
};
constexpr int64_t kMostTogether = 4;  // products that are shared out among the threads as one job

// y [batch, rows] = x [batch, columns] W^T for every weight, with activations rounded to 8 bits or as they are. Weights of the
// same form, one after another, share what is derived from the activations.
void multiply(const Product* products, int64_t count, const Isa& isa, const Matrix& x, int64_t batch, bool int8, int threads);
void multiply(const Weight& weight, const Isa& isa, const Matrix& x, const Matrix& y, int64_t batch, bool int8, int threads);

// Rows [first, last) of W, [last - first, columns].
void decode(const Weight& weight, const Isa& isa, int64_t first, int64_t last, const Matrix& out, int threads);

// Read `count` bytes as fast as they come, in the pieces in which codes are read; returns the xor of them.
uint64_t read(const Isa& isa, const uint8_t* data, int64_t count, int threads);

// The instruction sets this process can run, best first.
std::vector<const Isa*> instruction_sets();

}  // namespace fracbit
