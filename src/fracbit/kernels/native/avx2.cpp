// AVX2 with FMA: x86 processors since 2013. A vector of sixteen lanes is two registers.
//
// Products of unsigned and signed bytes can overflow here: vpmaddubsw adds two of them in 16 bits. Bytes below 128 fit. From the others
// (the high half of a table, 8-bit codes) 128 is subtracted; their magnitude stays unsigned and their sign goes to the activation, so
// that no sum exceeds 2 * 128 * 127.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include "isa_of.h"

namespace fracbit {
namespace {

struct Avx2 {
    struct Floats {
        __m256 half[2];
    };
    struct Ints {
        __m256i half[2];
    };
    struct Bytes {
        __m256i half[2];
    };
    static constexpr int kOverread = 16;  // words are read as whole registers
    static constexpr bool kFours = false;
    static void copy_part(uint8_t* to, const uint8_t* from, int64_t count) { std::memcpy(to, from, static_cast<size_t>(count)); }

    static Floats zero_floats() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
    static Ints zero_ints() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
    static Floats load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
    template <Float type>
    static Floats load_as(const void* p) {
        if constexpr (type == Float::f32) return load(static_cast<const float*>(p));
        const auto* halves = static_cast<const __m128i*>(p);
        Floats to;
        for (int i = 0; i < 2; ++i) {
            const __m128i half = _mm_loadu_si128(halves + i);
            if constexpr (type == Float::f16) {
                to.half[i] = _mm256_cvtph_ps(half);
            } else {
                to.half[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
            }
        }
        return to;
    }
    template <Float type>
    static Floats load_part(const void* p, int64_t count) {
        float some[kLanes] = {};
        floats_from(p, type, count, some);
        return load(some);
    }
    static Floats all(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
    static void store(const Floats& v, float* p) {
        _mm256_storeu_ps(p, v.half[0]);
        _mm256_storeu_ps(p + 8, v.half[1]);
    }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
    }
    static Floats multiply(const Floats& a, const Floats& b) {
        return {{_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1])}};
    }
    static Floats to_floats(const Ints& v) { return {{_mm256_cvtepi32_ps(v.half[0]), _mm256_cvtepi32_ps(v.half[1])}}; }
    static float total(const Floats& v) {
        const __m256 eight = _mm256_add_ps(v.half[0], v.half[1]);
        __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        four = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
    }
    template <int count>
    static Ints shift_left(const Ints& v) { return {{_mm256_slli_epi32(v.half[0], count), _mm256_slli_epi32(v.half[1], count)}}; }

    // Lane positions lie in 0..15: a permutation of each half and a choice by bit 3.
    static Floats pick(const Floats& from, const int32_t* lane) {
        Floats to;
        for (int i = 0; i < 2; ++i) {
            const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane + 8 * i));
            const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            to.half[i] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(from.half[0], index),
                                          _mm256_permutevar8x32_ps(from.half[1], index), upper);
        }
        return to;
    }

    using Activations = const int8_t*;
    template <bool again>
    static Activations activations(const int8_t* a) { return a; }
    static __m256i sum_pairs(__m256i sum, __m256i pairs) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static Ints dot_small(const Ints& sum, const Bytes& u, Activations a) {
        Ints to;
        for (int i = 0; i < 2; ++i) {
            const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + 32 * i));
            to.half[i] = sum_pairs(sum.half[i], _mm256_maddubs_epi16(u.half[i], other));
        }
        return to;
    }
    static Ints dot(const Ints& sum, const Bytes& u, Activations a) {
        Ints to;
        for (int i = 0; i < 2; ++i) {
            const __m256i other = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + 32 * i));
            const __m256i v = _mm256_xor_si256(u.half[i], _mm256_set1_epi8(static_cast<char>(kHighBias)));  // u - 128
            to.half[i] = sum_pairs(sum.half[i], _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(other, v)));
        }
        return to;
    }

    // One word per lane with its codes 4 * part .. 4 * part + 3 in the low 4 * bits; above them anything.
    template <int bits, int part>
    static Bytes words(const uint8_t* p) {
        constexpr int first = 4 * part * bits;  // bit within the lane
        Bytes to;
        for (int i = 0; i < 2; ++i) {
            __m256i z;
            if constexpr (bits == 8) {
                const auto* source = reinterpret_cast<const float*>(p + 64 * i);
                const __m256 low = _mm256_loadu_ps(source), high = _mm256_loadu_ps(source + 8);
                const __m256 mixed = _mm256_shuffle_ps(low, high, part == 0 ? 0x88 : 0xdd);
                z = _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xd8);
            } else if constexpr (bits == 4) {
                z = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i));
            } else if constexpr (bits == 2) {
                z = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
            } else if constexpr (bits == 1) {
                z = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i)));
            } else {  // every lane starts at a byte
                const __m256i lane = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
                z = _mm256_i32gather_epi32(reinterpret_cast<const int*>(p + 8 * bits * i + first / 8), lane, 1);
            }
            constexpr int shift = bits == 8 ? 0 : bits <= 2 || bits == 4 ? first : first % 8;
            to.half[i] = _mm256_srli_epi32(z, shift);
        }
        return to;
    }

    // Four codes side by side to four bytes: the upper pair moves to the upper half, then every second one to its byte.
    template <int bits>
    static __m256i to_bytes(__m256i z) {
        if constexpr (bits == 8) return z;
        constexpr uint32_t pair = (1u << (2 * bits)) - 1u, one = (1u << bits) - 1u;
        const auto all = [](uint32_t mask) { return _mm256_set1_epi32(static_cast<int>(mask)); };
        z = _mm256_or_si256(_mm256_and_si256(z, all(pair)), _mm256_and_si256(_mm256_slli_epi32(z, 16 - 2 * bits), all(pair << 16)));
        return _mm256_or_si256(_mm256_and_si256(z, all(one * 0x00010001u)),
                               _mm256_and_si256(_mm256_slli_epi32(z, 8 - bits), all(one * 0x01000100u)));
    }

    template <int bits>
    static void unpack(const uint8_t* p, Bytes& u0, Bytes& u1) {
        u0 = words<bits, 0>(p);
        if constexpr (bits == 4) {
            const __m256i mask = _mm256_set1_epi8(15);
            for (int i = 0; i < 2; ++i) {
                u1.half[i] = _mm256_and_si256(_mm256_srli_epi16(u0.half[i], 4), mask);
                u0.half[i] = _mm256_and_si256(u0.half[i], mask);
            }
        } else {
            u1 = words<bits, 1>(p);
            for (int i = 0; i < 2; ++i) {
                u0.half[i] = to_bytes<bits>(u0.half[i]);
                u1.half[i] = to_bytes<bits>(u1.half[i]);
            }
        }
    }
    template <int bits>
    static Bytes clean(const Bytes& u) { return u; }

    // pshufb looks up 16 entries; bits 4 and up choose among several tables, halving their number at each step.
    template <int bits>
    struct ByteTable {
        static constexpr int kParts = bits <= 4 ? 1 : 1 << (bits - 4);
        const uint8_t* memory = nullptr;
        void load(const uint8_t* table) { memory = table; }
        __m256i part(int i) const {
            return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(memory + 16 * i)));
        }
        Bytes look_up(const Bytes& u) const {
            Bytes to;
            for (int i = 0; i < 2; ++i) {
                const __m256i low = _mm256_and_si256(u.half[i], _mm256_set1_epi8(15));
                __m256i found[kParts];
                for (int j = 0; j < kParts; ++j) found[j] = _mm256_shuffle_epi8(part(j), low);
                for (int bit = 4, count = kParts / 2; count > 0; ++bit, count /= 2) {
                    const __m256i choice = _mm256_sll_epi16(u.half[i], _mm_cvtsi32_si128(7 - bit));  // that bit on top of its byte
                    for (int j = 0; j < count; ++j) found[j] = _mm256_blendv_epi8(found[2 * j], found[2 * j + 1], choice);
                }
                to.half[i] = found[0];
            }
            return to;
        }
    };

    template <int bits>
    struct FloatWords {
        Bytes part[2];
        void load(const uint8_t* p) {
            part[0] = words<bits, 0>(p);
            part[1] = words<bits, 1>(p);
        }
        template <int j>
        __m256i index(int i) const {
            const __m256i z = _mm256_srli_epi32(part[j / 4].half[i], bits * (j % 4));
            return _mm256_and_si256(z, _mm256_set1_epi32((1 << bits) - 1));
        }
        template <int j>
        Floats number() const {
            return {{_mm256_cvtepi32_ps(index<j>(0)), _mm256_cvtepi32_ps(index<j>(1))}};
        }
    };

    template <int bits>
    struct FloatTable {
        Floats part;
        const float* memory = nullptr;
        void load(const float* table) {
            memory = table;
            part = Avx2::load(table);
        }
        template <int j>
        Floats pick(const FloatWords<bits>& words) const {
            Floats to;
            for (int i = 0; i < 2; ++i) {
                const __m256i index = words.template index<j>(i);
                if constexpr (bits <= 3) {
                    to.half[i] = _mm256_permutevar8x32_ps(part.half[0], index);
                } else if constexpr (bits == 4) {
                    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
                    to.half[i] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(part.half[0], index),
                                                  _mm256_permutevar8x32_ps(part.half[1], index), upper);
                } else {
                    to.half[i] = _mm256_i32gather_ps(memory, index, 4);
                }
            }
            return to;
        }
    };

    static void to_float(const void* from, Float type, int64_t count, float* to) {
        if (type != Float::f16) return floats_from(from, type, count, to);
        const auto* source = static_cast<const uint16_t*>(from);
        int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
        for (; i < count; ++i) to[i] = half_to_float(source[i]);
    }
};

constexpr Isa kAvx2 = isa_of<Avx2>("avx2", false);

}  // namespace

const Isa* isa_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &kAvx2 : nullptr;
}

}  // namespace fracbit
#else
namespace fracbit {
const Isa* isa_avx2() { return nullptr; }
}  // namespace fracbit
#endif
