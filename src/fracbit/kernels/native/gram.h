// g += x^T x for bfloat16 x, summed in fp32: the statistics of calibrated quantization.
#pragma once

#include <cstdint>

namespace fracbit {

// Whether this process can run `add_gram`: AVX-512 with BF16 products, and a compiler that knew them.
bool has_gram();

// g [width, width] fp32, symmetric, += x^T x; x [tokens, width] bf16 with `stride` elements from row to row. The order of sums
// depends on the shape alone, not on `threads`.
void add_gram(const uint16_t* x, int64_t stride, int64_t tokens, int64_t width, float* g, int threads);

}  // namespace fracbit
