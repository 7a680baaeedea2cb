// Rows of a packed weight as floats, outliers in their places: for the tiles of a prompt, and for embeddings.
#pragma once

#include "matrix.h"
#include "weight.h"

namespace fracbit {

// Rows [first, last) of W into out [last - first, columns].
void decode(const Weight& weight, const Isa& isa, int64_t first, int64_t last, const Matrix& out, int threads);

}  // namespace fracbit
