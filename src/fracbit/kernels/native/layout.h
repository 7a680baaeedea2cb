// How a row of packed codes is read, and the types of the numbers around it. Everything else here builds on these words.
//
// A row is read in chunks of 128 codes. A chunk has 16 lanes of 8 consecutive inputs: lane d holds inputs 8d .. 8d + 7, which is
// one 32-bit word of 4-bit codes. Blocks of weights are whole lanes, so every lane has one scale. Activations are brought into
// lane order once per call; the codes stay as they lie on disk.
#pragma once

#include <cstdint>

// Always inlined: registers must not pass through memory. And functions of a header that several instruction sets include must be
// inlined or local to their file (`static`, an unnamed namespace), since the linker keeps one copy of any other, compiled for any of them.
#if defined(__GNUC__)
#define FRACBIT_INLINE __attribute__((always_inline)) inline
#else
#define FRACBIT_INLINE inline
#endif

// Ask for memory that is needed later, into the cache of that level. Only a hint: the address may lie beyond the last row. A macro,
// since GCC takes a function that does nothing else for one without effect and may leave out the calls of it.
#if defined(__GNUC__)
#define FRACBIT_PREFETCH(address, level) __builtin_prefetch(address, 0, 4 - (level))
#else
#define FRACBIT_PREFETCH(address, level) static_cast<void>(address)
#endif

namespace fracbit {

constexpr int64_t kLaneInputs = 8;  // codes of any width fill whole bytes
constexpr int64_t kLanes = 16;      // 16 floats are one register of AVX-512, two of AVX2, four of NEON
constexpr int64_t kChunk = kLanes * kLaneInputs;

constexpr int64_t kCacheLine = 64;  // bytes; also those of a vector of codes

// For int8 activations a table value is rounded to 15 bits, step * (128 * (high - 128) + low), and looked up as two bytes.
constexpr int kLowBits = 7;
constexpr int kHighBias = 1 << kLowBits;
constexpr int kSplitBias = kHighBias << kLowBits;  // what the bias of `high` amounts to in steps
constexpr int kSplitMost = kSplitBias - 1;         // the largest value in steps; the smallest is -kSplitBias

// With float activations, codes of evenly spaced types are converted to numbers from 6 bits on. Up to 5 bits a table is faster:
// it fits into two registers of AVX-512.
constexpr int kTableBits = 5;
static constexpr bool uses_numbers(bool affine, int bits) { return affine && bits > kTableBits; }

// Entries of a table: every code of that width points inside, and a vector of 16 can be loaded.
static constexpr int64_t table_width(int bits) { return bits < 4 ? 16 : int64_t{1} << bits; }

static constexpr int64_t code_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }
static constexpr int64_t chunk_bytes(int bits) { return code_bytes(kChunk, bits); }

// The code at `index` of a bit stream of `stride` bytes.
static inline unsigned code_at(const uint8_t* row, int64_t stride, int bits, int64_t index) {
    const int64_t bit = index * bits;
    unsigned word = row[bit >> 3];
    if ((bit >> 3) + 1 < stride) word |= static_cast<unsigned>(row[(bit >> 3) + 1]) << 8;
    return (word >> (bit & 7)) & ((1u << bits) - 1u);
}

enum class Float : int { f32 = 0, f16 = 1, bf16 = 2 };

static constexpr int64_t size_of(Float type) { return type == Float::f32 ? 4 : 2; }

// Number `index` of an array of that type.
static inline const char* number_at(const void* data, Float type, int64_t index) {
    return static_cast<const char*>(data) + index * size_of(type);
}
static inline char* number_at(void* data, Float type, int64_t index) { return static_cast<char*>(data) + index * size_of(type); }

}  // namespace fracbit
