// From a job to the compiled copy of the row kernel that runs it: one for every width of codes, kind of values, number of scales
// and 1, 2 or 4 rows of activations.
#pragma once

#include "row_kernel.h"

namespace fracbit {
namespace {

template <class Job>
using RowFunction = void (*)(const Job& job, int64_t first, int64_t last, int64_t n0);

// For 1, 2 and 4 rows of activations.
template <class Job>
struct RowFunctions {
    RowFunction<Job> of[3];
};

template <class S, int bits, bool affine, bool single>
constexpr RowFunctions<Int8Job> int8_functions() {
    return {{int8_rows<S, bits, affine, single, 1>, int8_rows<S, bits, affine, single, 2>, int8_rows<S, bits, affine, single, 4>}};
}

template <class S, int bits, bool number, bool single>
constexpr RowFunctions<FloatJob> float_functions() {
    return {{float_rows<S, bits, number, single, 1>, float_rows<S, bits, number, single, 2>, float_rows<S, bits, number, single, 4>}};
}

template <class S, int bits>
RowFunctions<Int8Job> choose_int8(bool affine, bool single) {
    if (affine) return single ? int8_functions<S, bits, true, true>() : int8_functions<S, bits, true, false>();
    return single ? int8_functions<S, bits, false, true>() : int8_functions<S, bits, false, false>();
}

template <class S, int bits>
RowFunctions<FloatJob> choose_float(bool affine, bool single) {
    if constexpr (uses_numbers(true, bits)) {
        if (affine) return single ? float_functions<S, bits, true, true>() : float_functions<S, bits, true, false>();
    }
    return single ? float_functions<S, bits, false, true>() : float_functions<S, bits, false, false>();
}

// Rows of activations in groups of 4, 2 and 1. A task has few enough weights for the next group to find them in the cache.
template <class Job>
void by_groups(const Job& job, const RowFunctions<Job>& functions, int64_t first, int64_t last) {
    for (int64_t n = 0; n < job.rows.batch;) {
        const int64_t left = job.rows.batch - n;
        const int size = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        functions.of[size](job, first, last, n);
        n += int64_t{1} << size;
    }
}

#define FRACBIT_BY_BITS(bits, function, ...)        \
    switch (bits) {                                 \
        case 1: return function<S, 1>(__VA_ARGS__); \
        case 2: return function<S, 2>(__VA_ARGS__); \
        case 3: return function<S, 3>(__VA_ARGS__); \
        case 4: return function<S, 4>(__VA_ARGS__); \
        case 5: return function<S, 5>(__VA_ARGS__); \
        case 6: return function<S, 6>(__VA_ARGS__); \
        case 7: return function<S, 7>(__VA_ARGS__); \
        default: return function<S, 8>(__VA_ARGS__); \
    }

inline bool has_one_scale(const RowJob& job) { return job.lanes.period == 0; }

template <class S>
RowFunctions<Int8Job> int8_by_bits(const RowJob& job) {
    FRACBIT_BY_BITS(job.codes.bits, choose_int8, job.table.affine, has_one_scale(job))
}

template <class S>
RowFunctions<FloatJob> float_by_bits(const RowJob& job) {
    FRACBIT_BY_BITS(job.codes.bits, choose_float, job.table.affine, has_one_scale(job))
}

template <class S>
void multiply_int8(const Int8Job& job, int64_t first, int64_t last) {
    by_groups(job, int8_by_bits<S>(job.rows), first, last);
}

template <class S>
void multiply_float(const FloatJob& job, int64_t first, int64_t last) {
    by_groups(job, float_by_bits<S>(job.rows), first, last);
}

}  // namespace
}  // namespace fracbit
