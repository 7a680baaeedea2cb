// A matrix of the caller, of any float type: activations that are read, results that are written.
#pragma once

#include "layout.h"

namespace fracbit {

struct Matrix {
    void* data;
    Float type;
    int64_t stride;  // elements from row to row

    void* row(int64_t index) const { return number_at(data, type, index * stride); }
    Matrix from_row(int64_t index) const { return {row(index), type, stride}; }
};

}  // namespace fracbit
