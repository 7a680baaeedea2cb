// Rows of codes to floats in natural order, for the tiles of a prompt, and the product of blocks that are not whole lanes, which
// decodes each row first.
#pragma once

#include "isa.h"
#include "row_scales.h"

namespace fracbit {
namespace {

// Table values of a row. Eight codes fill `bits` bytes, so they lie in one 64-bit word.
inline void look_up_row(const Codes& codes, int64_t row, const float* values, float* out) {
    const uint8_t* bytes = codes.row(row);
    const int64_t stride = codes.stride, coded = codes.coded;
    const int bits = codes.bits;
    const unsigned mask = (1u << bits) - 1u;
    int64_t i = 0;
    for (; i / 8 * bits + 8 <= stride && i + 8 <= coded; i += 8) {
        uint64_t word;
        std::memcpy(&word, bytes + i / 8 * bits, 8);
        for (int j = 0; j < 8; ++j) out[i + j] = values[(word >> (j * bits)) & mask];
    }
    for (; i < coded; ++i) out[i] = values[code_at(bytes, stride, bits, i)];
}

// Weights of a row, scale * value + offset, block by block.
inline void weights_of_row(const DecodeJob& job, const Isa& isa, int64_t row, float* out) {
    const Scales& scales = job.scales;
    const float* values = job.table.row(row);
    const int64_t coded = job.codes.coded, size = job.blocks.size;
    isa.look_up(job.codes, row, values, out);
    if (scales.values == nullptr) return;
    const int64_t begin = job.blocks.flat ? row * coded : 0;  // of the row, in the numbering of its blocks
    const int64_t first = job.blocks.flat ? 0 : row * scales.stride;
    for (int64_t i = 0; i < coded;) {
        const int64_t block = (begin + i) / size, index = first + block;
        int64_t end = (block + 1) * size - begin;
        if (end > coded) end = coded;
        const float scale = scale_at(scales, scales.values, index);
        float offset = 0.0f;
        if (scales.offsets != nullptr) offset = scale_at(scales, scales.offsets, index);
        if (scales.zeros != nullptr) offset = -scale * values[scales.zeros[index]];
        for (; i < end; ++i) out[i] = out[i] * scale + offset;
    }
}

inline void multiply_decoded(const DecodedJob& job, const Isa& isa, int64_t first, int64_t last) {
    const Codes& codes = job.rows.codes;
    for (int64_t row = first; row < last; ++row) {
        weights_of_row(job.rows, isa, row, job.weights);
        for (int64_t n = 0; n < job.batch; ++n)
            job.y.at(n, row) = dot_floats(job.weights, job.x + n * codes.chunks * kChunk, codes.coded);
    }
}

}  // namespace
}  // namespace fracbit
