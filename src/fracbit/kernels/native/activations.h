// Activations of a product, made ready for the kernels: as floats, split into quantized and outlier columns, in lane order, rounded.
//
// Along in, all rows of a weight share them; so do other weights of the same form. Along out, the scales of every group of rows are
// folded into them, once per group.
#pragma once

#include "matrix.h"
#include "scratch.h"
#include "weight.h"

namespace fracbit {

// What the row kernel reads.
struct LaneActivations {
    float* x;              // [batch, chunks, 8, 16]
    RoundedLanes rounded;  // of batch * chunks chunks. Exact products take only `sum`, of exact activations
    BlockSums sums;

    LaneActivations() = default;
    LaneActivations(float* memory, const Weight& weight, int64_t batch);
    static int64_t floats(const Weight& weight, int64_t batch);  // that it takes
};

struct Activations {
    int64_t batch = 0;
    bool int8 = false;
    int64_t width = 0;          // a row of `coded`, padded with zeros to whole chunks
    float* coded = nullptr;      // [batch, width] in natural order
    float* outliers = nullptr;  // [batch, outlier columns]
    LaneActivations lanes{};    // empty along out, and where blocks are not whole lanes

    const float* row(int64_t n) const { return coded + n * width; }
};

Activations load(const Weight& weight, const Isa& isa, const Matrix& x, int64_t batch, bool int8, Scratch& scratch);

// Whether activations that were loaded for one weight serve another.
bool same_form(const Weight& a, const Weight& b);

// A stretch of memory that will be needed soon.
struct Upcoming {
    const uint8_t* data;
    int64_t bytes;
};

// Row n of the activations times the scales of a group of rows, into `to`; meanwhile asks for the codes that come next.
void fold(const Weight& weight, const Isa& isa, const Activations& x, int64_t n, int64_t group, const LaneActivations& to, Upcoming codes);

}  // namespace fracbit
