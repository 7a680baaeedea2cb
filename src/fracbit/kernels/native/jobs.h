// What the kernels of an instruction set are given: parts of a packed weight, activations, and where results go. Every job has the
// parts that its kernel reads and no others. Pointers are trusted here; python_*.cpp checks what comes from Python.
#pragma once

#include "layout.h"

namespace fracbit {

// --- parts of a weight -------------------------------------------------------------------------------------------------

// Codes [rows, stride]: dense little-endian bit streams, one a row.
struct Codes {
    const uint8_t* data;
    int64_t stride;  // bytes from row to row
    int64_t coded;    // codes of a row
    int64_t chunks;  // chunks of a row, the last one padded
    int bits;

    FRACBIT_INLINE const uint8_t* row(int64_t index) const { return data + index * stride; }
};

// The values of the data type, [table rows, table_width].
struct Table {
    const float* values;
    const float* steps;  // [table rows]: the unit in which codes, or halves of values, are integers
    int64_t stride;      // values from the table of one row to that of the next; 0: all rows share one
    bool affine;         // value = step * (code + constant): no look-up is needed

    FRACBIT_INLINE const float* row(int64_t index) const { return values + index * stride; }
    FRACBIT_INLINE float step(int64_t row) const { return steps[stride == 0 ? 0 : row]; }
};

// The same values as two bytes each, laid out like the table: value = step * (128 * (high - 128) + low).
struct SplitTable {
    const uint8_t* high;
    const uint8_t* low;
};

// Scales of blocks along the rows: block b of a row is at row * stride + b. `values` is null where the scales are in the
// activations already.
struct Scales {
    const void* values;
    const void* offsets;   // of the same type, or null
    const uint8_t* zeros;  // zero codes, a byte each, or null; they come with one table for all rows
    Float type;
    int64_t stride;
};

// Where a lane finds its scale. `period` chunks together have 16 blocks, whatever the block: one load of scales. Lane d of chunk c
// has the scale of block 16 * (c / period) + lane[c % period, d]. A period of 0: the row has one scale.
struct LaneBlocks {
    int64_t blocks;       // of a row
    int64_t period;
    const int32_t* lane;  // [period, 16]
};

// Where any weight finds its scale, in blocks that may cut lanes.
struct Blocks {
    int64_t size;
    bool flat;  // blocks run on from row to row, and scales are counted from the first row
};

// --- activations and results -------------------------------------------------------------------------------------------

// Sums of the activations of every block, then zeros: what constants and offsets are multiplied by.
struct BlockSums {
    float* data;  // [batch, stride]
    int64_t stride;
};

// Activations of whole chunks that were rounded to 8 bits, with a scale for every lane.
struct RoundedLanes {
    int8_t* a;     // [chunks, 2, 16, 4]: two vectors a chunk, in the order in which codes are unpacked
    float* scale;  // [chunks, 16]
    float* sum;    // [chunks, 16]: sums of a lane's rounded activations

    FRACBIT_INLINE RoundedLanes from(int64_t chunk) const { return {a + chunk * kChunk, scale + chunk * kLanes, sum + chunk * kLanes}; }
};

// fp32 results [batch, rows].
struct Results {
    float* data;
    int64_t stride;  // from one row of activations to the next

    FRACBIT_INLINE float& at(int64_t n, int64_t row) const { return data[n * stride + row]; }
};

// --- jobs --------------------------------------------------------------------------------------------------------------

// Rows of codes times rows of activations, blocks of whole lanes: what both kinds of activations have in common.
struct RowJob {
    Codes codes;
    Table table;
    Scales scales;
    LaneBlocks lanes;
    BlockSums sums;
    float bias;  // the constant part of a code's value, in steps
    int64_t batch;
    Results y;
};

struct FloatJob {
    RowJob rows;
    const float* x;  // [batch, chunks, 8, 16]
};

struct Int8Job {
    RowJob rows;
    SplitTable split;
    const int8_t* a;       // [batch, chunks, 2, 16, 4]
    const float* a_scale;  // [batch, chunks, 16]
};

// Rows that are decoded to floats.
struct DecodeJob {
    Codes codes;
    Table table;
    Scales scales;
    Blocks blocks;
};

// The product where blocks are not whole lanes: a row is decoded first.
struct DecodedJob {
    DecodeJob rows;
    const float* x;  // [batch, chunks * 128] in natural order
    int64_t batch;
    Results y;
    float* weights;  // [chunks * 128]: room for a decoded row
};

// A float weight [rows, columns] times x [batch, columns].
struct DenseJob {
    const void* weight;
    Float type;
    int64_t rows;
    int64_t columns;
    const float* x;
    int64_t stride;  // of x, from row to row
    int64_t batch;
    Results y;
};

// --- the other parts of a decode step ----------------------------------------------------------------------------------

// What numbers go through one by one: activations of an MLP, and soft caps a tanh(x / a).
enum class Function : int { identity, silu, gelu, gelu_tanh, quick_gelu, relu, relu_squared, sigmoid, cap, clamped };

// `clamped` is a gate: (clamp(up) + 1) g sigmoid(a g), g = min(gate, b), up clamped to b on both sides.
struct Curve {
    Function function = Function::identity;
    float a = 0.0f, b = 0.0f;
};

// Where the heads of every sequence lie: in groups of `per_group`, `step` apart, groups `group_stride` apart.
struct Heads {
    float* data;
    int64_t sequence;  // from one sequence to the next
    int64_t per_group, step, group_stride;

    FRACBIT_INLINE float* at(int64_t n, int64_t head) const {
        return data + n * sequence + head / per_group * group_stride + head % per_group * step;
    }
};

constexpr int64_t kHeadsTogether = 4;  // heads whose scores are held at a time

// Attention of one new token per sequence to those that are held. Heads in groups share keys and values.
struct Attention {
    Heads queries;
    const void* keys;    // tokens [head] of every head of every sequence
    const void* values;
    Float type;
    int64_t sequence, kv;  // numbers from one sequence, and one key head, to the next
    int64_t group;
    int64_t head;
    int64_t room;          // of `biases`
    int64_t tokens;        // held, the new one included
    const int64_t* pads;   // [batch]: positions at the start that count for nothing
    int64_t window;        // the newest tokens that are seen; 0: all
    float scale;
    float cap;             // soft cap of the scores; 0: none
    const float* biases;   // [heads, room] by position, added to the scores, or null
    const float* sinks;    // [heads]: a score that takes part in the softmax and has no value, or null
    float* out;            // [batch, heads x head]
    int64_t out_stride;    // from one sequence to the next
    int64_t scores;        // from the scores of one head to those of the next, at least `tokens`
};

}  // namespace fracbit
