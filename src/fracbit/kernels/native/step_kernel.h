// The other parts of a decode step: products of float weights, RMS norms, the gate of an MLP, attention of one token. They are written over
// the vector operations `S` of row_kernel.h, and as there, everything is in an unnamed namespace and calls nothing of the standard library.
#pragma once

#include "floats.h"
#include "jobs.h"

namespace fracbit {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLeastExponent = -87.0f;  // e^-87 is near the smallest normal float
constexpr int32_t kExponentBias = 127, kFractionBits = 23;  // of a float

// e^x for x <= 0 to a relative error of about 1e-7: 2^n by the exponent, 2^f by a polynomial, |f| <= 1/2.
inline float exponential(float x) {
    const float t = (x < kLeastExponent ? kLeastExponent : x) * kLog2E;
    const float shifted = t + kRounder;
    const float f = t - (shifted - kRounder);
    const auto n = static_cast<int32_t>(bits_of(shifted)) - kRounderBits;
    float p = 1.5403530e-4f;  // (ln 2)^k / k! for k from 6 down to 0
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return p * float_of(static_cast<uint32_t>(n + kExponentBias) << kFractionBits);
}

// gate [count] = silu(gate) * up, silu(x) = x / (1 + e^-x); the exponential is taken of -|x|, which cannot overflow.
inline void gate_with(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const float x = gate[i], e = exponential(x < 0.0f ? x : -x);
        gate[i] = x * (x < 0.0f ? e : 1.0f) / (1.0f + e) * up[i];
    }
}

// RMS norm: x / sqrt(mean(x^2) + epsilon) * gain.
inline void normalize(const float* x, const float* gain, float epsilon, int64_t count, float* out) {
    const float factor = 1.0f / __builtin_sqrtf(dot_floats(x, x, count) / static_cast<float>(count) + epsilon);
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor * gain[i];
}

// The last numbers of a row whose length is no multiple of 16, then zeros.
template <class S, Float type>
inline typename S::Floats load_rest(const void* row, int64_t from, int64_t count) {
    float rest[kLanes] = {};
    floats_from(number_at(row, type, from), type, count - from, rest);
    return S::load(rest);
}

// Results of `batch` rows of activations from n0 on, for the rows [first, last) of the weight.
template <class S, Float type, int batch>
void dense_rows(const DenseJob& job, int64_t first, int64_t last, int64_t n0) {
    const int64_t columns = job.columns, whole = columns / kLanes * kLanes;
    const float* x = job.x + n0 * columns;
    for (int64_t row = first; row < last; ++row) {
        const char* w = number_at(job.weight, type, row * columns);
        typename S::Floats sum[batch][2];
        for (int n = 0; n < batch; ++n) sum[n][0] = sum[n][1] = S::zero_floats();
        int64_t i = 0;
        for (; i + 2 * kLanes <= whole; i += 2 * kLanes)
            for (int half = 0; half < 2; ++half) {
                const typename S::Floats weights = S::template load_as<type>(number_at(w, type, i + half * kLanes));
                for (int n = 0; n < batch; ++n) sum[n][half] = S::fma(weights, S::load(x + n * columns + i + half * kLanes), sum[n][half]);
            }
        for (; i < whole; i += kLanes) {
            const typename S::Floats weights = S::template load_as<type>(number_at(w, type, i));
            for (int n = 0; n < batch; ++n) sum[n][0] = S::fma(weights, S::load(x + n * columns + i), sum[n][0]);
        }
        for (int n = 0; n < batch; ++n) {
            float result = S::total(S::fma(sum[n][1], S::all(1.0f), sum[n][0]));
            if (whole < columns) {
                const typename S::Floats a = load_rest<S, type>(w, whole, columns), b = load_rest<S, Float::f32>(x + n * columns, whole, columns);
                result += S::total(S::multiply(a, b));
            }
            job.y[(n0 + n) * job.rows + row] = result;
        }
    }
}

template <class S, Float type>
void dense_of(const DenseJob& job, int64_t first, int64_t last) {
    int64_t n = 0;
    for (; n + 4 <= job.batch; n += 4) dense_rows<S, type, 4>(job, first, last, n);
    for (; n < job.batch; ++n) dense_rows<S, type, 1>(job, first, last, n);
}

#define FRACBIT_BY_TYPE(type, function, ...)                            \
    switch (type) {                                                     \
        case Float::f16: return function<S, Float::f16>(__VA_ARGS__);   \
        case Float::bf16: return function<S, Float::bf16>(__VA_ARGS__); \
        default: return function<S, Float::f32>(__VA_ARGS__);           \
    }

template <class S>
void multiply_dense(const DenseJob& job, int64_t first, int64_t last) {
    FRACBIT_BY_TYPE(job.type, dense_of, job, first, last)
}

template <class S, Float type>
inline float dot_with(const float* query, const char* key, int64_t size) {
    typename S::Floats sum = S::zero_floats();
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) sum = S::fma(S::load(query + i), S::template load_as<type>(number_at(key, type, i)), sum);
    if (i < size) sum = S::fma(load_rest<S, Float::f32>(query, i, size), load_rest<S, type>(key, i, size), sum);
    return S::total(sum);
}

// scores [count] become weights that add up to one.
inline void soften(float* scores, int64_t count) {
    float top = scores[0];
    for (int64_t t = 1; t < count; ++t) top = scores[t] > top ? scores[t] : top;
    float part[kLanes] = {};
    for (int64_t t = 0; t < count; ++t) scores[t] = exponential(scores[t] - top);
    int64_t t = 0;
    for (; t + kLanes <= count; t += kLanes)
        for (int64_t d = 0; d < kLanes; ++d) part[d] += scores[t + d];
    float sum = 0.0f;
    for (; t < count; ++t) sum += scores[t];
    for (int64_t d = 0; d < kLanes; ++d) sum += part[d];
    for (t = 0; t < count; ++t) scores[t] *= 1.0f / sum;
}

// out [size] = sum of weight[t] * value[t]; four vectors of a head at a time stay in registers.
template <class S, Float type>
inline void mix(const float* weights, const char* values, int64_t count, int64_t size, float* out) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
        typename S::Floats sum[4] = {S::zero_floats(), S::zero_floats(), S::zero_floats(), S::zero_floats()};
        for (int64_t t = 0; t < count; ++t)
            for (int j = 0; j < 4; ++j)
                sum[j] = S::fma(S::all(weights[t]), S::template load_as<type>(number_at(values, type, t * size + i + j * kLanes)), sum[j]);
        for (int j = 0; j < 4; ++j) S::store(sum[j], out + i + j * kLanes);
    }
    for (; i < size; i += kLanes) {
        typename S::Floats sum = S::zero_floats();
        for (int64_t t = 0; t < count; ++t) {
            const bool whole = i + kLanes <= size;
            const char* value = number_at(values, type, t * size);
            const typename S::Floats v = whole ? S::template load_as<type>(number_at(value, type, i)) : load_rest<S, type>(value, i, size);
            sum = S::fma(S::all(weights[t]), v, sum);
        }
        float rest[kLanes];
        S::store(sum, rest);
        for (int64_t d = 0; d < kLanes && i + d < size; ++d) out[i + d] = rest[d];
    }
}

template <class S, Float type>
void attend_as(const Attention& job, int64_t n, int64_t kv, float* scores) {
    const int64_t first = job.pads[n], count = job.tokens - first, plane = ((n * job.kv_heads + kv) * job.room + first) * job.head;
    const char *keys = number_at(job.keys, type, plane), *values = number_at(job.values, type, plane);
    for (int64_t g = 0; g < job.group; ++g) {
        const int64_t at = ((n * job.kv_heads + kv) * job.group + g) * job.head;
        for (int64_t t = 0; t < count; ++t) scores[t] = job.scale * dot_with<S, type>(job.queries + at, number_at(keys, type, t * job.head), job.head);
        soften(scores, count);
        mix<S, type>(scores, values, count, job.head, job.out + at);
    }
}

// The heads of sequence n that share the keys and values of head `kv`.
template <class S>
void attend(const Attention& job, int64_t n, int64_t kv, float* scores) {
    FRACBIT_BY_TYPE(job.type, attend_as, job, n, kv, scores)
}

}  // namespace
}  // namespace fracbit
