// Half of x^T x: tiles of the upper triangle, each kept in registers over a run of tokens, then mirrored.
//
// Two tokens of a column are put side by side in 32 bits, as the instruction takes them, and the columns are cut into panels that stay
// in a core's second-level cache for a run of tokens. Both operands of a tile are such panels: one is read 16 columns at a time, the
// other one column at a time. Products of two bfloat16 are exact in fp32, so only the sums are rounded.
#include "gram.h"

#include <algorithm>
#include <vector>

#include "pool.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>

namespace fracbit {
namespace {

constexpr int64_t kVector = 16;           // floats, or pairs of bfloat16, of a register
constexpr int64_t kPanel = 3 * kVector;   // columns; 8 x 48 sums fill 24 of 32 registers
constexpr int64_t kRows = 8;
constexpr int64_t kPairs = 256;  // of tokens in a run: a panel takes 48 kB
constexpr int64_t kMirror = 32;  // columns and rows mirrored at a time: both squares stay in the first-level cache

struct Job {
    const uint16_t* x;
    int64_t stride, tokens, width, panels;
    float* g;
    int64_t first, pairs;           // of the current run
    std::vector<uint32_t> columns;  // [panels, kPairs, kPanel]
};

void pack_panel(void* context, int64_t panel, int) {
    Job& job = *static_cast<Job*>(context);
    uint32_t* out = job.columns.data() + panel * kPairs * kPanel;
    const int64_t begin = panel * kPanel, count = std::min(kPanel, job.width - begin);
    for (int64_t pair = 0; pair < job.pairs; ++pair, out += kPanel) {
        const int64_t token = job.first + 2 * pair;
        const uint16_t* even = job.x + token * job.stride + begin;
        const uint16_t* odd = even + job.stride;
        const bool both = token + 1 < job.tokens;
        for (int64_t i = 0; i < count; ++i) out[i] = even[i] | (both ? static_cast<uint32_t>(odd[i]) << 16 : 0U);
        std::fill(out + count, out + kPanel, 0U);
    }
}

// Rows [row, row + kRows) against the panel at column `column`: `left` and `right` are their packed panels.
void add_tile(const Job& job, const uint32_t* left, const uint32_t* right, int64_t row, int64_t column) {
    __m512 sums[kRows][3];
    for (auto& line : sums)
        for (auto& sum : line) sum = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < job.pairs; ++pair, left += kPanel, right += kPanel) {
        const auto b0 = (__m512bh)_mm512_loadu_si512(right);
        const auto b1 = (__m512bh)_mm512_loadu_si512(right + kVector);
        const auto b2 = (__m512bh)_mm512_loadu_si512(right + 2 * kVector);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) {
            const auto a = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[i]));
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], a, b0);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], a, b1);
            sums[i][2] = _mm512_dpbf16_ps(sums[i][2], a, b2);
        }
    }
    const int64_t rows = std::min(kRows, job.width - row);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < 3; ++k) {
            const int64_t left_over = job.width - column - kVector * k;
            if (left_over <= 0) break;
            const __mmask16 mask = left_over >= kVector ? 0xFFFF : static_cast<__mmask16>((1U << left_over) - 1);
            float* place = job.g + (row + i) * job.width + column + kVector * k;
            _mm512_mask_storeu_ps(place, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, place), sums[i][k]));
        }
    }
}

void add_panel(void* context, int64_t panel, int) {
    const Job& job = *static_cast<const Job*>(context);
    const uint32_t* own = job.columns.data() + panel * kPairs * kPanel;
    for (int64_t other = panel; other < job.panels; ++other) {
        const uint32_t* right = job.columns.data() + other * kPairs * kPanel;
        for (int64_t i = 0; i < kPanel && panel * kPanel + i < job.width; i += kRows)
            add_tile(job, own + i, right, panel * kPanel + i, other * kPanel);
    }
}

void mirror(float* g, int64_t width) {
    for (int64_t a = 0; a < width; a += kMirror)
        for (int64_t b = 0; b <= a; b += kMirror)
            for (int64_t i = a; i < std::min(a + kMirror, width); ++i)
                for (int64_t j = b; j < std::min(b + kMirror, i); ++j) g[i * width + j] = g[j * width + i];
}

}  // namespace

bool has_gram() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16"); }

void add_gram(const uint16_t* x, int64_t stride, int64_t tokens, int64_t width, float* g, int threads) {
    Job job{x, stride, tokens, width, (width + kPanel - 1) / kPanel, g, 0, 0, {}};
    job.columns.resize(static_cast<size_t>(job.panels * kPairs * kPanel));
    for (; job.first < tokens; job.first += 2 * kPairs) {
        job.pairs = std::min(kPairs, (tokens - job.first + 1) / 2);
        run_tasks(threads, job.panels, pack_panel, &job);
        run_tasks(threads, job.panels, add_panel, &job);
    }
    mirror(g, width);
}

}  // namespace fracbit

#else

namespace fracbit {

bool has_gram() { return false; }
void add_gram(const uint16_t*, int64_t, int64_t, int64_t, float*, int) {}

}  // namespace fracbit

#endif
