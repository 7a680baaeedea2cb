// What the file of an instruction set includes: all kernels over its vector operations `S`, as one table.
#pragma once

#include "isa.h"
#include "read_kernel.h"
#include "row_decode.h"
#include "row_functions.h"
#include "step_kernel.h"

namespace fracbit {
namespace {

// Plain C++ where S has nothing of its own; a file may replace parts of it. Made by the compiler: nothing of it may run before the
// processor was asked whether it can.
template <class S>
constexpr Isa isa_of(const char* name, bool biased) {
    Isa isa{};
    isa.name = name;
    isa.biased = biased;
    isa.transpose = transpose_lanes;
    isa.quantize = quantize_lanes;
    isa.lane_sums = sum_lanes;
    isa.to_float = S::to_float;
    isa.from_float = floats_to;
    isa.multiply_int8 = multiply_int8<S>;
    isa.multiply_float = multiply_float<S>;
    isa.multiply_decoded = multiply_decoded;
    isa.weights_of_row = weights_of_row;
    isa.look_up = look_up_row;
    isa.read = read_bytes;
    isa.multiply_dense = multiply_dense<S>;
    isa.normalize = normalize;
    isa.apply = apply;
    isa.gate = gate_with;
    isa.rotate = rotate;
    isa.attend = attend<S>;
    return isa;
}

}  // namespace
}  // namespace fracbit
