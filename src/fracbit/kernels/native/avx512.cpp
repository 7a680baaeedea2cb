// AVX-512 with VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later.
//
// A table of up to 64 entries is one register: vpermb reads 6 bits of an index and ignores the rest, so a table that is
// repeated to fill 64 entries needs no mask. vpmultishiftqb cuts eight codes of any width out of a 64-bit word.
#include "isa.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include "isa_of.h"

namespace fracbit {
namespace {

// Control of vpermb that spreads groups of eight codes (`bits` bytes each) over lanes of `width` bytes. The rest of a lane takes
// the last byte, which the masked load has cleared.
template <int bits, int width>
struct Spread {
    alignas(64) uint8_t control[64];
    constexpr Spread() : control() {
        for (int i = 0; i < 64; ++i) control[i] = static_cast<uint8_t>(i % width < bits ? i / width * bits + i % width : 63);
    }
};

// Control of vpmultishiftqb: the bit at which each byte of a 64-bit word starts. `width` bytes hold one lane.
template <int bits, int width, int half>
struct Cut {
    alignas(64) uint8_t control[64];
    constexpr Cut() : control() {
        for (int i = 0; i < 64; ++i) {
            const int in_word = i % 8;
            control[i] = width == 8 ? static_cast<uint8_t>(bits * in_word)
                                    : static_cast<uint8_t>(32 * (in_word / 4) + bits * (4 * half + in_word % 4));
        }
    }
};

template <int bits, int width>
inline __m512i spread(__m512i z) {
    static constexpr Spread<bits, width> table{};
    return _mm512_permutexvar_epi8(_mm512_load_si512(table.control), z);
}

template <int bits, int width, int half>
inline __m512i cut(__m512i z) {
    static constexpr Cut<bits, width, half> table{};
    return _mm512_multishift_epi64_epi8(_mm512_load_si512(table.control), z);
}

// Keeps a loaded vector in its register: GCC would repeat the load in every instruction that uses it, and loads are scarce.
inline __m512i loaded(__m512i v) {
#if defined(__GNUC__)
    asm("" : "+v"(v));
#endif
    return v;
}

struct Avx512 {
    using Floats = __m512;
    using Ints = __m512i;
    using Bytes = __m512i;
    static constexpr int kOverread = 0;
    static constexpr bool kFours = true;

    static Floats zero_floats() { return _mm512_setzero_ps(); }
    static Ints zero_ints() { return _mm512_setzero_si512(); }
    static Floats load(const float* p) { return _mm512_loadu_ps(p); }
    template <Float type>
    static Floats load_as(const void* p) {
        if constexpr (type == Float::f32) return _mm512_loadu_ps(p);
        const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
        if constexpr (type == Float::f16) return _mm512_cvtph_ps(half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    template <Float type>
    static Floats load_part(const void* p, int64_t count) {
        const auto some = static_cast<__mmask16>((1u << count) - 1u);
        if constexpr (type == Float::f32) return _mm512_maskz_loadu_ps(some, p);
        const __m256i half = _mm256_maskz_loadu_epi16(some, p);
        if constexpr (type == Float::f16) return _mm512_cvtph_ps(half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    static Floats all(float value) { return _mm512_set1_ps(value); }
    static void store(Floats v, float* p) { _mm512_storeu_ps(p, v); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
    static float total(Floats v) {
        const __m512 half = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e)), quarter = _mm512_add_ps(half, _mm512_permute_ps(half, 0xb1));
        return _mm_cvtss_f32(over_lanes(quarter));
    }
    static void totals(Floats v0, Floats v1, Floats v2, Floats v3, float* out) {
        const __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
        const __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
        const __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
        const __m512 quarter = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
        _mm_storeu_ps(out, over_lanes(quarter));
    }
    static __m128 over_lanes(__m512 v) {
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    static void copy_part(uint8_t* to, const uint8_t* from, int64_t count) {
        for (int64_t i = 0; i < count; i += 64) {
            const __mmask64 some = count - i >= 64 ? ~0ull : (1ull << (count - i)) - 1;
            _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi8(some, from + i));
        }
    }
    template <int count>
    static Ints shift_left(Ints v) { return _mm512_slli_epi32(v, count); }
    static Floats pick(Floats scales, const int32_t* lane) { return _mm512_permutexvar_ps(_mm512_loadu_si512(lane), scales); }
    using Activations = __m512i;
    template <bool again>
    static Activations activations(const int8_t* a) {
        const __m512i v = _mm512_loadu_si512(a);
        return again ? loaded(v) : v;
    }
    static Ints dot(Ints sum, Bytes u, Activations a) { return _mm512_dpbusd_epi32(sum, u, a); }
    static Ints dot_small(Ints sum, Bytes u, Activations a) { return dot(sum, u, a); }

    // One word of eight codes per lane, for widths up to 4.
    template <int bits>
    static __m512i words(const uint8_t* p) {
        if constexpr (bits == 4) return loaded(_mm512_loadu_si512(p));
        if constexpr (bits == 3) return spread<3, 4>(_mm512_maskz_loadu_epi8(0xffffffffffffull, p));
        if constexpr (bits == 2) return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        if constexpr (bits == 1) return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }

    template <int bits>
    static void unpack(const uint8_t* p, Bytes& u0, Bytes& u1) {
        if constexpr (bits == 4) {
            u0 = loaded(_mm512_loadu_si512(p));
            u1 = _mm512_srli_epi16(u0, 4);
        } else if constexpr (bits < 4) {
            const __m512i z = words<bits>(p);
            u0 = cut<bits, 4, 0>(z);
            u1 = cut<bits, 4, 1>(z);
        } else {
            constexpr __mmask64 half = bits == 8 ? ~0ull : (1ull << (8 * bits % 64)) - 1;
            __m512i low = _mm512_maskz_loadu_epi8(half, p), high = _mm512_maskz_loadu_epi8(half, p + 8 * bits);
            if constexpr (bits < 8) {  // eight codes per 64-bit word, in natural order
                low = cut<bits, 8, 0>(spread<bits, 8>(low));
                high = cut<bits, 8, 0>(spread<bits, 8>(high));
            }
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            u0 = _mm512_permutex2var_epi32(low, even, high);
            u1 = _mm512_permutex2var_epi32(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
        }
    }

    template <int bits>
    static Bytes clean(Bytes u) {
        if constexpr (bits == 8) return u;
        return _mm512_and_si512(u, _mm512_set1_epi8(static_cast<char>((1 << bits) - 1)));
    }

    template <int bits>
    struct ByteTable {
        static constexpr int kParts = bits <= 6 ? 1 : bits == 7 ? 2 : 4;
        __m512i part[kParts];
        void load(const uint8_t* table) {
            if constexpr (bits <= 4) {
                __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
                if constexpr (bits == 3) t = _mm_unpacklo_epi64(t, t);
                if constexpr (bits == 2) t = _mm_shuffle_epi32(t, 0);
                if constexpr (bits == 1) t = _mm_set1_epi16(static_cast<int16_t>(_mm_extract_epi16(t, 0)));
                part[0] = _mm512_broadcast_i32x4(t);
            } else if constexpr (bits == 5) {
                part[0] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
            } else {
                for (int i = 0; i < kParts; ++i) part[i] = _mm512_loadu_si512(table + 64 * i);
            }
        }
        Bytes look_up(Bytes u) const {
            if constexpr (bits <= 6) return _mm512_permutexvar_epi8(u, part[0]);
            if constexpr (bits == 7) return _mm512_permutex2var_epi8(part[0], u, part[1]);
            if constexpr (bits == 8)
                return _mm512_mask_mov_epi8(_mm512_permutex2var_epi8(part[0], u, part[1]), _mm512_movepi8_mask(u),
                                            _mm512_permutex2var_epi8(part[2], u, part[3]));
        }
    };

    template <int bits>
    struct FloatWords {
        __m512i word[2];
        void load(const uint8_t* p) {
            if constexpr (bits <= 4) {
                word[0] = words<bits>(p);
            } else {
                unpack<bits>(p, word[0], word[1]);
            }
        }
        template <int j>
        __m512i index() const {
            if constexpr (bits <= 4) return _mm512_srli_epi32(word[0], bits * j);
            return _mm512_srli_epi32(word[j / 4], 8 * (j % 4));
        }
        template <int j>
        Floats number() const {
            return _mm512_cvtepi32_ps(_mm512_and_si512(index<j>(), _mm512_set1_epi32((1 << bits) - 1)));
        }
    };

    template <int bits>
    struct FloatTable {
        __m512 part[4];
        const float* memory = nullptr;
        void load(const float* table) {
            memory = table;
            if constexpr (bits == 5 || bits == 6) {
                for (int i = 0; i < 1 << (bits - 4); ++i) part[i] = _mm512_loadu_ps(table + 16 * i);
            } else if constexpr (bits <= 4) {  // repeated: the instruction reads four bits of the index
                const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                const __m512i repeat = _mm512_and_si512(lane, _mm512_set1_epi32((1 << bits) - 1));
                part[0] = _mm512_permutexvar_ps(repeat, _mm512_loadu_ps(table));
            }
        }
        template <int j>
        Floats pick(const FloatWords<bits>& words) const {
            return at(words.template index<j>());
        }
        Floats at(__m512i index) const {
            if constexpr (bits <= 4) return _mm512_permutexvar_ps(index, part[0]);
            if constexpr (bits == 5) return _mm512_permutex2var_ps(part[0], index, part[1]);
            if constexpr (bits == 6)
                return _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), _mm512_permutex2var_ps(part[0], index, part[1]),
                                            _mm512_permutex2var_ps(part[2], index, part[3]));
            return _mm512_i32gather_ps(_mm512_and_si512(index, _mm512_set1_epi32((1 << bits) - 1)), memory, 4);
        }
    };

    static void to_float(const void* from, Float type, int64_t count, float* to) {
        const auto* source = static_cast<const uint16_t*>(from);
        int64_t i = 0;
        if (type == Float::f16) {
            for (; i + 16 <= count; i += 16)
                _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
            if (i < count) {
                const auto rest = static_cast<__mmask16>((1u << (count - i)) - 1u);
                _mm512_mask_storeu_ps(to + i, rest, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(rest, source + i)));
            }
            return;
        }
        floats_from(from, type, count, to);
    }

    static void from_float(const float* from, Float type, int64_t count, void* to) {
        if (type != Float::f16) return floats_to(from, type, count, to);
        auto* target = static_cast<uint16_t*>(to);
        for (int64_t i = 0; i < count; i += 16) {
            const auto some = static_cast<__mmask16>(count - i >= 16 ? 0xffffu : (1u << (count - i)) - 1u);
            _mm256_mask_storeu_epi16(target + i, some, _mm512_cvtps_ph(_mm512_maskz_loadu_ps(some, from + i), _MM_FROUND_TO_NEAREST_INT));
        }
    }
};

constexpr int64_t kLookUp = 64;  // codes at a time, in natural order: a register of bytes

template <int bits>
void look_up_codes(const Codes& codes, int64_t row, const float* values, float* out) {
    Avx512::FloatTable<bits> table;
    table.load(values);
    const uint8_t* from = codes.row(row);
    for (int64_t i = 0; i < codes.coded; i += kLookUp) {
        const int64_t first = code_bytes(i, bits), bytes = codes.stride - first;
        const __mmask64 there = bytes >= 8 * bits ? ~0ull >> (64 - 8 * bits) : (1ull << bytes) - 1;
        __m512i z = _mm512_maskz_loadu_epi8(there, from + first);
        if constexpr (bits < 8) z = cut<bits, 8, 0>(spread<bits, 8>(z));
        const __m128i part[4] = {_mm512_castsi512_si128(z), _mm512_extracti32x4_epi32(z, 1), _mm512_extracti32x4_epi32(z, 2),
                                 _mm512_extracti32x4_epi32(z, 3)};
        for (int64_t j = 0, left = codes.coded - i; j < 4 && left > 0; ++j, left -= 16) {
            const auto some = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
            _mm512_mask_storeu_ps(out + i + 16 * j, some, table.at(_mm512_cvtepu8_epi32(part[j])));
        }
    }
}

// Tables of more than four registers stay in memory, where gathering 16 numbers takes longer than one after another.
void look_up512(const Codes& codes, int64_t row, const float* values, float* out) {
    if (codes.bits > 6) return look_up_row(codes, row, values, out);
    constexpr void (*of[])(const Codes&, int64_t, const float*, float*) = {
        look_up_codes<1>, look_up_codes<2>, look_up_codes<3>, look_up_codes<4>, look_up_codes<5>, look_up_codes<6>};
    of[codes.bits - 1](codes, row, values, out);
}

// 16 x 8 transposition: input 8d + j of a chunk to plane j, lane d. Three rounds of two-register permutations.
FRACBIT_INLINE void transpose_chunk(__m512 (&v)[8]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int round = 0; round < 3; ++round) {  // each round rotates the seven bits of the index by one
        __m512 w[8];
        for (int i = 0; i < 4; ++i) {
            w[i] = _mm512_permutex2var_ps(v[2 * i], even, v[2 * i + 1]);
            w[i + 4] = _mm512_permutex2var_ps(v[2 * i], odd, v[2 * i + 1]);
        }
        for (int i = 0; i < 8; ++i) v[i] = w[i];
    }
}

void transpose512(const float* natural, int64_t chunks, float* lanes) {
    for (int64_t c = 0; c < chunks; ++c) {
        __m512 v[8];
        for (int i = 0; i < 8; ++i) v[i] = _mm512_loadu_ps(natural + c * kChunk + 16 * i);
        transpose_chunk(v);
        for (int i = 0; i < 8; ++i) _mm512_storeu_ps(lanes + c * kChunk + i * kLanes, v[i]);
    }
}

// A chunk of quantize_lanes of lanes.h, which says what it does. Compared as integers, NaN and Inf are the largest magnitudes. `x`
// may be null.
FRACBIT_INLINE void quantize_chunk(const __m512 (&plane)[8], const int* order, float* x, const RoundedLanes& to) {
    __m512i most = _mm512_setzero_si512();
    for (const __m512 v : plane) most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(v)));
    const __m512 top = _mm512_castsi512_ps(most), poison = _mm512_mul_ps(top, _mm512_setzero_ps());
    const __mmask16 usable = _mm512_cmp_ps_mask(top, _mm512_set1_ps(kLeastTop), _CMP_GE_OQ) & _mm512_cmp_ps_mask(poison, poison, _CMP_ORD_Q);
    const __m512 inverse = _mm512_maskz_div_ps(usable, _mm512_set1_ps(kByteMost), top);
    const __m512 scale = _mm512_add_ps(_mm512_maskz_mul_ps(usable, top, _mm512_set1_ps(1.0f / kByteMost)), poison);
    __m512i sum = _mm512_setzero_si512(), word[2] = {sum, sum};
    for (int j = 0; j < 8; ++j) {
        const __m512i q = _mm512_maskz_cvtps_epi32(usable, _mm512_mul_ps(plane[order[j]], inverse));
        sum = _mm512_add_epi32(sum, q);
        word[j / 4] = _mm512_or_si512(word[j / 4], _mm512_slli_epi32(_mm512_and_si512(q, _mm512_set1_epi32(255)), 8 * (j % 4)));
        if (x != nullptr) _mm512_storeu_ps(x + order[j] * kLanes, _mm512_mul_ps(_mm512_cvtepi32_ps(q), scale));
    }
    _mm512_storeu_si512(to.a, word[0]);
    _mm512_storeu_si512(to.a + kChunk / 2, word[1]);
    _mm512_storeu_ps(to.scale, scale);
    _mm512_storeu_ps(to.sum, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale));
}

template <bool nibbles>
void quantize_chunks(float* x, int64_t chunks, const RoundedLanes& to) {
    for (int64_t c = 0; c < chunks; ++c) {
        __m512 plane[8];
        for (int j = 0; j < 8; ++j) plane[j] = _mm512_loadu_ps(x + c * kChunk + j * kLanes);
        quantize_chunk(plane, nibbles ? kNibbles : kNatural, x + c * kChunk, to.from(c));
    }
}

void quantize512(float* x, int64_t chunks, int bits, const RoundedLanes& to) {
    (bits == 4 ? quantize_chunks<true> : quantize_chunks<false>)(x, chunks, to);
}

template <bool nibbles, Float type>
void fold_chunks(const float* natural, const void* scales, int64_t chunks, const RoundedLanes& to) {
    for (int64_t c = 0; c < chunks; ++c) {
        __m512 v[8];
        for (int i = 0; i < 8; ++i) {
            const int64_t first = c * kChunk + 16 * i;
            v[i] = _mm512_mul_ps(_mm512_loadu_ps(natural + first), Avx512::load_as<type>(number_at(scales, type, first)));
        }
        transpose_chunk(v);
        quantize_chunk(v, nibbles ? kNibbles : kNatural, nullptr, to.from(c));
    }
}

template <bool nibbles>
void fold_as(const float* natural, const void* scales, Float type, int64_t chunks, const RoundedLanes& to) {
    const auto fold = type == Float::f16    ? fold_chunks<nibbles, Float::f16>
                      : type == Float::bf16 ? fold_chunks<nibbles, Float::bf16>
                                            : fold_chunks<nibbles, Float::f32>;
    fold(natural, scales, chunks, to);
}

// In registers from beginning to end: along out every group of rows does this.
void fold512(const float* natural, const void* scales, Float type, int64_t chunks, int bits, const RoundedLanes& to) {
    (bits == 4 ? fold_as<true> : fold_as<false>)(natural, scales, type, chunks, to);
}

constexpr Isa avx512() {
    Isa isa = isa_of<Avx512>("avx512", true);
    isa.transpose = transpose512;
    isa.quantize = quantize512;
    isa.fold = fold512;
    isa.from_float = Avx512::from_float;
    isa.look_up = look_up512;
    return isa;
}
constexpr Isa kAvx512 = avx512();

}  // namespace

const Isa* isa_avx512() {
    __builtin_cpu_init();
    const bool present = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return present ? &kAvx512 : nullptr;
}

}  // namespace fracbit
#else
namespace fracbit {
const Isa* isa_avx512() { return nullptr; }
}  // namespace fracbit
#endif
