// What a decode step does besides multiplying packed weights, over the vector operations of row_kernel.h; S offers also
//   load_as<type>(p)   16 numbers as floats
// As there, everything is in an unnamed namespace and nothing of the standard library is called.
#pragma once

#include "row_kernel.h"

namespace fracbit {
namespace {

// e^x for x <= 0 to a relative error of about 1e-7: 2^n by the exponent, 2^f by a polynomial, |f| <= 1/2.
inline float exponential(float x) {
    const float t = (x < -87.0f ? -87.0f : x) * 1.44269504f;
    const float shifted = t + 12582912.0f;  // rounds: the integer is in the low bits
    const float f = t - (shifted - 12582912.0f);
    int32_t n;
    std::memcpy(&n, &shifted, 4);
    float p = 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    const int32_t power = (n - 0x4b400000 + 127) << 23;
    float two;
    std::memcpy(&two, &power, 4);
    return p * two;
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

template <Float type>
inline const char* number(const void* data, int64_t index) {
    return static_cast<const char*>(data) + index * (type == Float::f32 ? 4 : 2);
}

// The last numbers of a row whose length is no multiple of 16, then zeros.
template <class S, Float type>
inline typename S::Floats load_rest(const void* row, int64_t from, int64_t count) {
    float rest[kLanes] = {};
    floats_from(number<type>(row, from), type, count - from, rest);
    return S::load(rest);
}

// y [batch, rows], of the rows [first, last), of a float weight [rows, columns]; x [batch, columns].
template <class S, Float type, int batch>
void dense_rows(const void* weight, int64_t rows, int64_t columns, int64_t first, int64_t last, const float* x, float* y) {
    const int64_t whole = columns / kLanes * kLanes;
    for (int64_t row = first; row < last; ++row) {
        const char* w = number<type>(weight, row * columns);
        typename S::Floats sum[batch][2];
        for (int n = 0; n < batch; ++n) sum[n][0] = sum[n][1] = S::zero_floats();
        int64_t i = 0;
        for (; i + 2 * kLanes <= whole; i += 2 * kLanes)
            for (int half = 0; half < 2; ++half) {
                const typename S::Floats weights = S::template load_as<type>(number<type>(w, i + half * kLanes));
                for (int n = 0; n < batch; ++n) sum[n][half] = S::fma(weights, S::load(x + n * columns + i + half * kLanes), sum[n][half]);
            }
        for (; i < whole; i += kLanes) {
            const typename S::Floats weights = S::template load_as<type>(number<type>(w, i));
            for (int n = 0; n < batch; ++n) sum[n][0] = S::fma(weights, S::load(x + n * columns + i), sum[n][0]);
        }
        for (int n = 0; n < batch; ++n) {
            float result = S::total(S::fma(sum[n][1], S::all(1.0f), sum[n][0]));
            if (whole < columns) {
                const typename S::Floats a = load_rest<S, type>(w, whole, columns), b = load_rest<S, Float::f32>(x + n * columns, whole, columns);
                result += S::total(S::multiply(a, b));
            }
            y[n * rows + row] = result;
        }
    }
}

template <class S, Float type>
void dense_of(const void* weight, int64_t rows, int64_t columns, int64_t first, int64_t last, const float* x, int64_t batch, float* y) {
    int64_t n = 0;
    for (; n + 4 <= batch; n += 4) dense_rows<S, type, 4>(weight, rows, columns, first, last, x + n * columns, y + n * rows);
    for (; n < batch; ++n) dense_rows<S, type, 1>(weight, rows, columns, first, last, x + n * columns, y + n * rows);
}

#define FRACBIT_BY_TYPE(type, function, ...)                           \
    switch (type) {                                                    \
        case Float::f16: return function<S, Float::f16>(__VA_ARGS__);  \
        case Float::bf16: return function<S, Float::bf16>(__VA_ARGS__); \
        default: return function<S, Float::f32>(__VA_ARGS__);          \
    }

template <class S>
void multiply_dense(const void* weight, Float type, int64_t rows, int64_t columns, int64_t first, int64_t last, const float* x,
                    int64_t batch, float* y) {
    FRACBIT_BY_TYPE(type, dense_of, weight, rows, columns, first, last, x, batch, y)
}

template <class S, Float type>
inline float dot_with(const float* query, const char* key, int64_t size) {
    typename S::Floats sum = S::zero_floats();
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) sum = S::fma(S::load(query + i), S::template load_as<type>(number<type>(key, i)), sum);
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
                sum[j] = S::fma(S::all(weights[t]), S::template load_as<type>(number<type>(values, t * size + i + j * kLanes)), sum[j]);
        for (int j = 0; j < 4; ++j) S::store(sum[j], out + i + j * kLanes);
    }
    for (; i < size; i += kLanes) {
        typename S::Floats sum = S::zero_floats();
        for (int64_t t = 0; t < count; ++t) {
            const bool whole = i + kLanes <= size;
            const char* value = number<type>(values, t * size);
            const typename S::Floats v = whole ? S::template load_as<type>(number<type>(value, i)) : load_rest<S, type>(value, i, size);
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
    const char *keys = number<type>(job.keys, plane), *values = number<type>(job.values, plane);
    for (int64_t g = 0; g < job.group; ++g) {
        const int64_t at = ((n * job.kv_heads + kv) * job.group + g) * job.head;
        for (int64_t t = 0; t < count; ++t) scores[t] = job.scale * dot_with<S, type>(job.queries + at, number<type>(keys, t * job.head), job.head);
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
