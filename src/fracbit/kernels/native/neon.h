// NEON, for 64-bit ARM. A vector of sixteen lanes is four registers. Included once with and once without the dot product of ARMv8.2.
//
// tbl looks up bytes in a table of up to 64 and gives zero for larger indices; tbx leaves a byte as it was there, so larger tables
// take several look-ups. Both factors of a product are signed bytes: 128 is subtracted from the high half of a table, as in AVX2.
#pragma once

#include <arm_neon.h>

#include "isa_of.h"

namespace fracbit {
namespace {

struct Neon {
    struct Floats {
        float32x4_t q[4];
    };
    struct Ints {
        int32x4_t q[4];
    };
    struct Bytes {
        uint8x16_t q[4];
    };
    static constexpr int kOverread = 32;  // words are read as two whole registers
    static constexpr bool kFours = false;
    static void copy_part(uint8_t* to, const uint8_t* from, int64_t count) { std::memcpy(to, from, static_cast<size_t>(count)); }

    template <class F>
    static Floats each(F&& f) { return {{f(0), f(1), f(2), f(3)}}; }

    static Floats zero_floats() { return all(0.0f); }
    static Ints zero_ints() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
    static Floats load(const float* p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
    template <Float type>
    static Floats load_as(const void* p) {
        if constexpr (type == Float::f32) return load(static_cast<const float*>(p));
        const auto* halves = static_cast<const uint16_t*>(p);
        return each([&](int i) {
            const uint16x4_t half = vld1_u16(halves + 4 * i);
            if constexpr (type == Float::f16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
            return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
        });
    }
    template <Float type>
    static Floats load_part(const void* p, int64_t count) {
        float some[kLanes] = {};
        floats_from(p, type, count, some);
        return load(some);
    }
    static Floats all(float value) { return each([&](int) { return vdupq_n_f32(value); }); }
    static void store(const Floats& v, float* p) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.q[i]);
    }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        return each([&](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
    }
    static Floats multiply(const Floats& a, const Floats& b) {
        return each([&](int i) { return vmulq_f32(a.q[i], b.q[i]); });
    }
    static Floats to_floats(const Ints& v) {
        return each([&](int i) { return vcvtq_f32_s32(v.q[i]); });
    }
    static float total(const Floats& v) { return vaddvq_f32(vaddq_f32(vaddq_f32(v.q[0], v.q[1]), vaddq_f32(v.q[2], v.q[3]))); }
    template <int count>
    static Ints shift_left(const Ints& v) {
        Ints to;
        for (int i = 0; i < 4; ++i) to.q[i] = vshlq_n_s32(v.q[i], count);
        return to;
    }

    // The four bytes of float `index` among 16 of them.
    static uint8x16_t float_bytes(uint32x4_t index) {
        return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100u), index, 0x04040404u));
    }
    static uint8x16x4_t sixteen(const float* p) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(p);
        return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
    }
    static Floats pick(const Floats& from, const int32_t* lane) {
        uint8x16x4_t table;
        for (int i = 0; i < 4; ++i) table.val[i] = vreinterpretq_u8_f32(from.q[i]);
        return each([&](int i) {
            return vreinterpretq_f32_u8(vqtbl4q_u8(table, float_bytes(vreinterpretq_u32_s32(vld1q_s32(lane + 4 * i)))));
        });
    }

    using Activations = const int8_t*;
    template <bool again>
    static Activations activations(const int8_t* a) { return a; }
    static int32x4_t dot4(int32x4_t sum, int8x16_t u, int8x16_t a) {
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, u, a);
#else
        const int16x8_t low = vmull_s8(vget_low_s8(u), vget_low_s8(a)), high = vmull_s8(vget_high_s8(u), vget_high_s8(a));
        return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
    }
    static Ints dot_small(const Ints& sum, const Bytes& u, Activations a) {
        Ints to;
        for (int i = 0; i < 4; ++i) to.q[i] = dot4(sum.q[i], vreinterpretq_s8_u8(u.q[i]), vld1q_s8(a + 16 * i));
        return to;
    }
    static Ints dot(const Ints& sum, const Bytes& u, Activations a) {
        Bytes signs;
        for (int i = 0; i < 4; ++i) signs.q[i] = veorq_u8(u.q[i], vdupq_n_u8(kHighBias));  // u - 128
        return dot_small(sum, signs, a);
    }

    // Bytes of four lanes: byte b of a lane's word of codes 4 * part .. 4 * part + 3.
    template <int bits, int part>
    struct Gather {
        uint8_t index[16];
        constexpr Gather() : index() {
            for (int i = 0; i < 16; ++i) index[i] = static_cast<uint8_t>(i / 4 * bits + 4 * part * bits / 8 + i % 4);
        }
    };

    // One word per lane with its codes 4 * part .. 4 * part + 3 in the low 4 * bits; above them anything.
    template <int bits, int part>
    static uint32x4_t words(const uint8_t* p, int i) {
        static constexpr Gather<bits, part> gather{};
        constexpr int shift = 4 * part * bits % 8;
        const uint8_t* from = p + 4 * bits * i;
        uint32x4_t z;
        if constexpr (bits <= 4) {
            z = vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(from), vld1q_u8(gather.index)));
        } else {
            const uint8x16x2_t both = {{vld1q_u8(from), vld1q_u8(from + 16)}};
            z = vreinterpretq_u32_u8(vqtbl2q_u8(both, vld1q_u8(gather.index)));
        }
        if constexpr (shift > 0) z = vshrq_n_u32(z, shift);
        return z;
    }

    // Four codes side by side to four bytes: the upper pair moves to the upper half, then every second one to its byte.
    template <int bits>
    static uint8x16_t to_bytes(uint32x4_t z) {
        if constexpr (bits == 8) return vreinterpretq_u8_u32(z);
        constexpr uint32_t pair = (1u << (2 * bits)) - 1u, one = (1u << bits) - 1u;
        z = vorrq_u32(vandq_u32(z, vdupq_n_u32(pair)), vandq_u32(vshlq_n_u32(z, 16 - 2 * bits), vdupq_n_u32(pair << 16)));
        return vreinterpretq_u8_u32(vorrq_u32(vandq_u32(z, vdupq_n_u32(one * 0x00010001u)),
                                              vandq_u32(vshlq_n_u32(z, 8 - bits), vdupq_n_u32(one * 0x01000100u))));
    }

    template <int bits>
    static void unpack(const uint8_t* p, Bytes& u0, Bytes& u1) {
        for (int i = 0; i < 4; ++i) {
            if constexpr (bits == 4) {
                const uint8x16_t z = vld1q_u8(p + 16 * i);
                u0.q[i] = vandq_u8(z, vdupq_n_u8(15));
                u1.q[i] = vshrq_n_u8(z, 4);
            } else if constexpr (bits == 8) {
                const uint32x4x2_t z = vld2q_u32(reinterpret_cast<const uint32_t*>(p + 32 * i));
                u0.q[i] = vreinterpretq_u8_u32(z.val[0]);
                u1.q[i] = vreinterpretq_u8_u32(z.val[1]);
            } else {
                u0.q[i] = to_bytes<bits>(words<bits, 0>(p, i));
                u1.q[i] = to_bytes<bits>(words<bits, 1>(p, i));
            }
        }
    }
    template <int bits>
    static Bytes clean(const Bytes& u) { return u; }

    template <int bits>
    struct ByteTable {
        const uint8_t* memory = nullptr;
        void load(const uint8_t* table) { memory = table; }
        uint8x16x4_t part(int i) const {
            const uint8_t* p = memory + 64 * i;
            return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
        }
        Bytes look_up(const Bytes& u) const {
            Bytes to;
            for (int i = 0; i < 4; ++i) {
                if constexpr (bits <= 4) {
                    to.q[i] = vqtbl1q_u8(vld1q_u8(memory), u.q[i]);
                } else if constexpr (bits == 5) {
                    const uint8x16x2_t table = {{vld1q_u8(memory), vld1q_u8(memory + 16)}};
                    to.q[i] = vqtbl2q_u8(table, u.q[i]);
                } else {
                    to.q[i] = vqtbl4q_u8(part(0), u.q[i]);
                    for (int j = 1; j < 1 << (bits - 6); ++j)
                        to.q[i] = vqtbx4q_u8(to.q[i], part(j), vsubq_u8(u.q[i], vdupq_n_u8(static_cast<uint8_t>(64 * j))));
                }
            }
            return to;
        }
    };

    template <int bits>
    struct FloatWords {
        uint32x4_t part[2][4];
        void load(const uint8_t* p) {
            for (int i = 0; i < 4; ++i) {
                part[0][i] = words<bits, 0>(p, i);
                part[1][i] = words<bits, 1>(p, i);
            }
        }
        template <int j>
        uint32x4_t index(int i) const {
            constexpr int shift = bits * (j % 4);
            uint32x4_t z = part[j / 4][i];
            if constexpr (shift > 0) z = vshrq_n_u32(z, shift);
            return vandq_u32(z, vdupq_n_u32((1u << bits) - 1u));
        }
        template <int j>
        Floats number() const {
            return each([&](int i) { return vcvtq_f32_u32(index<j>(i)); });
        }
    };

    template <int bits>
    struct FloatTable {
        const float* memory = nullptr;
        void load(const float* table) { memory = table; }
        template <int j>
        Floats pick(const FloatWords<bits>& words) const {
            return each([&](int i) {
                const uint32x4_t index = words.template index<j>(i);
                if constexpr (bits <= 5) {
                    uint8x16_t found = vqtbl4q_u8(sixteen(memory), float_bytes(index));
                    // Bytes 64 and up are those of the second table; a byte index never passes 127.
                    if constexpr (bits == 5)
                        found = vqtbx4q_u8(found, sixteen(memory + 16), vsubq_u8(float_bytes(index), vdupq_n_u8(64)));
                    return vreinterpretq_f32_u8(found);
                } else {
                    uint32_t at[4];
                    float value[4];
                    vst1q_u32(at, index);
                    for (int k = 0; k < 4; ++k) value[k] = memory[at[k]];
                    return vld1q_f32(value);
                }
            });
        }
    };

    static void to_float(const void* from, Float type, int64_t count, float* to) {
        if (type != Float::f16) return floats_from(from, type, count, to);
        const auto* source = static_cast<const uint16_t*>(from);
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source + i))));
        for (; i < count; ++i) to[i] = half_to_float(source[i]);
    }
};

}  // namespace
}  // namespace fracbit
