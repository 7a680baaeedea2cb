// Causal attention, 32 queries at a time: their scores against all keys that they see, a softmax, their sums of values.
//
// The lanes of two vectors are queries, and keys and values are read one number at a time. So no sum crosses lanes, small heads waste
// no lanes, and only the block on the diagonal computes scores that are then masked.
#include "attention.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "pool.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace fracbit {
namespace {

constexpr int64_t kVector = 16;            // floats of a register
constexpr int64_t kQueries = 2 * kVector;
constexpr int64_t kKeys = 8;  // 8 x 32 sums fill 16 of 32 registers
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLeast = -200.0f;  // 2^-200 is 0 in fp32; without a bound, a masked score of minus infinity would give NaN

struct Context {
    const Causal& job;
    std::vector<float> scratch;  // a piece for each worker: scores [tokens, 32], queries [head, 32]
    int64_t piece;
};

// 2^x for x <= 0, to the last bit or two: Taylor's series around the nearest integer.
__m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(kLeast), x);  // in this order a NaN stays
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(1.52527338e-5f);
    for (const float factor : {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, whole);
}

// Which of 16 queries from `query` on see `key`.
__mmask16 seen(int64_t query, int64_t key) {
    const int64_t unseen = std::min<int64_t>(std::max<int64_t>(key - query, 0), kVector);
    return static_cast<__mmask16>(0xFFFFU << unseen);
}

// Scores [count, 32] of `count` keys from `key` on; raises `most`, the largest score of each query.
template <int64_t count>
void score(const float* queries, const float* keys, int64_t stride, int64_t head, int64_t first, int64_t key, float* scores,
           __m512* most) {
    __m512 sums[count][2];
    for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
    for (int64_t d = 0; d < head; ++d) {
        const __m512 low = _mm512_loadu_ps(queries + kQueries * d), high = _mm512_loadu_ps(queries + kQueries * d + kVector);
#pragma GCC unroll 8
        for (int64_t i = 0; i < count; ++i) {
            const __m512 number = _mm512_set1_ps(keys[(key + i) * stride + d]);
            sums[i][0] = _mm512_fmadd_ps(low, number, sums[i][0]);
            sums[i][1] = _mm512_fmadd_ps(high, number, sums[i][1]);
        }
    }
    const __m512 never = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t half = 0; half < 2; ++half) {
            const __m512 found = _mm512_mask_mov_ps(never, seen(first + kVector * half, key + i), sums[i][half]);
            most[half] = _mm512_max_ps(most[half], found);
            _mm512_storeu_ps(scores + kQueries * (key + i) + kVector * half, found);
        }
    }
}

// Scores become weights, not yet divided by their sums, which go to `totals`.
void soften(float* scores, int64_t keys, const __m512* most, __m512* totals) {
    for (int64_t half = 0; half < 2; ++half) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t key = 0; key < keys; ++key) {
            float* place = scores + kQueries * key + kVector * half;
            const __m512 weight = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(place), most[half]));
            total = _mm512_add_ps(total, weight);
            _mm512_storeu_ps(place, weight);
        }
        totals[half] = total;
    }
}

// kHeadStep numbers of the outputs: weights times values, divided by the sums of the weights.
void gather(const float* weights, const float* values, int64_t stride, int64_t keys, const __m512* totals, float* out, int64_t to,
            int64_t count) {
    __m512 sums[kHeadStep][2];
    for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_ps();
    for (int64_t key = 0; key < keys; ++key) {
        const __m512 low = _mm512_loadu_ps(weights + kQueries * key), high = _mm512_loadu_ps(weights + kQueries * key + kVector);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kHeadStep; ++i) {
            const __m512 number = _mm512_set1_ps(values[key * stride + i]);
            sums[i][0] = _mm512_fmadd_ps(low, number, sums[i][0]);
            sums[i][1] = _mm512_fmadd_ps(high, number, sums[i][1]);
        }
    }
    alignas(64) float columns[kHeadStep][kQueries];
    for (int64_t i = 0; i < kHeadStep; ++i)
        for (int64_t half = 0; half < 2; ++half)
            _mm512_store_ps(columns[i] + kVector * half, _mm512_div_ps(sums[i][half], totals[half]));
    for (int64_t query = 0; query < count; ++query)
        for (int64_t i = 0; i < kHeadStep; ++i) out[query * to + i] = columns[i][query];
}

// All queries of one head of one sequence.
void attend_head(void* context, int64_t index, int worker) {
    Context& here = *static_cast<Context*>(context);
    const Causal& job = here.job;
    const int64_t sequence = index / job.heads, head = index % job.heads, shared = head / job.group;
    const float* queries = job.queries + sequence * job.query.sequence + head * job.query.head;
    const float* keys = job.keys + sequence * job.key.sequence + shared * job.key.head;
    const float* values = job.values + sequence * job.value.sequence + shared * job.value.head;
    float* out = job.out + sequence * job.to.sequence + head * job.to.head;
    float* scores = here.scratch.data() + worker * here.piece;
    float* turned = scores + kQueries * job.tokens;
    for (int64_t first = 0; first < job.tokens; first += kQueries) {
        const int64_t count = std::min(kQueries, job.tokens - first), last = first + count;
        for (int64_t d = 0; d < job.head; ++d)
            for (int64_t i = 0; i < kQueries; ++i)
                turned[kQueries * d + i] = i < count ? queries[(first + i) * job.query.token + d] * job.scale * kLog2E : 0.0f;
        __m512 most[2], totals[2];
        most[0] = most[1] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        int64_t key = 0;
        for (; key + kKeys <= last; key += kKeys)
            score<kKeys>(turned, keys, job.key.token, job.head, first, key, scores, most);
        for (; key < last; ++key) score<1>(turned, keys, job.key.token, job.head, first, key, scores, most);
        soften(scores, last, most, totals);
        for (int64_t d = 0; d < job.head; d += kHeadStep)
            gather(scores, values + d, job.value.token, last, totals, out + first * job.to.token + d, job.to.token, count);
    }
}

}  // namespace

bool has_causal() { return __builtin_cpu_supports("avx512f"); }

void attend_causal(const Causal& job, int threads) {
    const int64_t piece = kQueries * (job.tokens + job.head);
    const int workers = std::max(1, std::min(threads, kMaxThreads));
    Context context{job, std::vector<float>(static_cast<size_t>(piece * workers)), piece};
    run_tasks(workers, job.sequences * job.heads, attend_head, &context);
}

}  // namespace fracbit

#else

namespace fracbit {

bool has_causal() { return false; }
void attend_causal(const Causal&, int) {}

}  // namespace fracbit

#endif
