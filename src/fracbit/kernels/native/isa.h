// What a processor must offer to multiply packed codes, and the job it is given.
//
// A row of codes is read in chunks of 128. A chunk has 16 lanes of 8 consecutive inputs: lane d holds inputs 8d .. 8d + 7,
// which is one 32-bit word of 4-bit codes. Blocks of weights are whole lanes, so a scale is a number per lane and never cuts
// a sum. Activations are brought into lane order once per call; the packed codes stay as they lie on disk.
#pragma once

#include <cstdint>

namespace fracbit {

constexpr int64_t kChunk = 128;      // weights read at a time
constexpr int64_t kLanes = 16;       // sums kept apart inside a chunk
constexpr int64_t kLowBits = 7;      // a table value is 128 * (high - 128) + low in units of a step: 15 bits
constexpr int64_t kMaxBatch = 4;     // activation rows that share one reading of the codes
constexpr int64_t kAhead = 8192;     // bytes of codes asked for before they are needed
constexpr int64_t kBatchRows = 32;   // activation rows of a job

constexpr int kTableBits = 5;        // the float path looks up to here, and converts integers beyond

inline bool uses_numbers(bool affine, int bits) { return affine && bits > kTableBits; }

// Entries of a table: every code of that width points inside, and a vector of 16 can be loaded.
inline int64_t table_width(int bits) { return bits < 4 ? 16 : int64_t{1} << bits; }

// Only a hint: it may lead beyond the last row. Into the second-level cache, the first is too small for what is on its way.
static inline void prefetch(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#else
    (void)p;
#endif
}

enum class Float : int { f32 = 0, f16 = 1, bf16 = 2 };

// Rows of a weight times `batch` rows of activations.
struct RowJob {
    // Codes: uint8 [rows, stride], dense little-endian bit streams.
    const uint8_t* codes;
    int64_t stride;
    int64_t chunks;
    int bits;
    bool affine;  // value = step * code + constant: no table is needed

    // Table of the data type, [table rows, table_width]; table_stride is 0 when all rows share one.
    const float* values;
    const uint8_t* high;
    const uint8_t* low;
    const float* steps;  // [table rows]
    int64_t table_stride;

    // Scales along the row: element (row, block) at row * scale_stride + block. Null: the scales are in the activations.
    const void* scales;
    const void* offsets;   // of the same type, or null
    const uint8_t* zeros;  // zero codes, one byte each, or null
    Float scale_type;
    int64_t scale_stride;
    int64_t blocks;
    int64_t block;
    bool flat;             // blocks run on from row to row (multiply_weights only)
    int64_t kept;
    // `period` chunks together have 16 blocks, whatever the block: one load of scales. Lane d of chunk c finds its own at
    // 16 * (c / period) + lane[c % period, d]. A period of 0: the row has one scale.
    int64_t period;
    const int32_t* lane;   // [period, 16]

    // Activations in lane order.
    int64_t batch;
    const int8_t* a;       // [batch, chunks, 2, 16, 4]
    const float* a_scale;  // [batch, chunks, 16]
    const float* x;        // [batch, chunks, 8, 16]
    const float* block_sums;  // [batch, sums_stride]: sums of the activations, rounded where a is used; then zeros
    int64_t sums_stride;
    float bias;            // the constant part of a code's value, in steps

    float* y;              // element (n, row) at n * y_stride + row
    int64_t y_stride;
    float* scratch;        // [chunks * 128], for multiply_weights
};

// Attention of one new token per sequence to all that are held. Heads in groups share keys and values.
struct Attention {
    const float* queries;  // [batch, kv_heads, group, head]
    const void* keys;      // [batch, kv_heads, room, head]
    const void* values;
    Float type;
    int64_t kv_heads;
    int64_t group;
    int64_t head;
    int64_t room;
    int64_t tokens;        // held, the new one included
    const int64_t* pads;   // [batch]: positions at the start that count for nothing
    float scale;
    float* out;            // as the queries
};

inline int64_t attention_floats(const Attention& job) { return job.tokens; }

struct Isa {
    const char* name;
    bool biased;  // the integer dot product takes `high` as unsigned and leaves its bias of 128 in the sum
    // natural [chunks * 128] -> [chunks, 8, 16]
    void (*transpose)(const float* natural, int64_t chunks, float* lanes);
    // x [chunks, 8, 16] -> x rounded, a, a_scale, x_sum [chunks, 16]
    void (*quantize)(float* x, int64_t chunks, int bits, int8_t* a, float* a_scale, float* x_sum);
    // The three at once, natural [chunks * 128] times scales of a type, x itself not kept; null where it would save nothing.
    void (*fold)(const float* natural, const void* scales, Float type, int64_t chunks, int bits, int8_t* a, float* a_scale, float* x_sum);
    void (*lane_sums)(const float* x, int64_t chunks, float* x_sum);
    void (*to_float)(const void* from, Float type, int64_t count, float* to);
    void (*from_float)(const float* from, Float type, int64_t count, void* to);
    void (*multiply_int8)(const RowJob& job, int64_t first, int64_t last);
    void (*multiply_float)(const RowJob& job, int64_t first, int64_t last);
    void (*multiply_weights)(const RowJob& job, const Isa& isa, int64_t first, int64_t last);
    // Weights of a row in natural order, [kept]; without scales when job.scales is null.
    void (*weights_of_row)(const RowJob& job, const Isa& isa, int64_t row, float* out);
    // Read bytes and do nothing else: what a kernel can at best reach.
    uint64_t (*read)(const uint8_t* data, int64_t count);
    // Table values of a row in natural order, [kept].
    void (*look_up)(const uint8_t* codes, int64_t stride, int bits, const float* values, int64_t kept, float* out);
    // What a decode step does besides: see step_kernel.h.
    void (*multiply_dense)(const void* weight, Float type, int64_t rows, int64_t columns, int64_t first, int64_t last, const float* x,
                           int64_t batch, float* y);
    void (*normalize)(const float* x, const float* gain, float epsilon, int64_t count, float* out);
    void (*gate)(float* gate, const float* up, int64_t count);
    void (*attend)(const Attention& job, int64_t n, int64_t kv, float* scores);
};

// The table of instruction sets, best first; null where this build or this processor lacks one.
const Isa* isa_avx512();
const Isa* isa_avx2();
const Isa* isa_neon_dot();
const Isa* isa_neon();
const Isa* isa_plain();

}  // namespace fracbit
