// Scales of a row, straight from where they are stored, 16 blocks at a time: a narrow row has few chunks to pay for whatever is
// done once a row.
#pragma once

#include "floats.h"
#include "jobs.h"

namespace fracbit {
namespace {


inline float scale_at(const Scales& scales, const void* values, int64_t index) {
    float result;
    floats_from(number_at(values, scales.type, index), scales.type, 1, &result);
    return result;
}

// `count` scales, at most 16, then zeros.
template <class S, Float type>
FRACBIT_INLINE typename S::Floats scales_as(const void* values, int64_t index, int64_t count) {
    const char* from = number_at(values, type, index);
    return count >= kLanes ? S::template load_as<type>(from) : S::template load_part<type>(from, count);
}

template <class S>
FRACBIT_INLINE typename S::Floats scales_at(const Scales& scales, const void* values, int64_t index, int64_t count) {
    if (scales.type == Float::f16) return scales_as<S, Float::f16>(values, index, count);
    if (scales.type == Float::bf16) return scales_as<S, Float::bf16>(values, index, count);
    return scales_as<S, Float::f32>(values, index, count);
}

// What a unit of activation adds in 16 blocks whatever the codes are, in steps: constants and offsets.
template <class S>
FRACBIT_INLINE typename S::Floats shifts_at(const RowJob& job, const typename S::Floats& sixteen, float per_step, int64_t index, int64_t count) {
    typename S::Floats shift = S::multiply(sixteen, S::all(job.bias));
    if (job.scales.offsets != nullptr)
        shift = S::fma(scales_at<S>(job.scales, job.scales.offsets, index, count), S::all(per_step), shift);
    if (job.scales.zeros != nullptr) {
        float zero[kLanes] = {};
        for (int64_t i = 0; i < count; ++i) zero[i] = -per_step * job.table.values[job.scales.zeros[index + i]];
        shift = S::fma(sixteen, S::load(zero), shift);
    }
    return shift;
}

// The scales of 16 blocks of a row from `block` on. What those blocks add whatever the codes are goes to the sums.
template <class S, int batch>
FRACBIT_INLINE typename S::Floats next_scales(const RowJob& job, int64_t row, int64_t block, float per_step, const float* block_sums,
                                              typename S::Floats (&sum)[batch]) {
    const int64_t index = row * job.scales.stride + block, left = job.lanes.blocks - block, count = left < kLanes ? left : kLanes;
    const typename S::Floats sixteen = scales_at<S>(job.scales, job.scales.values, index, count);
    const typename S::Floats shift = shifts_at<S>(job, sixteen, per_step, index, count);
    for (int n = 0; n < batch; ++n) sum[n] = S::fma(shift, S::load(block_sums + n * job.sums.stride + block), sum[n]);
    return sixteen;
}

// The one scale of a row, and what it adds whatever the codes are.
struct RowScale {
    float scale = 1.0f, shift = 0.0f;
};

FRACBIT_INLINE RowScale row_scale(const RowJob& job, int64_t row, float per_step) {
    const Scales& scales = job.scales;
    const int64_t index = row * scales.stride;
    RowScale found;
    if (scales.values != nullptr) found.scale = scale_at(scales, scales.values, index);
    found.shift = found.scale * job.bias;
    if (scales.offsets != nullptr) found.shift += scale_at(scales, scales.offsets, index) * per_step;
    if (scales.zeros != nullptr) found.shift -= found.scale * job.table.values[scales.zeros[index]] * per_step;
    return found;
}

// Scales are needed at once, and a row of them is too short for a hardware prefetcher. Only a hint, which may lead beyond the last row.
FRACBIT_INLINE void prefetch_scales(const RowJob& job, int64_t row) {
    const int64_t width = size_of(job.scales.type);
    const auto first = reinterpret_cast<uintptr_t>(job.scales.values) + static_cast<uintptr_t>(row * job.scales.stride * width);
    for (int64_t i = 0; i < job.lanes.blocks * width; i += kCacheLine)
        FRACBIT_PREFETCH(reinterpret_cast<const void*>(first + static_cast<uintptr_t>(i)), 1);
}

}  // namespace
}  // namespace fracbit
