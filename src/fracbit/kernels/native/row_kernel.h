// Rows of packed codes times activations: the one kernel, written once over a set of vector operations `S` and compiled once per
// instruction set. Blocks are whole lanes here; row_decode.h takes the others.
//
// Everything is in an unnamed namespace on purpose: the same template compiled with other instruction flags must never be
// merged by the linker. For the same reason no function of the standard library is called from here.
//
// S offers: types Bytes (64 codes), Floats and Ints (16 lanes); `kOverread`, the bytes that it may read beyond a chunk; loads; and
//   unpack<bits>(p, u0, u1)   128 codes as bytes, in lane order; bits above the code may be anything
//   clean<bits>(u)            those bits cleared
//   ByteTable<bits>           table bytes of codes: load(table), look_up(u)
//   activations<again>(a)     64 of them, ready for `dot`; `again`: they are used more than once
//   dot(sum, u, a)            sum += u * a over the four bytes of a lane; u as the kernel's `high` (see Isa::biased)
//   dot_small(sum, u, a)      the same for u < 128
//   pick(scales, lane)        scales of the lanes, from 16 of them
//   total(v)                  the sum of the lanes; where `kFours`, totals(a, b, c, d, out) of four, in the same order of additions,
//                             and registers for as many sums
//   copy_part(to, from, count)  fewer than 128 bytes
//   load_as<type>(p)          16 numbers as floats; load_part<type>(p, count) fewer, then zeros
//   FloatWords<bits>          codes of a chunk: load(p), and number<j>() the j-th code of every lane as a float
//   FloatTable<bits>          table floats: load(table), and pick<j>(words) that of the j-th code of every lane
#pragma once

#include "lanes.h"
#include "row_scales.h"

namespace fracbit {
namespace {

// Bytes by which codes are asked for before they are needed, into the second-level cache: the first is too small for all that is on
// its way. Measured in docs/LOG.md.
constexpr int64_t kAhead = 8192;
constexpr int64_t kScaleRowsAhead = 4;  // at least, for scales; narrow rows pass too quickly for that few

// The chunks of some rows: those that can be read where they lie, then a padded copy of the rest.
template <class S, int bits, int rows>
struct Chunks {
    int64_t end[2];
    uint8_t rest[rows][2 * kChunk + S::kOverread];

    explicit Chunks(const Codes& codes) {
        const int64_t whole = codes.stride < S::kOverread ? 0 : (codes.stride - S::kOverread) / chunk_bytes(bits);
        end[0] = whole < codes.chunks ? whole : codes.chunks;
        end[1] = codes.chunks;
        if (end[0] != end[1]) std::memset(rest, 0, sizeof rest);
    }
    FRACBIT_INLINE void copy_rest(const Codes& codes, const uint8_t* row) {
        if (end[0] == end[1]) return;
        const int64_t first = end[0] * chunk_bytes(bits);
        for (int r = 0; r < rows; ++r) S::copy_part(rest[r], row + r * codes.stride + first, codes.stride - first);
    }
};

// Results of rows from the sums of their lanes.
template <class S, bool single, int rows, int batch>
FRACBIT_INLINE void write_rows(const RowJob& job, int64_t row, int64_t n0, float step, float per_step, const float* block_sums,
                               const typename S::Floats (&sum)[rows][batch]) {
    constexpr int all = rows * batch, fours = S::kFours ? all / 4 * 4 : 0;
    float total[rows][batch];
    if constexpr (fours > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < fours; i += 4) {
            const auto at = [&sum](int which) -> const typename S::Floats& { return sum[which / batch][which % batch]; };
            float four[4];
            S::totals(at(i), at(i + 1), at(i + 2), at(i + 3), four);
            for (int j = 0; j < 4; ++j) total[(i + j) / batch][(i + j) % batch] = four[j];
        }
    }
#pragma GCC unroll 16
    for (int i = fours; i < all; ++i) total[i / batch][i % batch] = S::total(sum[i / batch][i % batch]);
    for (int r = 0; r < rows; ++r) {
        const RowScale of_row = single ? row_scale(job, row + r, per_step) : RowScale{};
        for (int n = 0; n < batch; ++n) {
            float result = total[r][n];
            if (single) result = result * of_row.scale + of_row.shift * block_sums[n * job.sums.stride];
            job.y.at(n0 + n, row + r) = result * step;
        }
    }
}

// The `rows` rows from `row` on times `batch` rows of activations from n0 on. add(chunk, codes, stride, scales of its lanes, sums) adds a chunk.
// `single`: a row has one scale; `steps`: results are in steps.
template <class S, int bits, bool single, bool steps, int rows, int batch, class Add>
FRACBIT_INLINE void add_rows(const RowJob& job, int64_t row, int64_t n0, Chunks<S, bits, rows>& chunks, const Add& add) {
    using Floats = typename S::Floats;
    const uint8_t* codes = job.codes.row(row);
    const float* block_sums = job.sums.data + n0 * job.sums.stride;
    const float step = steps ? job.table.step(row) : 1.0f, per_step = 1.0f / step;
    chunks.copy_rest(job.codes, codes);
    Floats sum[rows][batch], sixteen[rows];
    for (int r = 0; r < rows; ++r) {
        if (!single) prefetch_scales(job, row + r + kScaleRowsAhead + kAhead / job.codes.stride);
        sixteen[r] = S::all(1.0f);
        for (int n = 0; n < batch; ++n) sum[r][n] = S::zero_floats();
    }
    int64_t c = 0, left = single ? job.codes.chunks : 0, block = 0;  // left: chunks until the next scales
    const int32_t* lane = job.lanes.lane;
    for (int half = 0; half < 2; ++half) {
        const uint8_t* p = half == 0 ? codes : chunks.rest[0];
        const int64_t ahead = half == 0 ? kAhead : codes + chunks.end[0] * chunk_bytes(bits) + kAhead - p;
        const int64_t stride = half == 0 ? job.codes.stride : static_cast<int64_t>(sizeof chunks.rest[0]);
        while (c < chunks.end[half]) {
            if (!single && left == 0) {
                for (int r = 0; r < rows; ++r) sixteen[r] = next_scales<S>(job, row + r, block, per_step, block_sums, sum[r]);
                block += kLanes;
                lane = job.lanes.lane;
                left = job.lanes.period;
            }
            const int64_t stop = c + left < chunks.end[half] ? c + left : chunks.end[half];
            left -= stop - c;
            for (; c < stop; ++c, p += chunk_bytes(bits), lane += kLanes) {
                Floats scales[rows];
                for (int r = 0; r < rows; ++r) {
                    for (int64_t i = 0; i < chunk_bytes(bits); i += kCacheLine) FRACBIT_PREFETCH(p + r * job.codes.stride + ahead + i, 2);
                    scales[r] = single ? sixteen[r] : S::pick(sixteen[r], lane);
                }
                add(c, p, stride, scales, sum);
            }
        }
    }
    write_rows<S, single, rows, batch>(job, row, n0, step, per_step, block_sums, sum);
}

// Rows taken together where all share a table. With one row of activations: what a row costs besides its chunks counts in narrow layers
// (docs/LOG.md). With more, exact ones: a load of activations then serves two rows.
template <class S>
constexpr int int8_together(int batch) {
    return S::kFours && batch == 1 ? 4 : 1;
}
template <class S>
constexpr int float_together(int batch) {
    return !S::kFours ? 1 : batch == 1 ? 4 : 2;
}

// Rows [first, last). begin(row) makes ready what belongs to a row.
template <class S, int bits, bool single, bool steps, int together, int batch, class Begin, class Add>
FRACBIT_INLINE void each_row(const RowJob& job, int64_t first, int64_t last, int64_t n0, const Begin& begin, const Add& add) {
    int64_t row = first;
    if constexpr (together > 1) {
        if (job.table.stride == 0 && first + together <= last) {
            Chunks<S, bits, together> chunks(job.codes);
            begin(first);
            for (; row + together <= last; row += together) add_rows<S, bits, single, steps, together, batch>(job, row, n0, chunks, add);
        }
    }
    Chunks<S, bits, 1> chunks(job.codes);
    for (; row < last; ++row) {
        begin(row);
        add_rows<S, bits, single, steps, 1, batch>(job, row, n0, chunks, add);
    }
}

// Sums of a chunk in steps: h0 and h1 hold the codes where these are evenly spaced; otherwise the high halves of table values, l0 and l1
// the low ones. Not arrays: GCC keeps those in memory.
template <class S, int bits, bool affine, class Bytes = typename S::Bytes>
FRACBIT_INLINE typename S::Ints dot_chunk(const Bytes& h0, const Bytes& h1, const Bytes& l0, const Bytes& l1, const int8_t* a) {
    const auto a0 = S::template activations<!affine>(a), a1 = S::template activations<!affine>(a + kChunk / 2);
    typename S::Ints sum = S::zero_ints();
    if (affine && bits < 8) return S::dot_small(S::dot_small(sum, h0, a0), h1, a1);
    sum = S::dot(S::dot(sum, h0, a0), h1, a1);
    if (affine) return sum;
    return S::dot_small(S::dot_small(S::template shift_left<kLowBits>(sum), l0, a0), l1, a1);
}

template <class S, int bits, bool affine, bool single, int batch>
void int8_rows(const Int8Job& job, int64_t first, int64_t last, int64_t n0) {
    using Floats = typename S::Floats;
    const RowJob& rows = job.rows;
    typename S::template ByteTable<bits> high, low;
    const auto begin = [&](int64_t row) {
        if (affine || (row > first && rows.table.stride == 0)) return;
        high.load(job.split.high + row * rows.table.stride);
        low.load(job.split.low + row * rows.table.stride);
    };
    const int64_t chunks = rows.codes.chunks;
    const int8_t* a = job.a + n0 * chunks * kChunk;
    const float* a_scale = job.a_scale + n0 * chunks * kLanes;
    each_row<S, bits, single, true, int8_together<S>(batch), batch>(rows, first, last, n0, begin, [&](int64_t c, const uint8_t* p, int64_t stride, const auto& scales, auto& sum) {
        constexpr int together = sizeof scales / sizeof(Floats);
#pragma GCC unroll 4
        for (int r = 0; r < together; ++r) {
            typename S::Bytes u0, u1, h0, h1, l0, l1;
            S::template unpack<bits>(p + r * stride, u0, u1);
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
                const typename S::Ints dot = dot_chunk<S, bits, affine>(h0, h1, l0, l1, a + (n * chunks + c) * kChunk);
                Floats both = S::load(a_scale + (n * chunks + c) * kLanes);
                if (!single) both = S::multiply(scales[r], both);
                sum[r][n] = S::fma(S::to_floats(dot), both, sum[r][n]);
            }
        }
    });
}

// The j-th input of every lane and those after it.
template <class S, int bits, bool number, int j, int together, int batch>
FRACBIT_INLINE void float_step(const typename S::template FloatWords<bits> (&words)[together], const typename S::template FloatTable<bits>& table,
                               const float* const (&x)[batch], typename S::Floats (&part)[together][batch]) {
    if constexpr (j < kLaneInputs) {
        typename S::Floats w[together];
        for (int r = 0; r < together; ++r) {
            if constexpr (number) {
                w[r] = words[r].template number<j>();
            } else {
                w[r] = table.template pick<j>(words[r]);
            }
        }
        for (int n = 0; n < batch; ++n) {
            const typename S::Floats own = S::load(x[n] + j * kLanes);
            for (int r = 0; r < together; ++r) part[r][n] = S::fma(w[r], own, part[r][n]);
        }
        float_step<S, bits, number, j + 1, together, batch>(words, table, x, part);
    }
}

// `number`: the value is step * (code + bias), and the code is converted.
template <class S, int bits, bool number, bool single, int batch>
void float_rows(const FloatJob& job, int64_t first, int64_t last, int64_t n0) {
    using Floats = typename S::Floats;
    const RowJob& rows = job.rows;
    typename S::template FloatTable<bits> table;
    const auto begin = [&](int64_t row) {
        if (!number && (row == first || rows.table.stride != 0)) table.load(rows.table.row(row));
    };
    each_row<S, bits, single, number, float_together<S>(batch), batch>(rows, first, last, n0, begin, [&](int64_t c, const uint8_t* p, int64_t stride, const auto& scales, auto& sum) {
        constexpr int together = sizeof scales / sizeof(Floats);
        typename S::template FloatWords<bits> words[together];
        Floats part[together][batch];
        const float* x[batch];
        for (int n = 0; n < batch; ++n) x[n] = job.x + ((n0 + n) * rows.codes.chunks + c) * kChunk;
        for (int r = 0; r < together; ++r) {
            words[r].load(p + r * stride);
            for (int n = 0; n < batch; ++n) part[r][n] = S::zero_floats();
        }
        float_step<S, bits, number, 0, together, batch>(words, table, x, part);
        for (int r = 0; r < together; ++r)
            for (int n = 0; n < batch; ++n) sum[r][n] = S::fma(part[r][n], scales[r], sum[r][n]);
    });
}

}  // namespace
}  // namespace fracbit
