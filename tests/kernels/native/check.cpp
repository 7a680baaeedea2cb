// The native kernels under address and undefined-behaviour sanitizers, without Python: `sanitize.sh` builds and runs this.
//
// Every buffer has exactly its size, so that a read or a write one byte outside stops the program. It ends where a page begins that
// nobody may touch, since sanitizers do not see the masked loads and stores of AVX-512. Results are compared with sums in double
// precision over codes that are cut out bit by bit.

#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "decode.h"
#include "gram.h"
#include "operations.h"
#include "pool.h"
#include "product.h"
#include "stages.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, count)
#define ASAN_UNPOISON_MEMORY_REGION(start, count)
#endif

using namespace fracbit;

namespace {

std::mt19937 generator(1);

float random_float() { return std::normal_distribution<float>(0.0f, 1.0f)(generator); }

struct Case {
    int64_t rows, columns;
    int bits;
    int kind;  // 0 in, 1 out, 2 tensor, 3 flat
    int64_t block;
    int shift;  // 0 none, 1 zero codes, 2 floats
    bool even;  // evenly spaced table
    bool own_tables;
    int outliers;
    Float scale_type;  // of offsets too
    Float type;        // of activations, results and outlier columns
};

constexpr size_t kPage = 1 << 16;  // no system's are larger

template <class T>
class Exact {  // no spare room, unlike a vector's
  public:
    explicit Exact(int64_t count) : size(count) {
        const size_t bytes = static_cast<size_t>(count) * sizeof(T), whole = (bytes + kPage - 1) / kPage * kPage;
        spare_ = whole - bytes, mapped_ = whole + kPage;
        start_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (start_ == MAP_FAILED || mprotect(start_ + whole, kPage, PROT_NONE) != 0) std::abort();
        ASAN_POISON_MEMORY_REGION(start_, spare_);
        data = reinterpret_cast<T*>(start_ + spare_);
    }
    ~Exact() {
        ASAN_UNPOISON_MEMORY_REGION(start_, spare_);
        munmap(start_, mapped_);
    }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;

    T* data;
    int64_t size;

  private:
    char* start_;
    size_t spare_, mapped_;
};

// What a type rounds by at most, relative to a number.
double rounding(Float type) { return type == Float::f32 ? 0.0 : type == Float::f16 ? 0x1p-11 : 0x1p-8; }

// Numbers of a type, spelled bit by bit. What it cannot hold is cut off; numbers below 2^-14 are 0 in half precision.
struct Numbers {
    Numbers(int64_t count, Float type) : bytes(count * size_of(type)), type(type), size(count) {}
    Exact<uint8_t> bytes;
    Float type;
    int64_t size;

    void set(int64_t i, float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
        uint32_t half = bits >> 16;
        if (type == Float::f16) half = (half & 0x8000u) | (exponent <= 0 ? 0 : static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 1023));
        std::memcpy(bytes.data + i * size_of(type), type == Float::f32 ? &bits : &half, static_cast<size_t>(size_of(type)));
    }
    float operator[](int64_t i) const {
        uint32_t bits = 0;
        std::memcpy(&bits, bytes.data + i * size_of(type), static_cast<size_t>(size_of(type)));
        if (type == Float::f16) {
            const int exponent = bits >> 10 & 31, fraction = bits & 1023;
            const float magnitude = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
            return bits & 0x8000 ? -magnitude : magnitude;
        }
        if (type == Float::bf16) bits <<= 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    Matrix matrix(int64_t stride) { return {bytes.data, type, stride}; }
};

unsigned code_of(const uint8_t* row, int bits, int64_t i) {
    unsigned code = 0;
    for (int b = 0; b < bits; ++b) code |= ((row[(i * bits + b) / 8] >> ((i * bits + b) % 8)) & 1u) << b;
    return code;
}

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr const char* kKinds[] = {"in", "out", "tensor", "flat"};

// Buffers of a weight, filled by chance, and the weight over them.
struct Sample {
    explicit Sample(const Case& c)
        : c(c), kept(c.columns - c.outliers), levels(int64_t{1} << c.bits), block(std::min(c.block, longest())), scale_rows(rows_of_scales()),
          scale_columns(columns_of_scales()), codes(c.rows * stride()), zeros(scale_rows * zero_stride()),
          table((c.own_tables ? c.rows : 1) * levels), scales(scale_rows * scale_columns, c.scale_type), offsets(scales.size, c.scale_type),
          x(3 * c.columns, c.type), outliers(c.rows * c.outliers, c.type), other(c.outliers) {
        fill();
        set();
    }

    const Case c;
    const int64_t kept, levels, block, scale_rows, scale_columns;
    Exact<uint8_t> codes, zeros;
    Exact<float> table;
    Numbers scales, offsets, x, outliers;
    Exact<int32_t> other;
    Weight weight;

    int64_t longest() const { return c.kind == 1 ? c.rows : c.kind == 3 ? c.rows * kept : kept; }
    int64_t rows_of_scales() const { return c.kind == 0 ? c.rows : c.kind == 1 ? up(c.rows, block) : 1; }
    int64_t columns_of_scales() const {
        return c.kind == 0 ? up(kept, block) : c.kind == 1 ? kept : c.kind == 2 ? 1 : up(c.rows * kept, block);
    }
    int64_t stride() const { return up(kept * c.bits, 8); }
    int64_t zero_stride() const { return up(scale_columns * c.bits, 8); }

    void fill() {
        for (Exact<uint8_t>* bytes : {&codes, &zeros})
            for (int64_t i = 0; i < bytes->size; ++i) bytes->data[i] = static_cast<uint8_t>(generator());
        for (int64_t i = 0; i < scales.size; ++i) scales.set(i, std::fabs(random_float()) + 0.5f);
        for (int64_t i = 0; i < table.size; ++i) {  // uneven values keep away from 0: on the int8 path they are rounded by the largest
            const float value = random_float();
            table.data[i] = c.even ? -1.0f + 2.0f * static_cast<float>(i) / static_cast<float>(levels - 1) : value + std::copysign(0.1f, value);
        }
        for (Numbers* numbers : {&offsets, &x, &outliers})
            for (int64_t i = 0; i < numbers->size; ++i) numbers->set(i, random_float());
        for (int64_t i = 0; i < c.outliers; ++i) other.data[i] = static_cast<int32_t>(2 * i);
    }

    void set() {
        set_size(weight, c.rows, c.columns, c.bits, c.outliers);
        weight.codes = codes.data;
        const std::vector<int64_t> stored = set_blocks(weight, kKinds[c.kind], c.block);
        const std::vector<int64_t> expected = c.kind == 3 ? std::vector<int64_t>{scale_columns} : std::vector<int64_t>{scale_rows, scale_columns};
        if (stored != expected) std::abort();
        weight.scales.type = c.scale_type;
        weight.scales.values = scales.bytes.data;
        weight.scales.offsets = c.shift == 2 ? offsets.bytes.data : nullptr;
        set_table(weight, table.data, c.own_tables ? c.rows : 1, levels);
        if (c.shift == 1) set_zeros(weight, zeros.data, scale_rows, scale_columns);
        weight.outliers.type = c.type;
        weight.outliers.values = outliers.bytes.data;
        set_outlier_columns(weight, {other.data, other.data + c.outliers});
    }

    // Where the scale of kept input k of row o is.
    int64_t scale_index(int64_t o, int64_t k) const {
        return c.kind == 0 ? o * scale_columns + k / block : c.kind == 1 ? o / block * kept + k : c.kind == 2 ? 0 : (o * kept + k) / block;
    }
};

// Weights in double precision. `gross`: the parts of a weight without regard to sign. They may cancel, rounding errors do not.
struct Expected {
    std::vector<double> dense, gross;

    explicit Expected(const Sample& s) {
        for (int64_t o = 0; o < s.c.rows; ++o)
            for (int64_t i = 0, k = 0, p = 0; i < s.c.columns; ++i) {
                if (p < s.c.outliers && s.other.data[p] == i) {
                    dense.push_back(s.outliers[o * s.c.outliers + p++]);
                    gross.push_back(std::fabs(dense.back()));
                } else {
                    add(s, o, k++);
                }
            }
    }

    void add(const Sample& s, int64_t o, int64_t k) {
        const int64_t at = s.scale_index(o, k), row = at / s.scale_columns;
        const float* values = s.table.data + (s.c.own_tables ? o * s.levels : 0);
        const double value = values[code_of(s.codes.data + o * s.stride(), s.c.bits, k)];
        const double zero = s.c.shift == 1 ? values[code_of(s.zeros.data + row * s.zero_stride(), s.c.bits, at % s.scale_columns)] : 0.0f;
        const double offset = s.c.shift == 2 ? s.offsets[at] : 0.0f;
        dense.push_back(s.scales[at] * (value - zero) + offset);
        gross.push_back(s.scales[at] * (std::fabs(value) + std::fabs(zero)) + std::fabs(offset));
    }
};

void multiply_one(const Weight& weight, const Isa& isa, const Matrix& x, const Matrix& y, int64_t batch, bool int8) {
    const Projection layer = projection_of(weight);
    multiply({{&layer, x, y, {}}}, isa, batch, int8, 2);
}

bool judge(const char* what, const Isa& isa, const Case& c, double error, double size, double allowed) {
    if (std::sqrt(error) <= allowed * std::sqrt(size) + 1e-30) return true;
    std::printf("%s %s: %ld x %ld, %d bits, blocks %s of %ld, shift %d: error %.2e\n", isa.name, what, long(c.rows), long(c.columns), c.bits,
                kKinds[c.kind], long(c.block), c.shift, std::sqrt(error / size));
    return false;
}

bool product_is_right(Sample& s, const Expected& expected, const Isa& isa, int64_t batch, bool int8) {
    const Case& c = s.c;
    Numbers result(batch * c.rows, c.type);
    multiply_one(s.weight, isa, s.x.matrix(c.columns), result.matrix(c.rows), batch, int8);
    double error = 0, size = 0;
    for (int64_t n = 0; n < batch; ++n)
        for (int64_t o = 0; o < c.rows; ++o) {
            double sum = 0;
            for (int64_t i = 0; i < c.columns; ++i) {
                const auto at = static_cast<size_t>(o * c.columns + i);
                sum += expected.dense[at] * s.x[n * c.columns + i];
                size += std::pow(expected.gross[at] * s.x[n * c.columns + i], 2);
            }
            error += std::pow(result[n * c.rows + o] - sum, 2);
        }
    return judge(int8 ? "int8" : "float", isa, c, error, size, (int8 ? 3e-2 : 2e-5) + 2 * rounding(c.type));
}

bool decoding_is_right(const Sample& s, const Expected& expected, const Isa& isa) {
    const Case& c = s.c;
    Numbers decoded(c.rows * c.columns, c.type);
    decode(s.weight, isa, 0, c.rows, decoded.matrix(c.columns), 2);
    double error = 0, size = 0;
    for (size_t i = 0; i < expected.dense.size(); ++i) {
        error += std::pow(decoded[static_cast<int64_t>(i)] - expected.dense[i], 2);
        size += expected.gross[i] * expected.gross[i];
    }
    return judge("decode", isa, c, error, size, 1e-6 + rounding(c.type));
}

bool run(const Case& c) {
    Sample sample(c);
    const Expected expected(sample);
    bool good = true;
    for (const Isa* isa : instruction_sets()) {
        for (const int64_t batch : {1, 3})
            for (const bool int8 : {false, true}) good = product_is_right(sample, expected, *isa, batch, int8) && good;
        good = decoding_is_right(sample, expected, *isa) && good;
    }
    return good;
}

// Weights that share activations give what each gives alone.
bool together() {
    const int64_t columns = 200, rows[] = {5, 9, 3};
    const int bits[] = {4, 4, 3};
    std::vector<std::unique_ptr<Exact<uint8_t>>> codes;
    std::vector<std::unique_ptr<Exact<float>>> scales;
    Weight w[3];
    Exact<float> x(2 * columns), table(16);
    for (int64_t i = 0; i < x.size; ++i) x.data[i] = random_float();
    for (int64_t i = 0; i < table.size; ++i) table.data[i] = random_float();
    for (int i = 0; i < 3; ++i) {
        codes.push_back(std::make_unique<Exact<uint8_t>>(rows[i] * up(columns * bits[i], 8)));
        scales.push_back(std::make_unique<Exact<float>>(rows[i] * up(columns, 16)));
        for (int64_t k = 0; k < codes[i]->size; ++k) codes[i]->data[k] = static_cast<uint8_t>(generator());
        for (int64_t k = 0; k < scales[i]->size; ++k) scales[i]->data[k] = random_float();
        set_size(w[i], rows[i], columns, bits[i], 0);
        w[i].codes = codes[i]->data;
        set_blocks(w[i], "in", 16);
        w[i].scales.values = scales[i]->data;
        set_table(w[i], table.data, 1, int64_t{1} << bits[i]);
    }
    bool good = true;
    for (const Isa* isa : instruction_sets())
        for (const bool int8 : {false, true}) {
            Exact<float> alone(2 * 17), shared(2 * 17);
            Projection layers[3];
            std::vector<Product> products;
            const Matrix from{x.data, Float::f32, columns};
            int64_t at = 0;
            for (int i = 0; i < 3; at += 2 * rows[i++]) {
                multiply_one(w[i], *isa, from, {alone.data + at, Float::f32, rows[i]}, 2, int8);
                layers[i] = projection_of(w[i]);
                products.push_back({&layers[i], from, {shared.data + at, Float::f32, rows[i]}, {}});
            }
            multiply(products, *isa, 2, int8, 2);
            for (int64_t i = 0; i < alone.size; ++i) good = good && alone.data[i] == shared.data[i];
        }
    if (!good) std::printf("weights together differ from each alone\n");
    return good;
}

template <class Op>
std::unique_ptr<const Operation> made(Op op) {
    return std::make_unique<const Op>(std::move(op));
}

// Every operation on float layers in buffers of exactly their size: every instruction set gives the same logits.
bool step(int64_t head, Float type) {
    const int64_t hidden = 24, heads = 4, kv = 2, inner = 37, words = 11, batch = 3, room = 6, top = 2, experts = 3;
    std::vector<std::unique_ptr<Numbers>> held;
    const auto layer = [&](int64_t rows, int64_t columns, const float* bias = nullptr) {
        held.push_back(std::make_unique<Numbers>(rows * columns, type));
        for (int64_t i = 0; i < rows * columns; ++i) held.back()->set(i, 0.2f * random_float());
        Projection p;
        p.dense = held.back()->bytes.data;
        p.type = type;
        p.rows = rows;
        p.columns = columns;
        p.bias = bias;
        return p;
    };
    Exact<float> gain(hidden), head_gain(head), turns(room * head), bias(heads * head), sinks(heads), slopes(heads * room);
    for (Exact<float>* part : {&gain, &head_gain, &turns, &bias, &sinks, &slopes})
        for (int64_t i = 0; i < part->size; ++i) part->data[i] = random_float();
    const Projection table = layer(words, hidden), places = layer(room, hidden), logits = layer(words, hidden), router = layer(experts, hidden);
    const Projection query = layer(heads * head, hidden, bias.data), key = layer(kv * head, hidden), value = layer(kv * head, hidden);
    const Projection out = layer(hidden, heads * head), gate = layer(inner, hidden), up = layer(inner, hidden), down = layer(hidden, inner);
    std::vector<float> first;
    bool good = true;
    for (const Isa* isa : instruction_sets()) {
        Program program(*isa, false, words);
        const Place x{program.add_register(hidden), 0}, n{program.add_register(hidden), 0}, q{program.add_register(heads * head), 0};
        const Place k{program.add_register(2 * kv * head), 0}, v{k.reg, kv * head}, a{program.add_register(heads * head), 0};
        const Place g{program.add_register(top * inner), 0}, u{program.add_register(top * inner), 0}, s{program.add_register(hidden), 0};
        const Place chosen{program.add_register(experts), 0}, found{program.add_register(top * hidden), 0};
        const auto whole = [&](Place place) { return HeadPlaces{place, 1, hidden, 1, hidden, 0}; };
        const auto of = [&](Place place, int64_t count) { return HeadPlaces{place, count, head, count, head, 0}; };
        const auto look = [&](const Projection& from, bool positions) {
            LookUp op;
            op.table = from, op.to = x, op.factor = 1.5f, op.positions = positions, op.offset = 0;
            program.add(made(op));
        };
        const auto norm = [&](HeadPlaces from, HeadPlaces to, const float* by, const float* shift, bool centered) {
            Norm op;
            op.from = from, op.to = to, op.gain = by, op.bias = shift, op.epsilon = 1e-5f, op.centered = centered;
            program.add(made(op));
        };
        const auto linear = [&](std::vector<Projection> layers, Place from, std::vector<Place> to, Curve after = {}) {
            Linear op;
            op.layers = std::move(layers), op.from = from, op.to = std::move(to), op.after = after;
            program.add(made(std::move(op)));
        };
        const auto add = [&](Place from, Place to) {
            Add op;
            op.from = from, op.to = to, op.width = hidden, op.keep = 0.5f, op.factor = 0.7f;
            program.add(made(op));
        };
        const auto activate = [&](Place at, Place by, Function function, int64_t width) {
            Activate op;
            op.place = at, op.up = by, op.width = width, op.curve = {function, 1.702f, 0.5f};
            program.add(made(op));
        };
        const auto experts_of = [&](std::vector<std::vector<Projection>> layers, Place from, std::vector<Place> to, bool apart) {
            Experts op;
            op.layers = std::move(layers), op.from = from, op.top = top, op.apart = apart, op.to = std::move(to);
            program.add(made(std::move(op)));
        };
        look(table, false);
        look(places, true);
        for (int64_t i = 0; i < 2; ++i) {
            norm(whole(x), whole(n), gain.data, i ? gain.data : nullptr, i == 1);
            linear({query, key, value}, n, {q, k, v}, {i ? Function::gelu : Function::identity});
            norm(of(q, heads), of(q, heads), i ? head_gain.data : nullptr, nullptr, false);
            Rotate turn;
            turn.heads = of(q, heads), turn.rotation = 0;
            program.add(made(turn));
            Attend attend;
            attend.queries = of(q, heads), attend.keys = of(k, kv), attend.values = of(v, kv), attend.to = a, attend.index = i;
            attend.scale = 0.3f, attend.cap = i ? 2.0f : 0.0f, attend.window = i ? 2 : 0, attend.biases = i ? 0 : -1;
            attend.sinks = i ? sinks.data : nullptr;
            program.add(made(attend));
            linear({out}, a, {s}, {Function::gelu_tanh});
            add(s, x);
            linear({gate, up}, x, {g, u}, {Function::quick_gelu});
            activate(g, u, i ? Function::silu : Function::clamped, inner);
            linear({down}, g, {s});
            add(s, x);
            linear({router}, x, {chosen});
            Route route;
            route.logits = chosen, route.experts = experts, route.top = top, route.among = i == 1;
            program.add(made(route));
            experts_of({{gate, up, gate}, {up, gate, up}}, x, {g, u}, false);
            activate(g, u, i ? Function::relu : Function::relu_squared, top * inner);
            experts_of({{down, down, down}}, g, {found}, true);
            Mix mix;
            mix.from = found, mix.to = s, mix.top = top, mix.width = hidden;
            program.add(made(mix));
            activate(chosen, {-1, 0}, Function::sigmoid, experts);
            Scale scale;
            scale.by = chosen, scale.to = s, scale.width = hidden;
            program.add(made(scale));
            add(s, x);
        }
        linear({logits}, x, {{0, 0}}, {Function::cap, 3.0f});
        Exact<uint8_t> store(2 * 2 * batch * kv * room * head * size_of(type));
        Exact<float> results(batch * words);
        const int64_t tokens[] = {1, 10, 0}, pads[] = {0, 1, 0};
        const Rotation rotation{turns.data, turns.data, head};
        const float* biases[] = {slopes.data};
        Store step{store.data, type, batch, kv, room, head, 1, 0, 0, 8, {}, room, tokens, pads, &rotation, biases, results.data};
        for (; step.held < room; ++step.held) program.advance(step, 2);
        // The first tokens as codes, of as few bits as heads allow.
        step.groups = 1, step.group = 2, step.held = room - 3, step.bits = head % 2 ? 8 : 4;
        const int64_t planes = 2 * batch * kv;
        Exact<uint8_t> codes(planes * step.group * code_bytes(head, step.bits));
        std::memset(codes.data, 0x5a, static_cast<size_t>(codes.size));
        Exact<float> of_keys(planes * head), of_values(planes * step.group);
        for (Exact<float>* part : {&of_keys, &of_values})
            for (int64_t i = 0; i < part->size; ++i) part->data[i] = 0.01f * static_cast<float>(i % 7);
        step.older[0] = {codes.data, of_keys.data, of_keys.data, Float::f32};
        step.older[1] = {codes.data, of_values.data, of_values.data, Float::f32};
        program.advance(step, 2);
        if (first.empty()) first.assign(results.data, results.data + results.size);
        for (int64_t i = 0; i < results.size; ++i)
            good = good && std::fabs(results.data[i] - first[static_cast<size_t>(i)]) < (type == Float::f32 ? 1e-3f : 5e-2f);
    }
    if (!good) std::printf("a decode step differs between instruction sets, heads of %ld\n", long(head));
    return good;
}

// Every task of every stage runs once, in its stage.
bool stages() {
    struct Count : Stages {
        std::atomic<int> runs[40]{};
        int64_t stage = -1;
        std::atomic<int> wrong{0};

        int64_t next() override {
            for (int64_t i = 0; i < 40; ++i) wrong += stage >= 0 && runs[i].exchange(0) != (i < count());
            return ++stage == 60 ? 0 : count();
        }
        int64_t count() const { return 1 + stage * 7 % 40; }
        void task(int64_t index, int worker) override { wrong += worker < 0 || worker >= 3, ++runs[index]; }
        bool ask_ahead(int64_t, int, int64_t part) const override { return part < 2; }
    };
    std::atomic<int> wrong{0};
    const auto call = [&wrong] {
        for (int threads = 1; threads <= 3; ++threads) {
            Count count;
            run_stages(threads, count);
            wrong += count.wrong + (count.stage != 60);
        }
    };
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back(call);
    for (std::thread& caller : callers) caller.join();
    if (wrong) std::printf("tasks of stages are lost, run twice or run too early\n");
    return !wrong;
}

// g + x^T x of bfloat16 rows that lie `stride` apart, on machines that have these products.
bool gram(int64_t tokens, int64_t width, int64_t stride) {
    if (!has_gram()) return true;
    Exact<uint16_t> x(tokens ? (tokens - 1) * stride + width : 0);
    Exact<float> floats(x.size), g(width * width);
    for (int64_t i = 0; i < x.size; ++i) {
        const float value = random_float();
        uint32_t word;
        std::memcpy(&word, &value, 4);
        x.data[i] = static_cast<uint16_t>(word >> 16);
        word = uint32_t{x.data[i]} << 16;
        std::memcpy(&floats.data[i], &word, 4);
    }
    for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j < width; ++j) g.data[i * width + j] = static_cast<float>(i + j);
    add_gram(x.data, stride, tokens, width, g.data, 2);
    for (int64_t i = 0; i < width; ++i)
        for (int64_t j = 0; j < width; ++j) {
            double sum = static_cast<double>(i + j);
            for (int64_t t = 0; t < tokens; ++t) sum += double(floats.data[t * stride + i]) * floats.data[t * stride + j];
            if (!(std::fabs(g.data[i * width + j] - sum) < 1e-4 * (1 + std::fabs(sum) + double(tokens)))) {
                std::printf("x^T x of %ld x %ld is wrong at %ld, %ld\n", long(tokens), long(width), long(i), long(j));
                return false;
            }
        }
    return true;
}

// Causal attention of whole sequences, heads in groups of two, against sums in double precision.
bool causal(int64_t tokens, int64_t head) {
    if (!has_causal()) return true;
    const int64_t sequences = 2, heads = 4, group = 2, shared = heads / group;
    Exact<float> q(sequences * heads * tokens * head), k(q.size / group), v(k.size), out(q.size);
    for (const Exact<float>* array : {&q, &k, &v})
        for (int64_t i = 0; i < array->size; ++i) array->data[i] = random_float();
    const Strides own{heads * tokens * head, tokens * head, head}, held{shared * tokens * head, tokens * head, head};
    const float scale = 0.5f;
    attend_causal({q.data, k.data, v.data, out.data, own, held, held, own, sequences, heads, group, tokens, head, scale}, 2);
    for (int64_t row = 0; row < sequences * heads * tokens; ++row) {
        const int64_t token = row % tokens, other = row / tokens / group * tokens;
        std::vector<double> sums(static_cast<size_t>(head));
        double total = 0;
        for (int64_t j = 0; j <= token; ++j) {
            double score = 0;
            for (int64_t d = 0; d < head; ++d) score += double(q.data[row * head + d]) * k.data[(other + j) * head + d];
            const double weight = std::exp(score * scale);
            total += weight;
            for (int64_t d = 0; d < head; ++d) sums[static_cast<size_t>(d)] += weight * v.data[(other + j) * head + d];
        }
        for (int64_t d = 0; d < head; ++d)
            if (!(std::fabs(out.data[row * head + d] - sums[static_cast<size_t>(d)] / total) < 1e-5)) {
                std::printf("attention over %ld tokens, heads of %ld, is wrong at row %ld\n", long(tokens), long(head), long(row));
                return false;
            }
    }
    return true;
}

// Callers at the same time, who share the threads or run alone: every task once, workers within their number.
bool tasks() {
    struct Count {
        std::atomic<int> runs[100]{};
        std::atomic<bool> strange{false};
    };
    std::atomic<int> wrong{0};
    const auto call = [&wrong] {
        for (int64_t round = 0; round < 50; ++round) {
            Count count;
            const auto task = [](void* context, int64_t index, int worker) {
                auto& c = *static_cast<Count*>(context);
                ++c.runs[index];
                if (worker < 0 || worker >= 3) c.strange = true;
            };
            run_tasks(3, round * 2, task, &count);
            for (int64_t i = 0; i < 100; ++i) wrong += count.runs[i] != (i < round * 2) || count.strange;
        }
    };
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back(call);
    for (std::thread& caller : callers) caller.join();
    if (wrong) std::printf("tasks are lost, run twice or have workers that are not there\n");
    return !wrong;
}

}  // namespace

// check [n]: every n-th weight.
int main(int count, char** arguments) {
    const int every = count > 1 ? std::atoi(arguments[1]) : 1;
    const Float types[] = {Float::f32, Float::f16, Float::bf16};
    int failed = !together() + !tasks() + !stages(), done = 0, run_so_far = 0;
    for (const int64_t head : {2, 6, 16, 80})
        for (const Float type : types) failed += !step(head, type);
    for (const int64_t head : {8, 24})
        for (const int64_t tokens : {0, 1, 31, 32, 45}) failed += !causal(tokens, head);
    for (const int64_t width : {1, 8, 47, 48, 100})
        for (const int64_t tokens : {0, 1, 7, 513}) failed += !gram(tokens, width, width + tokens % 3);
    const int64_t shapes[][2] = {{1, 1}, {1, 9}, {5, 127}, {7, 128}, {6, 129}, {9, 172}, {3, 400}, {2, 640}};
    for (const auto& shape : shapes)
        for (int bits = 1; bits <= 8; ++bits)
            for (int kind = 0; kind < 4; ++kind)
                for (const int64_t block : {3, 8, 64, 1 << 20})
                    for (int shift = 0; shift < 3; ++shift) {
                        const bool even = done % 2 == 0, own = shift != 1 && done % 5 == 0 && !even;
                        const int outliers = shape[1] > 8 && done % 3 == 0 ? 2 : 0;
                        if (done++ % every != 0) continue;
                        failed += !run({shape[0], shape[1], bits, kind, block, shift, even, own, outliers, types[done / 7 % 3], types[done / 11 % 3]});
                        ++run_so_far;
                    }
    std::string names;
    for (const Isa* isa : instruction_sets()) names += std::string(" ") + isa->name;
    std::printf("%d weights,%s: %d failed\n", run_so_far, names.c_str(), failed);
    return failed != 0;
}
