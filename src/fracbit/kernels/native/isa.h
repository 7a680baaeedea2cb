// An instruction set, as a table of functions. A file for each (avx512, avx2, neon, neon_dot, plain) is compiled with flags of its
// own, and a process chooses one of those that its processor can run.
#pragma once

#include <vector>

#include "jobs.h"

namespace fracbit {

struct Isa {
    const char* name;
    bool biased;  // products of bytes take `high` as unsigned and leave its bias of 128 in the sum

    // Activations into lane order. natural [chunks * 128] -> [chunks, 8, 16]
    void (*transpose)(const float* natural, int64_t chunks, float* lanes);
    // Rounds x [chunks, 8, 16] in place and as bytes.
    void (*quantize)(float* x, int64_t chunks, int bits, const RoundedLanes& to);
    // Both at once, of natural [chunks * 128] times scales of a type, without keeping x. Null where it would save nothing.
    void (*fold)(const float* natural, const void* scales, Float type, int64_t chunks, int bits, const RoundedLanes& to);
    void (*lane_sums)(const float* x, int64_t chunks, float* sums);

    void (*to_float)(const void* from, Float type, int64_t count, float* to);
    void (*from_float)(const float* from, Float type, int64_t count, void* to);

    // Products of the rows [first, last).
    void (*multiply_int8)(const Int8Job& job, int64_t first, int64_t last);
    void (*multiply_float)(const FloatJob& job, int64_t first, int64_t last);
    void (*multiply_decoded)(const DecodedJob& job, const Isa& isa, int64_t first, int64_t last);

    // Weights of a row in natural order, [coded]; without scales where they are null.
    void (*weights_of_row)(const DecodeJob& job, const Isa& isa, int64_t row, float* out);
    // Table values of a row in natural order, [coded].
    void (*look_up)(const Codes& codes, int64_t row, const float* values, float* out);

    // Read bytes and do nothing else.
    uint64_t (*read)(const uint8_t* data, int64_t count);

    // The other parts of a decode step: see step_kernel.h.
    void (*multiply_dense)(const DenseJob& job, int64_t first, int64_t last);
    // `centered`: the mean is taken off first. `gain` and `bias` [count] may be null.
    void (*normalize)(const float* x, const float* gain, const float* bias, float epsilon, bool centered, int64_t count, float* out);
    void (*apply)(const Curve& curve, float* x, int64_t count);
    void (*gate)(const Curve& curve, float* gate, const float* up, int64_t count);  // gate = curve(gate) * up
    void (*rotate)(float* head, const float* cosines, const float* sines, int64_t count);
    // `heads` heads of sequence n that share keys and values; scores: room for kHeadsTogether times `job.scores` floats.
    void (*attend)(const Attention& job, int64_t n, int64_t head, int64_t heads, float* scores);
};

// Null where this build or this processor lacks the instruction set.
const Isa* isa_avx512();
const Isa* isa_avx2();
const Isa* isa_neon_dot();
const Isa* isa_neon();
const Isa* isa_plain();

// Those that this process can run, best first; plain C++ always can.
std::vector<const Isa*> instruction_sets();

// The one that runs where none is named: the first, unless another was chosen.
const Isa& chosen_isa();
void choose_isa(const Isa& isa);

}  // namespace fracbit
