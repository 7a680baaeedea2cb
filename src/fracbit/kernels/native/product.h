// y = x W^T for packed weights: the rows of a weight are cut into tasks, and each task runs the kernel of an instruction set.
#pragma once

#include "matrix.h"
#include "weight.h"

namespace fracbit {

// One of several weights that read the same activations, and where its product goes.
struct Product {
    const Weight* weight;
    Matrix y;  // [batch, rows]
};
constexpr int64_t kMostTogether = 4;  // products that the threads share out as one job

// y [batch, rows] = x [batch, columns] W^T for every weight, with activations rounded to 8 bits or as they are. Weights of the same
// form, one after another, share what is derived from the activations.
void multiply(const Product* products, int64_t count, const Isa& isa, const Matrix& x, int64_t batch, bool int8, int threads);

}  // namespace fracbit
