// Plain C++, for every processor. The compiler vectorises what it can.
#include "isa_of.h"

namespace fracbit {
namespace {

struct Plain {
    struct Floats {
        float v[kLanes];
    };
    struct Ints {
        int32_t v[kLanes];
    };
    struct Bytes {
        uint8_t v[64];
    };
    static constexpr int kOverread = 0;
    static constexpr bool kFours = false;
    static void copy_part(uint8_t* to, const uint8_t* from, int64_t count) { std::memcpy(to, from, static_cast<size_t>(count)); }

    static Floats zero_floats() { return Floats{}; }
    static Ints zero_ints() { return Ints{}; }
    static Floats load(const float* p) {
        Floats r;
        std::memcpy(r.v, p, sizeof r.v);
        return r;
    }
    template <Float type>
    static Floats load_as(const void* p) {
        Floats r;
        floats_from(p, type, kLanes, r.v);
        return r;
    }
    template <Float type>
    static Floats load_part(const void* p, int64_t count) {
        Floats r{};
        floats_from(p, type, count, r.v);
        return r;
    }
    static Floats all(float value) {
        Floats r;
        for (int d = 0; d < kLanes; ++d) r.v[d] = value;
        return r;
    }
    static void store(const Floats& a, float* p) { std::memcpy(p, a.v, sizeof a.v); }
    static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
        Floats r;
        for (int d = 0; d < kLanes; ++d) r.v[d] = a.v[d] * b.v[d] + c.v[d];
        return r;
    }
    static Floats multiply(const Floats& a, const Floats& b) {
        Floats r;
        for (int d = 0; d < kLanes; ++d) r.v[d] = a.v[d] * b.v[d];
        return r;
    }
    static Floats to_floats(const Ints& a) {
        Floats r;
        for (int d = 0; d < kLanes; ++d) r.v[d] = static_cast<float>(a.v[d]);
        return r;
    }
    static float total(const Floats& a) {
        float sum = 0;
        for (int d = 0; d < kLanes; ++d) sum += a.v[d];
        return sum;
    }
    template <int count>
    static Ints shift_left(const Ints& a) {
        Ints r;
        for (int d = 0; d < kLanes; ++d) r.v[d] = a.v[d] * (1 << count);
        return r;
    }
    static Floats pick(const Floats& scales, const int32_t* lane) {
        Floats r;
        for (int d = 0; d < kLanes; ++d) r.v[d] = scales.v[lane[d]];
        return r;
    }
    using Activations = const int8_t*;
    template <bool again>
    static Activations activations(const int8_t* a) { return a; }
    static Ints dot(Ints sum, const Bytes& u, Activations a) {
        for (int d = 0; d < kLanes; ++d)
            for (int j = 0; j < 4; ++j) sum.v[d] += static_cast<int32_t>(u.v[4 * d + j]) * a[4 * d + j];
        return sum;
    }
    static Ints dot_small(const Ints& sum, const Bytes& u, Activations a) { return dot(sum, u, a); }

    template <int bits>
    static void unpack(const uint8_t* p, Bytes& u0, Bytes& u1) {
        for (int d = 0; d < kLanes; ++d) {
            uint64_t word = 0;
            for (int b = 0; b < bits; ++b) word |= static_cast<uint64_t>(p[d * bits + b]) << (8 * b);
            for (int j = 0; j < 4; ++j) {
                const int first = bits == 4 ? 2 * j : j, second = bits == 4 ? 2 * j + 1 : 4 + j;
                u0.v[4 * d + j] = static_cast<uint8_t>((word >> (bits * first)) & ((1 << bits) - 1));
                u1.v[4 * d + j] = static_cast<uint8_t>((word >> (bits * second)) & ((1 << bits) - 1));
            }
        }
    }
    template <int bits>
    static Bytes clean(const Bytes& u) { return u; }

    template <int bits>
    struct ByteTable {
        const uint8_t* memory = nullptr;
        void load(const uint8_t* table) { memory = table; }
        Bytes look_up(const Bytes& u) const {
            Bytes r;
            for (int i = 0; i < 64; ++i) r.v[i] = memory[u.v[i]];
            return r;
        }
    };

    template <int bits>
    struct FloatWords {
        Bytes half[2];
        void load(const uint8_t* p) { unpack<bits>(p, half[0], half[1]); }
        template <int j>
        uint8_t code(int d) const {
            return bits == 4 ? half[j % 2].v[4 * d + j / 2] : half[j / 4].v[4 * d + j % 4];
        }
        template <int j>
        Floats number() const {
            Floats r;
            for (int d = 0; d < kLanes; ++d) r.v[d] = code<j>(d);
            return r;
        }
    };

    template <int bits>
    struct FloatTable {
        const float* memory = nullptr;
        void load(const float* table) { memory = table; }
        template <int j>
        Floats pick(const FloatWords<bits>& words) const {
            Floats r;
            for (int d = 0; d < kLanes; ++d) r.v[d] = memory[words.template code<j>(d)];
            return r;
        }
    };

    static void to_float(const void* from, Float type, int64_t count, float* to) { floats_from(from, type, count, to); }
};

constexpr Isa kPlain = isa_of<Plain>("plain", true);

}  // namespace

const Isa* isa_plain() { return &kPlain; }

}  // namespace fracbit
