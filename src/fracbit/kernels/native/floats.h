// Conversions between fp32 and the 16-bit float types, a number at a time: the definition, and what instruction sets without
// conversions of their own run.
#pragma once

#include <cstring>

#include "layout.h"

namespace fracbit {
namespace {

constexpr uint32_t kFloatInfinity = 0x7f800000u;  // of the bits of a float; larger magnitudes are NaN
constexpr uint32_t kHalfInfinity = 0x7c00u;
constexpr uint32_t kLeastNormalHalf = 0x0400u;                 // 2^-14
constexpr uint32_t kLeastNormalHalfAsFloat = 0x38800000u;      // the same as a float
constexpr uint32_t kHalfOverflow = 0x477ff000u;                // 65520: it and larger floats round to 65536, which is infinity
constexpr uint32_t kExponentShift = uint32_t{127 - 15} << 23;  // from the exponent of a half to that of a float
constexpr float kHalfUnit = 5.9604644775390625e-8f;            // 2^-24: subnormal halves are multiples of it
constexpr uint32_t kQuietHalf = 0x7e00u, kQuietBfloat = 0x40u;  // NaN; the bit that makes a bfloat16 a quiet NaN

// Adding it rounds a float of magnitude below 2^22 to the nearest integer, which is then in the low bits: 1.5 * 2^23.
constexpr float kRounder = 12582912.0f;
constexpr int32_t kRounderBits = 0x4b400000;

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    uint32_t bits;
    if (magnitude >= kHalfInfinity) {
        bits = kFloatInfinity | ((magnitude & 0x3ffu) << 13);
    } else if (magnitude >= kLeastNormalHalf) {
        bits = (magnitude << 13) + kExponentShift;
    } else {
        bits = bits_of(static_cast<float>(magnitude) * kHalfUnit);
    }
    return float_of(bits | sign);
}

inline float bfloat_to_float(uint16_t bfloat) { return float_of(static_cast<uint32_t>(bfloat) << 16); }

// To the nearest, ties to even.
inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > kFloatInfinity) return static_cast<uint16_t>((bits >> 16) | kQuietBfloat);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t float_to_half(float value) {
    uint32_t bits = bits_of(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > kFloatInfinity) return sign | kQuietHalf;
    if (bits >= kHalfOverflow) return sign | kHalfInfinity;
    if (bits < kLeastNormalHalfAsFloat)  // beside 0.5 the floats are multiples of 2^-24: the addition rounds
        return static_cast<uint16_t>(sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f)));
    return static_cast<uint16_t>(sign | ((bits - kExponentShift + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

inline void floats_from(const void* from, Float type, int64_t count, float* to) {
    if (type == Float::f32) {
        std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    const auto* source = static_cast<const uint16_t*>(from);
    if (type == Float::bf16) {
        for (int64_t i = 0; i < count; ++i) to[i] = bfloat_to_float(source[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = half_to_float(source[i]);
    }
}

inline void floats_to(const float* from, Float type, int64_t count, void* to) {
    if (type == Float::f32) {
        std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    auto* target = static_cast<uint16_t*>(to);
    if (type == Float::bf16) {
        for (int64_t i = 0; i < count; ++i) target[i] = float_to_bfloat(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) target[i] = float_to_half(from[i]);
    }
}

// A sum in 16 partial sums, in an order that does not depend on the instruction set.
inline float sum_floats(const float* a, int64_t count) {
    float part[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t d = 0; d < kLanes; ++d) part[d] += a[i + d];
    for (; i < count; ++i) part[0] += a[i];
    float sum = 0.0f;
    for (int64_t d = 0; d < kLanes; ++d) sum += part[d];
    return sum;
}

// A sum of products in 16 partial sums, in an order that does not depend on the instruction set.
inline float dot_floats(const float* a, const float* b, int64_t count) {
    float part[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t d = 0; d < kLanes; ++d) part[d] += a[i + d] * b[i + d];
    for (; i < count; ++i) part[0] += a[i] * b[i];
    float sum = 0.0f;
    for (int64_t d = 0; d < kLanes; ++d) sum += part[d];
    return sum;
}

}  // namespace
}  // namespace fracbit
