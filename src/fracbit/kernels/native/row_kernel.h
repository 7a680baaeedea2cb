// The one kernel family, written once over a set of vector operations `S` and compiled once per instruction set.
//
// Everything is in an unnamed namespace on purpose: the same template compiled with other instruction flags must never be
// merged by the linker. For the same reason no function of the standard library is called from here.
//
// S offers: types Bytes (64 codes), Floats and Ints (16 lanes); loads; and
//   unpack<bits>(p, u0, u1)   128 codes as bytes, lane order; bits above the code may be anything
//   clean<bits>(u)            those bits cleared
//   look_up<bits>(u, table)   table bytes of codes
//   dot(sum, u, a)            sum += u * a over the four bytes of a lane; u as the kernel's `high` (see Isa::biased)
//   dot_small(sum, u, a)      the same for u < 128
//   words<bits>(p), pick<bits, j>(words, table)   table floats of the j-th code of every lane
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

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
inline void quantize_lanes(float* x, int64_t chunks, int bits, float bias, int8_t* a, float* a_scale, float* a_term, float* x_sum) {
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
        for (int d = 0; d < kLanes; ++d) {
            x_sum[c * kLanes + d] = static_cast<float>(sum[d]) * a_scale[c * kLanes + d];
            a_term[c * kLanes + d] = bias * x_sum[c * kLanes + d];
        }
    }
}

// The code at `index` of a bit stream of `stride` bytes.
inline unsigned code_at(const uint8_t* row, int64_t stride, int bits, int64_t index) {
    const int64_t bit = index * bits;
    unsigned word = row[bit >> 3];
    if ((bit >> 3) + 1 < stride) word |= static_cast<unsigned>(row[(bit >> 3) + 1]) << 8;
    return (word >> (bit & 7)) & ((1u << bits) - 1u);
}

// A row's scales and offsets as floats, and where its lanes find them.
struct RowScales {
    const float* scale;
    const float* offset;
    const int32_t* base;
    const int32_t* lane;
};

struct RowScratch {
    float* scale;
    float* offset;
    int32_t* base;
    int32_t* lane;
};

inline RowScratch scratch_of(const RowJob& job) {
    RowScratch s;
    s.scale = job.scratch;
    s.offset = s.scale + job.blocks + 2 * kLanes;
    s.base = reinterpret_cast<int32_t*>(s.offset + job.blocks + 2 * kLanes);
    s.lane = s.base + job.chunks;
    return s;
}

template <class S>
RowScales scales_of_row(const RowJob& job, const RowScratch& s, int64_t row, float step, const float* values) {
    RowScales result{s.scale, s.offset, job.base, job.lane};
    if (job.scales == nullptr) {
        s.scale[0] = 1.0f;
        return result;
    }
    int64_t first = row * job.scale_stride, count = job.blocks;
    if (job.flat) {
        const int64_t begin = row * job.kept;
        first = begin / job.block;
        count = (begin + job.kept - 1) / job.block - first + 1;
        for (int64_t c = 0; c < job.chunks; ++c) {
            s.base[c] = static_cast<int32_t>((begin + c * kChunk) / job.block - first);
            for (int64_t d = 0; d < kLanes; ++d) {
                int64_t block = (begin + c * kChunk + 8 * d) / job.block - first;
                if (block >= count) block = count - 1;  // padding lanes: their activations are 0
                s.lane[c * kLanes + d] = static_cast<int32_t>(block) - s.base[c];
            }
        }
        result.base = s.base;
        result.lane = s.lane;
    }
    const int64_t width = job.scale_type == Float::f32 ? 4 : 2;
    S::to_float(static_cast<const char*>(job.scales) + first * width, job.scale_type, count, s.scale);
    if (job.offsets != nullptr) {
        S::to_float(static_cast<const char*>(job.offsets) + first * width, job.scale_type, count, s.offset);
        const float inverse = 1.0f / step;
        for (int64_t b = 0; b < count; ++b) s.offset[b] *= inverse;
    } else if (job.zeros != nullptr) {
        const uint8_t* zeros = job.zeros + first;
        const float inverse = -1.0f / step;
        for (int64_t b = 0; b < count; ++b) s.offset[b] = s.scale[b] * values[zeros[b]] * inverse;
    }
    return result;
}

template <class S, int bits, bool affine, bool shifted, int batch>
void int8_row(const RowJob& job, const uint8_t* row, const RowScales& scales, int64_t table, int64_t n0, float* out) {
    using Floats = typename S::Floats;
    typename S::template ByteTable<bits> high, low;
    if (!affine) {
        high.load(job.high + table * kTable);
        low.load(job.low + table * kTable);
    }
    Floats sum[batch];
    for (int n = 0; n < batch; ++n) sum[n] = S::zero_floats();
    uint8_t tail[kChunk + S::kOverread];
    for (int64_t c = 0; c < job.chunks; ++c) {
        const uint8_t* p = row + c * 16 * bits;
        const int64_t left = job.stride - c * 16 * bits;
        if (left < 16 * bits + S::kOverread) {
            std::memset(tail, 0, sizeof tail);
            std::memcpy(tail, p, static_cast<size_t>(left < 16 * bits ? left : 16 * bits));
            p = tail;
        }
        typename S::Bytes u0, u1;
        S::template unpack<bits>(p, u0, u1);
        const Floats scale = S::pick_floats(scales.scale + scales.base[c], scales.lane + c * kLanes);
        Floats offset;
        if (shifted) offset = S::pick_floats(scales.offset + scales.base[c], scales.lane + c * kLanes);
        typename S::Bytes h0, h1, l0, l1;
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
            const int64_t at = (n0 + n) * job.chunks + c;
            const int8_t* a = job.a + at * kChunk;
            typename S::Ints dot = S::zero_ints();
            if (affine && bits < 8) {
                dot = S::dot_small(S::dot_small(dot, h0, a), h1, a + 64);
            } else {
                dot = S::dot(S::dot(dot, h0, a), h1, a + 64);
            }
            if (!affine) dot = S::dot_small(S::dot_small(S::template shift_left<kLowBits>(dot), l0, a), l1, a + 64);
            const Floats part = S::fma(S::to_floats(dot), S::load(job.a_scale + at * kLanes), S::load(job.a_term + at * kLanes));
            sum[n] = S::fma(part, scale, sum[n]);
            if (shifted) sum[n] = S::fma(offset, S::load(job.x_sum + at * kLanes), sum[n]);
        }
    }
    for (int n = 0; n < batch; ++n) out[n] = S::total(sum[n]);
}

template <class S, int bits, bool number, int j, int batch>
inline void float_step(const typename S::template FloatWords<bits>& words, const typename S::template FloatTable<bits>& table,
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

// `number`: the value is step * code + constant; a_term then holds constant / step * x_sum.
template <class S, int bits, bool number, bool shifted, int batch>
void float_row(const RowJob& job, const uint8_t* row, const RowScales& scales, int64_t table_row, int64_t n0, float* out) {
    using Floats = typename S::Floats;
    typename S::template FloatTable<bits> table;
    if (!number) table.load(job.values + table_row * kTable);
    Floats sum[batch];
    for (int n = 0; n < batch; ++n) sum[n] = S::zero_floats();
    uint8_t tail[kChunk + S::kOverread];
    for (int64_t c = 0; c < job.chunks; ++c) {
        const uint8_t* p = row + c * 16 * bits;
        const int64_t left = job.stride - c * 16 * bits;
        if (left < 16 * bits + S::kOverread) {
            std::memset(tail, 0, sizeof tail);
            std::memcpy(tail, p, static_cast<size_t>(left < 16 * bits ? left : 16 * bits));
            p = tail;
        }
        typename S::template FloatWords<bits> words;
        words.load(p);
        const float* x[batch];
        Floats part[batch];
        for (int n = 0; n < batch; ++n) {
            const int64_t at = (n0 + n) * job.chunks + c;
            x[n] = job.x + at * kChunk;
            part[n] = number ? S::load(job.a_term + at * kLanes) : S::zero_floats();
        }
        float_step<S, bits, number, 0, batch>(words, table, x, part);
        const Floats scale = S::pick_floats(scales.scale + scales.base[c], scales.lane + c * kLanes);
        for (int n = 0; n < batch; ++n) sum[n] = S::fma(part[n], scale, sum[n]);
        if (shifted) {
            const Floats offset = S::pick_floats(scales.offset + scales.base[c], scales.lane + c * kLanes);
            for (int n = 0; n < batch; ++n)
                sum[n] = S::fma(offset, S::load(job.x_sum + ((n0 + n) * job.chunks + c) * kLanes), sum[n]);
        }
    }
    for (int n = 0; n < batch; ++n) out[n] = S::total(sum[n]);
}

using RowFunction = void (*)(const RowJob&, const uint8_t*, const RowScales&, int64_t, int64_t, float*);
struct RowFunctions {
    RowFunction one, two, four;
};

template <class S, int bits, bool affine, bool shifted>
constexpr RowFunctions int8_functions() {
    return {int8_row<S, bits, affine, shifted, 1>, int8_row<S, bits, affine, shifted, 2>, int8_row<S, bits, affine, shifted, 4>};
}

template <class S, int bits, bool number, bool shifted>
constexpr RowFunctions float_functions() {
    return {float_row<S, bits, number, shifted, 1>, float_row<S, bits, number, shifted, 2>,
            float_row<S, bits, number, shifted, 4>};
}

template <class S, int bits>
RowFunctions choose_int8(bool affine, bool shifted) {
    if (affine) return shifted ? int8_functions<S, bits, true, true>() : int8_functions<S, bits, true, false>();
    return shifted ? int8_functions<S, bits, false, true>() : int8_functions<S, bits, false, false>();
}

template <class S, int bits>
RowFunctions choose_float(bool number, bool shifted) {
    if constexpr (bits > kTableBits) {
        if (number) return shifted ? float_functions<S, bits, true, true>() : float_functions<S, bits, true, false>();
    }
    return shifted ? float_functions<S, bits, false, true>() : float_functions<S, bits, false, false>();
}

template <class S>
void multiply(const RowJob& job, const RowFunctions& functions, bool steps, int64_t first, int64_t last) {
    const RowScratch scratch = scratch_of(job);
    for (int64_t row = first; row < last; ++row) {
        const int64_t table = job.table_stride == 0 ? 0 : row;
        const float step = steps ? job.steps[table] : 1.0f;
        const RowScales scales = scales_of_row<S>(job, scratch, row, step, job.values + table * kTable);
        const uint8_t* codes = job.codes + row * job.stride;
        float out[kMaxBatch];
        for (int64_t n = 0; n < job.batch;) {
            const int64_t left = job.batch - n;
            const int64_t take = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            (take == 4 ? functions.four : take == 2 ? functions.two : functions.one)(job, codes, scales, table, n, out);
            for (int64_t i = 0; i < take; ++i) job.y[(n + i) * job.y_stride + row] = out[i] * step;
            n += take;
        }
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
RowFunctions int8_by_bits(const RowJob& job, bool shifted) {
    FRACBIT_BY_BITS(choose_int8, job.affine, shifted)
}

template <class S>
RowFunctions float_by_bits(const RowJob& job, bool shifted) {
    FRACBIT_BY_BITS(choose_float, job.affine, shifted)
}

inline bool is_shifted(const RowJob& job) { return job.offsets != nullptr || job.zeros != nullptr; }

template <class S>
void multiply_int8(const RowJob& job, int64_t first, int64_t last) {
    multiply<S>(job, int8_by_bits<S>(job, is_shifted(job)), true, first, last);
}

template <class S>
void multiply_float(const RowJob& job, int64_t first, int64_t last) {
    multiply<S>(job, float_by_bits<S>(job, is_shifted(job)), uses_numbers(job.affine, job.bits), first, last);
}

// Values of a row in natural order, for tiles of a prefill and for blocks that are not whole lanes.
inline void look_up_row(const uint8_t* codes, int64_t stride, int bits, const float* values, int64_t kept, float* out) {
    const unsigned mask = (1u << bits) - 1u;
    int64_t i = 0;
    for (; (i / 8 + 1) * bits + 8 - bits <= stride && i + 8 <= kept; i += 8) {  // eight codes fill `bits` bytes
        uint64_t word;
        std::memcpy(&word, codes + i / 8 * bits, 8);
        for (int j = 0; j < 8; ++j) out[i + j] = values[(word >> (j * bits)) & mask];
    }
    for (; i < kept; ++i) out[i] = values[code_at(codes, stride, bits, i)];
}

inline float scale_at(const RowJob& job, const void* values, int64_t index) {
    float result;
    const int64_t width = job.scale_type == Float::f32 ? 4 : 2;
    floats_from(static_cast<const char*>(values) + index * width, job.scale_type, 1, &result);
    return result;
}

// Weights of a row in natural order: scale * value + offset, for every kind of block along the row.
inline void weights_of_row(const RowJob& job, const Isa& isa, int64_t row, float* out) {
    const float* values = job.values + (job.table_stride == 0 ? 0 : row) * kTable;
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
        for (int64_t n = 0; n < job.batch; ++n) {
            const float* x = job.x + n * job.chunks * kChunk;
            float part[kLanes] = {};
            int64_t i = 0;
            for (; i + kLanes <= job.kept; i += kLanes)
                for (int64_t d = 0; d < kLanes; ++d) part[d] += weights[i + d] * x[i + d];
            float sum = 0.0f;
            for (; i < job.kept; ++i) sum += weights[i] * x[i];
            for (int64_t d = 0; d < kLanes; ++d) sum += part[d];
            job.y[n * job.y_stride + row] = sum;
        }
    }
}

}  // namespace
}  // namespace fracbit
