// Activations in lane order and rounded to 8 bits: the definition, in plain C++. An instruction set may replace any of it by
// something faster that gives the same numbers.
#pragma once

#include "floats.h"
#include "jobs.h"

namespace fracbit {
namespace {

// Order of the eight inputs of a lane in the two byte vectors that codes are unpacked to. Nibbles come as even and odd codes.
constexpr int kNatural[kLaneInputs] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr int kNibbles[kLaneInputs] = {0, 2, 4, 6, 1, 3, 5, 7};
inline const int* order_of(int bits) { return bits == 4 ? kNibbles : kNatural; }

constexpr float kByteMost = 127.0f;  // the largest rounded activation; -128 is not used
// Lanes of smaller activations count as zero: 127 / top must be finite.
constexpr float kLeastTop = 1e-30f;

// natural [chunks * 128] -> lanes [chunks, 8, 16]
inline void transpose_lanes(const float* natural, int64_t chunks, float* lanes) {
    for (int64_t c = 0; c < chunks; ++c)
        for (int64_t j = 0; j < kLaneInputs; ++j)
            for (int64_t d = 0; d < kLanes; ++d) lanes[c * kChunk + j * kLanes + d] = natural[c * kChunk + kLaneInputs * d + j];
}

// x [chunks, 8, 16] -> sums [chunks, 16]
inline void sum_lanes(const float* x, int64_t chunks, float* sums) {
    for (int64_t c = 0; c < chunks; ++c) {
        for (int64_t d = 0; d < kLanes; ++d) sums[c * kLanes + d] = 0.0f;
        for (int64_t j = 0; j < kLaneInputs; ++j)
            for (int64_t d = 0; d < kLanes; ++d) sums[c * kLanes + d] += x[c * kChunk + j * kLanes + d];
    }
}

// The scales of the lanes of a chunk, and their inverses. A lane of zeros has scale 0. A lane with NaN or Inf has scale NaN, so that
// the result shows it instead of hiding it.
inline void lane_scales(const float* chunk, float* scale, float* inverse) {
    float top[kLanes], poison[kLanes];
    for (int d = 0; d < kLanes; ++d) top[d] = 0.0f;
    for (int d = 0; d < kLanes; ++d) poison[d] = 0.0f;
    for (int j = 0; j < kLaneInputs; ++j)
        for (int d = 0; d < kLanes; ++d) {
            const float value = chunk[j * kLanes + d];
            const float magnitude = value < 0 ? -value : value;
            top[d] = magnitude > top[d] ? magnitude : top[d];
            poison[d] += value * 0.0f;  // 0, or NaN when value is NaN or Inf
        }
    for (int d = 0; d < kLanes; ++d) {
        inverse[d] = top[d] >= kLeastTop && poison[d] == 0.0f ? kByteMost / top[d] : 0.0f;
        scale[d] = top[d] >= kLeastTop ? top[d] * (1.0f / kByteMost) : 0.0f;
        scale[d] += poison[d];
    }
}

// Four planes of a chunk to a vector of bytes, four bytes a lane. The planes get the rounded activations; `sum` grows by the bytes.
inline void round_planes(float* chunk, const int* order, const float* scale, const float* inverse, int8_t* a, int32_t* sum) {
    int32_t word[kLanes] = {};
    for (int j = 0; j < 4; ++j) {
        float* plane = chunk + order[j] * kLanes;
        for (int d = 0; d < kLanes; ++d) {
            const float shifted = (inverse[d] != 0.0f ? plane[d] * inverse[d] : 0.0f) + kRounder;
            const int32_t q = static_cast<int32_t>(bits_of(shifted)) - kRounderBits;
            plane[d] = static_cast<float>(q) * scale[d];
            sum[d] += q;
            word[d] |= static_cast<int32_t>(static_cast<uint32_t>(q & 255) << (8 * j));
        }
    }
    std::memcpy(a, word, sizeof word);
}

// Rounds the eight activations of every lane to 8 bits with one scale.
//
// `x` is replaced by the rounded activations, so that offsets, which multiply sums of activations, see the same numbers as the
// codes: otherwise a large offset that codes cancel would leave the rounding error of the activations behind.
inline void quantize_lanes(float* x, int64_t chunks, int bits, const RoundedLanes& to) {
    const int* order = order_of(bits);
    for (int64_t c = 0; c < chunks; ++c) {
        const RoundedLanes here = to.from(c);
        float inverse[kLanes];
        int32_t sum[kLanes] = {};
        lane_scales(x + c * kChunk, here.scale, inverse);
        round_planes(x + c * kChunk, order, here.scale, inverse, here.a, sum);
        round_planes(x + c * kChunk, order + 4, here.scale, inverse, here.a + kChunk / 2, sum);
        for (int d = 0; d < kLanes; ++d) here.sum[d] = static_cast<float>(sum[d]) * here.scale[d];
    }
}

}  // namespace
}  // namespace fracbit
