// The other parts of a decode step: products of float weights, norms, activations, attention of one token. They are written over
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

// 1 / (1 + e^-x); the exponential is taken of -|x|, which cannot overflow.
inline float sigmoid(float x) {
    const float e = exponential(x < 0.0f ? x : -x);
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

constexpr float kTanhScale = 0.7978845608f, kTanhCube = 0.044715f;  // Hendrycks and Gimpel 2016, arXiv:1606.08415
constexpr float kQuickGelu = 1.702f;

// The share of a normal distribution below x, to 1e-7: Abramowitz and Stegun 1964, 7.1.26.
inline float below(float x) {
    const float size = (x < 0.0f ? -x : x) * 0.7071067812f, t = 1.0f / (1.0f + 0.3275911f * size);
    const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * p * exponential(-size * size);
    return x < 0.0f ? tail : 1.0f - tail;
}

inline float silu(float x) { return x * sigmoid(x); }
inline float gelu(float x) { return x * below(x); }
inline float gelu_tanh(float x) { return x * sigmoid(2.0f * kTanhScale * (x + kTanhCube * x * x * x)); }  // 1 + tanh(u) = 2 sigmoid(2u)
inline float quick_gelu(float x) { return x * sigmoid(kQuickGelu * x); }
inline float relu(float x) { return x > 0.0f ? x : 0.0f; }
inline float relu_squared(float x) { return x > 0.0f ? x * x : 0.0f; }
inline float cap(float x, float a) { return a * (2.0f * sigmoid(2.0f * x / a) - 1.0f); }

template <class F>
FRACBIT_INLINE void each_number(float* x, int64_t count, const F& f) {
    for (int64_t i = 0; i < count; ++i) x[i] = f(x[i]);
}

inline void apply(const Curve& curve, float* x, int64_t count) {
    const float a = curve.a;
    switch (curve.function) {
        case Function::silu: return each_number(x, count, [](float v) { return silu(v); });
        case Function::gelu: return each_number(x, count, [](float v) { return gelu(v); });
        case Function::gelu_tanh: return each_number(x, count, [](float v) { return gelu_tanh(v); });
        case Function::quick_gelu: return each_number(x, count, [](float v) { return quick_gelu(v); });
        case Function::relu: return each_number(x, count, [](float v) { return relu(v); });
        case Function::relu_squared: return each_number(x, count, [](float v) { return relu_squared(v); });
        case Function::sigmoid: return each_number(x, count, [](float v) { return sigmoid(v); });
        case Function::cap: return each_number(x, count, [a](float v) { return cap(v, a); });
        default: return;
    }
}

inline void gate_with(const Curve& curve, float* gate, const float* up, int64_t count) {
    if (curve.function == Function::clamped) {
        for (int64_t i = 0; i < count; ++i) {
            const float g = gate[i] < curve.b ? gate[i] : curve.b;
            const float low = up[i] < curve.b ? up[i] : curve.b, u = low > -curve.b ? low : -curve.b;
            gate[i] = (u + 1.0f) * g * sigmoid(curve.a * g);
        }
        return;
    }
    apply(curve, gate, count);
    for (int64_t i = 0; i < count; ++i) gate[i] *= up[i];
}

// RMS norm: x / sqrt(mean(x^2) + epsilon) * gain (Zhang and Sennrich 2019, arXiv:1910.07467). Centered: layer norm (arXiv:1607.06450).
inline void normalize(const float* x, const float* gain, const float* bias, float epsilon, bool centered, int64_t count, float* out) {
    const float size = static_cast<float>(count), mean = centered ? sum_floats(x, count) / size : 0.0f;
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] - mean;
    const float factor = 1.0f / __builtin_sqrtf(dot_floats(out, out, count) / size + epsilon);
    if (gain == nullptr) {
        for (int64_t i = 0; i < count; ++i) out[i] *= factor;
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = out[i] * factor * gain[i];
    }
    if (bias != nullptr)
        for (int64_t i = 0; i < count; ++i) out[i] += bias[i];
}

// Pairs (i, i + count / 2) of the first `count` numbers of a head: Su et al. 2021, arXiv:2104.09864.
inline void rotate(float* head, const float* cosines, const float* sines, int64_t count) {
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float low = head[i], high = head[i + half];
        head[i] = low * cosines[i] - high * sines[i];
        head[i + half] = high * cosines[i + half] + low * sines[i + half];
    }
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
    const float* x = job.x + n0 * job.stride;
    for (int64_t row = first; row < last; ++row) {
        const char* w = number_at(job.weight, type, row * columns);
        typename S::Floats sum[batch][2];
        for (int n = 0; n < batch; ++n) sum[n][0] = sum[n][1] = S::zero_floats();
        int64_t i = 0;
        for (; i + 2 * kLanes <= whole; i += 2 * kLanes)
            for (int half = 0; half < 2; ++half) {
                const typename S::Floats weights = S::template load_as<type>(number_at(w, type, i + half * kLanes));
                for (int n = 0; n < batch; ++n) sum[n][half] = S::fma(weights, S::load(x + n * job.stride + i + half * kLanes), sum[n][half]);
            }
        for (; i < whole; i += kLanes) {
            const typename S::Floats weights = S::template load_as<type>(number_at(w, type, i));
            for (int n = 0; n < batch; ++n) sum[n][0] = S::fma(weights, S::load(x + n * job.stride + i), sum[n][0]);
        }
        for (int n = 0; n < batch; ++n) {
            float result = S::total(S::fma(sum[n][1], S::all(1.0f), sum[n][0]));
            if (whole < columns) {
                const typename S::Floats a = load_rest<S, type>(w, whole, columns), b = load_rest<S, Float::f32>(x + n * job.stride, whole, columns);
                result += S::total(S::multiply(a, b));
            }
            job.y.at(n0 + n, row) = result;
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

// Products of `heads` queries with `keys` neighbouring keys: a key that is loaded serves all queries. The sums of one do not depend on
// how many there are.
template <class S, Float type, int heads, int keys>
FRACBIT_INLINE void score(const float* const (&query)[heads], const char* key, int64_t size, float scale, float* scores, int64_t stride) {
    typename S::Floats sum[heads][keys];
    for (int h = 0; h < heads; ++h)
        for (int k = 0; k < keys; ++k) sum[h][k] = S::zero_floats();
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
        for (int k = 0; k < keys; ++k) {
            const typename S::Floats numbers = S::template load_as<type>(number_at(key, type, k * size + i));
            for (int h = 0; h < heads; ++h) sum[h][k] = S::fma(S::load(query[h] + i), numbers, sum[h][k]);
        }
    for (int k = 0; k < keys && i < size; ++k)
        for (int h = 0; h < heads; ++h)
            sum[h][k] = S::fma(load_rest<S, Float::f32>(query[h], i, size), load_rest<S, type>(number_at(key, type, k * size), i, size), sum[h][k]);
    for (int h = 0; h < heads; ++h) {
        float found[keys];
        if constexpr (S::kFours && keys == 4) {
            S::totals(sum[h][0], sum[h][1], sum[h][2], sum[h][3], found);
        } else {
            for (int k = 0; k < keys; ++k) found[k] = S::total(sum[h][k]);
        }
        for (int k = 0; k < keys; ++k) scores[h * stride + k] = scale * found[k];
    }
}

// scores [count] become weights that add up to one; with a sink, to less.
inline void soften(float* scores, int64_t count, const float* sink) {
    float top = sink != nullptr ? *sink : scores[0];
    for (int64_t t = 0; t < count; ++t) top = scores[t] > top ? scores[t] : top;
    float part[kLanes] = {};
    for (int64_t t = 0; t < count; ++t) scores[t] = exponential(scores[t] - top);
    int64_t t = 0;
    for (; t + kLanes <= count; t += kLanes)
        for (int64_t d = 0; d < kLanes; ++d) part[d] += scores[t + d];
    float sum = sink != nullptr ? exponential(*sink - top) : 0.0f;
    for (; t < count; ++t) sum += scores[t];
    for (int64_t d = 0; d < kLanes; ++d) sum += part[d];
    for (t = 0; t < count; ++t) scores[t] *= 1.0f / sum;
}

// out[h] [size] = sum of weights[h][t] * value[t]; four vectors of a head at a time stay in registers.
template <class S, Float type, int heads>
inline void mix(const float* weights, int64_t stride, const char* values, int64_t count, int64_t size, float* const (&out)[heads]) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
        typename S::Floats sum[heads][4];
        for (int h = 0; h < heads; ++h)
            for (int j = 0; j < 4; ++j) sum[h][j] = S::zero_floats();
        for (int64_t t = 0; t < count; ++t)
            for (int j = 0; j < 4; ++j) {
                const typename S::Floats numbers = S::template load_as<type>(number_at(values, type, t * size + i + j * kLanes));
                for (int h = 0; h < heads; ++h) sum[h][j] = S::fma(S::all(weights[h * stride + t]), numbers, sum[h][j]);
            }
        for (int h = 0; h < heads; ++h)
            for (int j = 0; j < 4; ++j) S::store(sum[h][j], out[h] + i + j * kLanes);
    }
    for (; i < size; i += kLanes) {
        typename S::Floats sum[heads];
        for (int h = 0; h < heads; ++h) sum[h] = S::zero_floats();
        for (int64_t t = 0; t < count; ++t) {
            const bool whole = i + kLanes <= size;
            const char* value = number_at(values, type, t * size);
            const typename S::Floats v = whole ? S::template load_as<type>(number_at(value, type, i)) : load_rest<S, type>(value, i, size);
            for (int h = 0; h < heads; ++h) sum[h] = S::fma(S::all(weights[h * stride + t]), v, sum[h]);
        }
        for (int h = 0; h < heads; ++h) {
            float rest[kLanes];
            S::store(sum[h], rest);
            for (int64_t d = 0; d < kLanes && i + d < size; ++d) out[h][i + d] = rest[d];
        }
    }
}

// `heads` heads of sequence n from `head` on, which share keys and values.
template <class S, Float type, int heads>
void attend_with(const Attention& job, int64_t n, int64_t head, float* scores) {
    const int64_t kv = head / job.group, pad = job.pads[n], oldest = job.window > 0 ? job.tokens - job.window : 0;
    const int64_t first = oldest > pad ? oldest : pad, count = job.tokens - first, plane = n * job.sequence + kv * job.kv + first * job.head;
    const char *keys = number_at(job.keys, type, plane), *values = number_at(job.values, type, plane);
    const float* query[heads];
    float* out[heads];
    for (int h = 0; h < heads; ++h) {
        query[h] = job.queries.at(n, head + h);
        out[h] = job.out + n * job.out_stride + (head + h) * job.head;
    }
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) score<S, type, heads, 4>(query, number_at(keys, type, t * job.head), job.head, job.scale, scores + t, job.scores);
    for (; t < count; ++t) score<S, type, heads, 1>(query, number_at(keys, type, t * job.head), job.head, job.scale, scores + t, job.scores);
    for (int h = 0; h < heads; ++h) {
        float* own = scores + h * job.scores;
        if (job.cap > 0.0f) apply({Function::cap, job.cap}, own, count);
        if (job.biases != nullptr) {
            const float* bias = job.biases + (head + h) * job.room + first - pad;
            for (t = 0; t < count; ++t) own[t] += bias[t];
        }
        soften(own, count, job.sinks == nullptr ? nullptr : job.sinks + head + h);
    }
    mix<S, type, heads>(scores, job.scores, values, count, job.head, out);
}

template <class S, Float type>
void attend_as(const Attention& job, int64_t n, int64_t head, int64_t heads, float* scores) {
    if constexpr (S::kFours) {
        for (; heads >= 4; head += 4, heads -= 4) attend_with<S, type, 4>(job, n, head, scores);
        for (; heads >= 2; head += 2, heads -= 2) attend_with<S, type, 2>(job, n, head, scores);
    }
    for (; heads > 0; ++head, --heads) attend_with<S, type, 1>(job, n, head, scores);
}

template <class S>
void attend(const Attention& job, int64_t n, int64_t head, int64_t heads, float* scores) {
    FRACBIT_BY_TYPE(job.type, attend_as, job, n, head, heads, scores)
}

}  // namespace
}  // namespace fracbit
