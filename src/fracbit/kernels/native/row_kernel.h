// The one kernel family, written once over a set of vector operations `S` and compiled once per instruction set.
//
// Everything is in an unnamed namespace on purpose: the same template compiled with other instruction flags must never be
// merged by the linker. For the same reason no function of the standard library is called from here.
//
// S offers: types Bytes (64 codes), Floats and Ints (16 lanes); loads; and
//   unpack<bits>(p, u0, u1)   128 codes as bytes, lane order; bits above the code may be anything
//   clean<bits>(u)            those bits cleared
//   look_up<bits>(u, table)   table bytes of codes
//   activations<again>(a)     64 of them, ready for `dot`; `again`: more than once
//   dot(sum, u, a)            sum += u * a over the four bytes of a lane; u as the kernel's `high` (see Isa::biased)
//   dot_small(sum, u, a)      the same for u < 128
//   pick(scales, lane)        scales of the lanes, from 16 of them
//   load_as<type>(p)          16 numbers as floats; load_part<type>(p, count) fewer, then zeros
//   words<bits>(p), pick<bits, j>(words, table)   table floats of the j-th code of every lane
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

// Registers must not pass through memory.
#if defined(__GNUC__)
#define FRACBIT_INLINE __attribute__((always_inline)) inline
#else
#define FRACBIT_INLINE inline
#endif

namespace fracbit {
namespace {

// Order of the eight inputs of a lane in the two byte vectors that `unpack` yields. Nibbles come as even and odd codes.
constexpr int kNatural[8] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr int kNibbles[8] = {0, 2, 4, 6, 1, 3, 5, 7};
inline const int* order_of(int bits) { return bits == 4 ? kNibbles : kNatural; }

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t magnitude = h & 0x7fffu;
    uint32_t bits;
    if (magnitude >= 0x7c00u) {
        bits = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    } else if (magnitude >= 0x400u) {
        bits = (magnitude << 13) + 0x38000000u;
    } else {  // subnormal: an integer multiple of 2^-24, exact in fp32
        const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
        std::memcpy(&bits, &value, 4);
    }
    bits |= sign;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline float bfloat_to_float(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline uint16_t float_to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t float_to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 and beyond
    if (bits < 0x38800000u) {                        // subnormal half: let fp32 addition round to multiples of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13));
}

inline void floats_from(const void* from, Float type, int64_t count, float* to) {
    if (type == Float::f32) {
        std::memcpy(to, from, static_cast<size_t>(count) * 4);
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
        std::memcpy(to, from, static_cast<size_t>(count) * 4);
        return;
    }
    auto* target = static_cast<uint16_t*>(to);
    if (type == Float::bf16) {
        for (int64_t i = 0; i < count; ++i) target[i] = float_to_bfloat(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) target[i] = float_to_half(from[i]);
    }
}

inline void transpose_lanes(const float* natural, int64_t chunks, float* lanes) {
    for (int64_t c = 0; c < chunks; ++c)
        for (int64_t j = 0; j < 8; ++j)
            for (int64_t d = 0; d < kLanes; ++d) lanes[c * kChunk + j * kLanes + d] = natural[c * kChunk + 8 * d + j];
}

inline void sum_lanes(const float* x, int64_t chunks, float* x_sum) {
    for (int64_t c = 0; c < chunks; ++c) {
        for (int64_t d = 0; d < kLanes; ++d) x_sum[c * kLanes + d] = 0.0f;
        for (int64_t j = 0; j < 8; ++j)
            for (int64_t d = 0; d < kLanes; ++d) x_sum[c * kLanes + d] += x[c * kChunk + j * kLanes + d];
    }
}

// Eight activations of a lane share a scale. All-zero lanes get scale 0; a lane with NaN or Inf gets a NaN scale, so that
// the result says so instead of hiding it.
//
// `x` is replaced by the rounded activations, so that offsets, which multiply sums of activations, see the same numbers as
// the codes: otherwise a large offset that codes cancel would leave the rounding error of the activations behind.
inline void quantize_lanes(float* x, int64_t chunks, int bits, int8_t* a, float* a_scale, float* x_sum) {
    const int* order = order_of(bits);
    for (int64_t c = 0; c < chunks; ++c) {
        float* chunk = x + c * kChunk;
        float top[kLanes], inverse[kLanes];
        int32_t sum[kLanes], word[kLanes];
        for (int d = 0; d < kLanes; ++d) top[d] = 0.0f;
        float poison[kLanes];
        for (int d = 0; d < kLanes; ++d) poison[d] = 0.0f;
        for (int j = 0; j < 8; ++j)
            for (int d = 0; d < kLanes; ++d) {
                const float value = chunk[j * kLanes + d];
                const float magnitude = value < 0 ? -value : value;
                top[d] = magnitude > top[d] ? magnitude : top[d];
                poison[d] += value * 0.0f;  // 0, or NaN when value is NaN or Inf
            }
        for (int d = 0; d < kLanes; ++d) {
            inverse[d] = top[d] >= 1e-30f && poison[d] == 0.0f ? 127.0f / top[d] : 0.0f;
            a_scale[c * kLanes + d] = top[d] >= 1e-30f ? top[d] * (1.0f / 127.0f) : 0.0f;
            a_scale[c * kLanes + d] += poison[d];
            sum[d] = 0;
        }
        for (int h = 0; h < 2; ++h) {
            for (int d = 0; d < kLanes; ++d) word[d] = 0;
            for (int j = 0; j < 4; ++j) {
                float* plane = chunk + order[4 * h + j] * kLanes;
                for (int d = 0; d < kLanes; ++d) {
                    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
                    const float shifted = (inverse[d] != 0.0f ? plane[d] * inverse[d] : 0.0f) + 12582912.0f;
                    int32_t q;
                    std::memcpy(&q, &shifted, 4);
                    q -= 0x4b400000;
                    plane[d] = static_cast<float>(q) * a_scale[c * kLanes + d];
                    sum[d] += q;
                    word[d] |= static_cast<int32_t>(static_cast<uint32_t>(q & 255) << (8 * j));
                }
            }
            std::memcpy(a + c * kChunk + h * 64, word, 64);
        }
        for (int d = 0; d < kLanes; ++d) x_sum[c * kLanes + d] = static_cast<float>(sum[d]) * a_scale[c * kLanes + d];
    }
}

// The code at `index` of a bit stream of `stride` bytes.
inline unsigned code_at(const uint8_t* row, int64_t stride, int bits, int64_t index) {
    const int64_t bit = index * bits;
    unsigned word = row[bit >> 3];
    if ((bit >> 3) + 1 < stride) word |= static_cast<unsigned>(row[(bit >> 3) + 1]) << 8;
    return (word >> (bit & 7)) & ((1u << bits) - 1u);
}

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

inline float scale_at(const RowJob& job, const void* values, int64_t index) {
    float result;
    const int64_t width = job.scale_type == Float::f32 ? 4 : 2;
    floats_from(static_cast<const char*>(values) + index * width, job.scale_type, 1, &result);
    return result;
}

// `count` scales, at most 16, then zeros.
template <class S, Float type>
FRACBIT_INLINE typename S::Floats scales_as(const void* values, int64_t index, int64_t count) {
    const char* from = static_cast<const char*>(values) + index * (type == Float::f32 ? 4 : 2);
    return count >= kLanes ? S::template load_as<type>(from) : S::template load_part<type>(from, count);
}

template <class S>
FRACBIT_INLINE typename S::Floats scales_at(const RowJob& job, const void* values, int64_t index, int64_t count) {
    if (job.scale_type == Float::f16) return scales_as<S, Float::f16>(values, index, count);
    if (job.scale_type == Float::bf16) return scales_as<S, Float::bf16>(values, index, count);
    return scales_as<S, Float::f32>(values, index, count);
}

// What a unit of activation adds in 16 blocks whatever its codes, in steps: constants and offsets.
template <class S>
FRACBIT_INLINE typename S::Floats shifts_at(const RowJob& job, const typename S::Floats& scales, float per_step, int64_t index, int64_t count) {
    typename S::Floats shift = S::multiply(scales, S::all(job.bias));
    if (job.offsets != nullptr) shift = S::fma(scales_at<S>(job, job.offsets, index, count), S::all(per_step), shift);
    if (job.zeros != nullptr) {  // one table for all rows
        float zero[kLanes] = {};
        for (int64_t i = 0; i < count; ++i) zero[i] = -per_step * job.values[job.zeros[index + i]];
        shift = S::fma(scales, S::load(zero), shift);
    }
    return shift;
}

// The chunks of a row: those that can be read where they lie, then a padded copy of the rest.
template <class S, int bits>
struct Chunks {
    int64_t end[2];
    uint8_t rest[2 * kChunk + S::kOverread];

    explicit Chunks(const RowJob& job) {
        const int64_t whole = job.stride < S::kOverread ? 0 : (job.stride - S::kOverread) / (16 * bits);
        end[0] = whole < job.chunks ? whole : job.chunks;
        end[1] = job.chunks;
        if (end[0] != end[1]) std::memset(rest, 0, sizeof rest);
    }
    void copy_rest(const RowJob& job, const uint8_t* codes) {
        const int64_t first = end[0] * 16 * bits;
        std::memcpy(rest, codes + first, static_cast<size_t>(job.stride - first));
    }
};

// Scales are needed at once, and a row of them is too short for a hardware prefetcher: ask early. Only a hint, which may lead
// beyond the last row.
FRACBIT_INLINE void prefetch_scales(const RowJob& job, int64_t row) {
    const int64_t width = job.scale_type == Float::f32 ? 4 : 2;
    const auto first = reinterpret_cast<uintptr_t>(job.scales) + static_cast<uintptr_t>(row * job.scale_stride * width);
    for (int64_t i = 0; i < job.blocks * width; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(first + static_cast<uintptr_t>(i)));
}

// Rows [first, last) times `batch` rows of activations from n0 on. begin(row) makes ready what belongs to a row, and
// step(chunk, codes, scales of its lanes, sums) adds a chunk. Codes are one stream through memory: several side by side
// arrive at little more than half the speed. Scales come straight from where they are stored, 16 blocks at a time: a narrow
// row has few chunks to pay for whatever is done once a row. `single`: a row has one scale.
template <class S, int bits, bool single, int batch, class Begin, class Step>
FRACBIT_INLINE void each_row(const RowJob& job, bool steps, int64_t first, int64_t last, int64_t n0, const Begin& begin, const Step& step) {
    using Floats = typename S::Floats;
    Chunks<S, bits> chunks(job);
    const float* block_sums = job.block_sums + n0 * job.sums_stride;
    for (int64_t row = first; row < last; ++row) {
        const uint8_t* codes = job.codes + row * job.stride;
        const float size = steps ? job.steps[job.table_stride == 0 ? 0 : row] : 1.0f, per_step = 1.0f / size;
        if (chunks.end[0] != chunks.end[1]) chunks.copy_rest(job, codes);
        if (!single) prefetch_scales(job, row + 4);
        begin(row);
        Floats sum[batch], sixteen = S::all(1.0f);
        for (int n = 0; n < batch; ++n) sum[n] = S::zero_floats();
        int64_t c = 0, left = single ? job.chunks : 0, block = 0;  // left: chunks until the next scales
        const int32_t* lane = job.lane;
        for (int half = 0; half < 2; ++half) {
            const uint8_t* p = half == 0 ? codes : chunks.rest;
            while (c < chunks.end[half]) {
                if (!single && left == 0) {
                    const int64_t index = row * job.scale_stride + block, count = job.blocks - block < kLanes ? job.blocks - block : kLanes;
                    sixteen = scales_at<S>(job, job.scales, index, count);
                    const Floats shift = shifts_at<S>(job, sixteen, per_step, index, count);
                    for (int n = 0; n < batch; ++n) sum[n] = S::fma(shift, S::load(block_sums + n * job.sums_stride + block), sum[n]);
                    block += kLanes;
                    lane = job.lane;
                    left = job.period;
                }
                const int64_t stop = c + left < chunks.end[half] ? c + left : chunks.end[half];
                left -= stop - c;
                for (; c < stop; ++c, p += 16 * bits, lane += kLanes) {
                    for (int64_t i = 0; i < 16 * bits; i += 64) prefetch(p + kAhead + i);
                    step(c, p, single ? sixteen : S::pick(sixteen, lane), sum);
                }
            }
        }
        float scale = 1.0f, shift = 0.0f;
        if (single) {
            const int64_t index = row * job.scale_stride;
            if (job.scales != nullptr) scale = scale_at(job, job.scales, index);
            shift = scale * job.bias;
            if (job.offsets != nullptr) shift += scale_at(job, job.offsets, index) * per_step;
            if (job.zeros != nullptr) shift -= scale * job.values[job.zeros[index]] * per_step;
        }
        for (int n = 0; n < batch; ++n) {
            float result = S::total(sum[n]);
            if (single) result = result * scale + shift * block_sums[n * job.sums_stride];
            job.y[(n0 + n) * job.y_stride + row] = result * size;
        }
    }
}

template <class S, int bits, bool affine, bool single, int batch>
void int8_rows(const RowJob& job, int64_t first, int64_t last, int64_t n0) {
    using Floats = typename S::Floats;
    using Ints = typename S::Ints;
    typename S::template ByteTable<bits> high, low;
    const auto begin = [&](int64_t row) {
        if (affine || (row > first && job.table_stride == 0)) return;
        high.load(job.high + row * job.table_stride);
        low.load(job.low + row * job.table_stride);
    };
    const int8_t* activations = job.a + n0 * job.chunks * kChunk;
    const float* a_scale0 = job.a_scale + n0 * job.chunks * kLanes;
    each_row<S, bits, single, batch>(job, true, first, last, n0, begin, [&](int64_t c, const uint8_t* p, const Floats& scales, Floats (&sum)[batch]) {
        typename S::Bytes u0, u1, h0, h1, l0, l1;
        S::template unpack<bits>(p, u0, u1);
        if (affine) {
            h0 = S::template clean<bits>(u0);
            h1 = S::template clean<bits>(u1);
        } else {
            h0 = high.look_up(u0);
            h1 = high.look_up(u1);
            l0 = low.look_up(u0);
            l1 = low.look_up(u1);
        }
        for (int n = 0; n < batch; ++n) {
            const int8_t* a = activations + (n * job.chunks + c) * kChunk;
            const auto a0 = S::template activations<!affine>(a), a1 = S::template activations<!affine>(a + 64);
            Ints dot = S::zero_ints();
            if (affine && bits < 8) {
                dot = S::dot_small(S::dot_small(dot, h0, a0), h1, a1);
            } else {
                dot = S::dot(S::dot(dot, h0, a0), h1, a1);
            }
            if (!affine) dot = S::dot_small(S::dot_small(S::template shift_left<kLowBits>(dot), l0, a0), l1, a1);
            Floats both = S::load(a_scale0 + (n * job.chunks + c) * kLanes);
            if (!single) both = S::multiply(scales, both);
            sum[n] = S::fma(S::to_floats(dot), both, sum[n]);
        }
    });
}

template <class S, int bits, bool number, int j, int batch>
FRACBIT_INLINE void float_step(const typename S::template FloatWords<bits>& words, const typename S::template FloatTable<bits>& table,
                               const float* const (&x)[batch], typename S::Floats (&part)[batch]) {
    if constexpr (j < 8) {
        typename S::Floats w;
        if constexpr (number) {
            w = words.template number<j>();
        } else {
            w = table.template pick<j>(words);
        }
        for (int n = 0; n < batch; ++n) part[n] = S::fma(w, S::load(x[n] + j * kLanes), part[n]);
        float_step<S, bits, number, j + 1, batch>(words, table, x, part);
    }
}

// `number`: the value is step * (code + bias), the code is converted.
template <class S, int bits, bool number, bool single, int batch>
void float_rows(const RowJob& job, int64_t first, int64_t last, int64_t n0) {
    using Floats = typename S::Floats;
    typename S::template FloatTable<bits> table;
    const auto begin = [&](int64_t row) {
        if (!number && (row == first || job.table_stride != 0)) table.load(job.values + row * job.table_stride);
    };
    each_row<S, bits, single, batch>(job, number, first, last, n0, begin, [&](int64_t c, const uint8_t* p, const Floats& scales, Floats (&sum)[batch]) {
        typename S::template FloatWords<bits> words;
        words.load(p);
        Floats part[batch];
        const float* x[batch];
        for (int n = 0; n < batch; ++n) {
            part[n] = S::zero_floats();
            x[n] = job.x + ((n0 + n) * job.chunks + c) * kChunk;
        }
        float_step<S, bits, number, 0, batch>(words, table, x, part);
        for (int n = 0; n < batch; ++n) sum[n] = S::fma(part[n], scales, sum[n]);
    });
}

// Functions for 1, 2 and 4 activation rows.
using RowFunction = void (*)(const RowJob& job, int64_t first, int64_t last, int64_t n0);
struct RowFunctions {
    RowFunction of[3];
};

template <class S, int bits, bool affine, bool single>
constexpr RowFunctions int8_functions() {
    return {{int8_rows<S, bits, affine, single, 1>, int8_rows<S, bits, affine, single, 2>, int8_rows<S, bits, affine, single, 4>}};
}

template <class S, int bits, bool number, bool single>
constexpr RowFunctions float_functions() {
    return {{float_rows<S, bits, number, single, 1>, float_rows<S, bits, number, single, 2>, float_rows<S, bits, number, single, 4>}};
}

template <class S, int bits>
RowFunctions choose_int8(bool affine, bool single) {
    if (affine) return single ? int8_functions<S, bits, true, true>() : int8_functions<S, bits, true, false>();
    return single ? int8_functions<S, bits, false, true>() : int8_functions<S, bits, false, false>();
}

template <class S, int bits>
RowFunctions choose_float(bool affine, bool single) {
    if constexpr (bits > kTableBits) {
        if (affine) return single ? float_functions<S, bits, true, true>() : float_functions<S, bits, true, false>();
    }
    return single ? float_functions<S, bits, false, true>() : float_functions<S, bits, false, false>();
}

// Rows of activations in groups of 4, 2 and 1; a task has few enough weights for them to be read from the cache again.
inline void multiply(const RowJob& job, const RowFunctions& functions, int64_t first, int64_t last) {
    for (int64_t n = 0; n < job.batch;) {
        const int64_t left = job.batch - n;
        const int size = left >= 4 ? 2 : left >= 2 ? 1 : 0;
        functions.of[size](job, first, last, n);
        n += int64_t{1} << size;
    }
}

#define FRACBIT_BY_BITS(function, ...)              \
    switch (job.bits) {                             \
        case 1: return function<S, 1>(__VA_ARGS__); \
        case 2: return function<S, 2>(__VA_ARGS__); \
        case 3: return function<S, 3>(__VA_ARGS__); \
        case 4: return function<S, 4>(__VA_ARGS__); \
        case 5: return function<S, 5>(__VA_ARGS__); \
        case 6: return function<S, 6>(__VA_ARGS__); \
        case 7: return function<S, 7>(__VA_ARGS__); \
        default: return function<S, 8>(__VA_ARGS__); \
    }

template <class S>
RowFunctions int8_by_bits(const RowJob& job) {
    FRACBIT_BY_BITS(choose_int8, job.affine, job.period == 0)
}

template <class S>
RowFunctions float_by_bits(const RowJob& job) {
    FRACBIT_BY_BITS(choose_float, job.affine, job.period == 0)
}

template <class S>
void multiply_int8(const RowJob& job, int64_t first, int64_t last) {
    multiply(job, int8_by_bits<S>(job), first, last);
}

template <class S>
void multiply_float(const RowJob& job, int64_t first, int64_t last) {
    multiply(job, float_by_bits<S>(job), first, last);
}

inline uint64_t read_bytes(const uint8_t* data, int64_t count) {
    uint64_t part[32] = {};  // enough chains to hide the latency of the sums
    int64_t i = 0;
    for (; i + 256 <= count; i += 256)
        for (int64_t j = 0; j < 32; ++j) {
            uint64_t word;
            std::memcpy(&word, data + i + 8 * j, 8);
            part[j] ^= word;
        }
    uint64_t sum = 0;
    for (; i < count; ++i) sum ^= data[i];
    for (const uint64_t word : part) sum ^= word;
    return sum;
}

// Values of a row in natural order, for tiles of a prefill and for blocks that are not whole lanes.
inline void look_up_row(const uint8_t* codes, int64_t stride, int bits, const float* values, int64_t kept, float* out) {
    const unsigned mask = (1u << bits) - 1u;
    int64_t i = 0;
    for (; i / 8 * bits + 8 <= stride && i + 8 <= kept; i += 8) {  // eight codes fill `bits` bytes
        uint64_t word;
        std::memcpy(&word, codes + i / 8 * bits, 8);
        for (int j = 0; j < 8; ++j) out[i + j] = values[(word >> (j * bits)) & mask];
    }
    for (; i < kept; ++i) out[i] = values[code_at(codes, stride, bits, i)];
}

// Weights of a row in natural order: scale * value + offset, for every kind of block along the row.
inline void weights_of_row(const RowJob& job, const Isa& isa, int64_t row, float* out) {
    const float* values = job.values + row * job.table_stride;
    isa.look_up(job.codes + row * job.stride, job.stride, job.bits, values, job.kept, out);
    if (job.scales == nullptr) return;
    const int64_t begin = job.flat ? row * job.kept : 0;
    const int64_t start = job.flat ? 0 : row * job.scale_stride;
    for (int64_t i = 0; i < job.kept;) {  // block by block
        const int64_t block = (begin + i) / job.block;
        int64_t end = (block + 1) * job.block - begin;
        if (end > job.kept) end = job.kept;
        const float scale = scale_at(job, job.scales, start + block);
        float offset = 0.0f;
        if (job.offsets != nullptr) offset = scale_at(job, job.offsets, start + block);
        if (job.zeros != nullptr) offset = -scale * values[job.zeros[start + block]];
        for (; i < end; ++i) out[i] = out[i] * scale + offset;
    }
}

// Blocks that are not whole lanes: decode the row, then multiply in floating point. `job.x` is in natural order here,
// [batch, chunks * 128], and `job.scratch` holds a row of weights.
inline void multiply_weights(const RowJob& job, const Isa& isa, int64_t first, int64_t last) {
    float* weights = job.scratch;
    for (int64_t row = first; row < last; ++row) {
        weights_of_row(job, isa, row, weights);
        for (int64_t n = 0; n < job.batch; ++n)
            job.y[n * job.y_stride + row] = dot_floats(weights, job.x + n * job.chunks * kChunk, job.kept);
    }
}

}  // namespace
}  // namespace fracbit
