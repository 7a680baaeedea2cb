#include "step.h"

#include <algorithm>

#include "pool.h"

namespace fracbit {
namespace {

constexpr int64_t kDenseTaskBytes = 1 << 17;

struct Dense {
    const Projection* p;
    const Isa* isa;
    const float* x;
    float* y;
    int64_t batch;
    int64_t step;
};

void dense_task(void* context, int64_t index, int) {
    const auto& d = *static_cast<Dense*>(context);
    const int64_t first = index * d.step, last = std::min(first + d.step, d.p->rows);
    d.isa->multiply_dense(d.p->dense, d.p->type, d.p->rows, d.p->columns, first, last, d.x, d.batch, d.y);
}

void multiply_dense(const Projection& p, const Isa& isa, const float* x, int64_t batch, float* y, int threads) {
    const int64_t bytes = p.columns * (p.type == Float::f32 ? 4 : 2);
    Dense dense{&p, &isa, x, y, batch, std::max<int64_t>(kDenseTaskBytes / std::max<int64_t>(bytes, 1), 1)};
    run_tasks(threads, (p.rows + dense.step - 1) / dense.step, dense_task, &dense);
}

struct Attend {
    const Isa* isa;
    Attention job;
    int64_t kv_heads;
    float* scores;
    int64_t thread_floats;
};

void attend_task(void* context, int64_t index, int worker) {
    const auto& a = *static_cast<Attend*>(context);
    a.isa->attend(a.job, index / a.kv_heads, index % a.kv_heads, a.scores + worker * a.thread_floats);
}

// What a step needs from beginning to end.
struct Run {
    const Decoder& d;
    const Isa& isa;
    const Store& store;
    int64_t held;
    const int64_t* pads;
    Scratch& scratch;
    int threads;
    float *x, *normed, *queries, *keys, *values, *attended, *gate, *up, *sum;

    int64_t batch() const { return store.batch; }
    int64_t width() const { return d.heads * d.head; }
    int64_t kv_width() const { return d.kv_heads * d.head; }

    // Packed weights that read the same input go together; y [batch, rows] each.
    void project(std::initializer_list<const Projection*> projections, const float* input, std::initializer_list<float*> outputs) {
        Product together[kMostTogether];
        int64_t count = 0, columns = 0;
        auto y = outputs.begin();
        for (const Projection* p : projections) {
            columns = p->columns;
            if (p->packed != nullptr) {
                together[count++] = {p->packed, {*y, Float::f32, p->rows}};
            } else {
                multiply_dense(*p, isa, input, batch(), *y, threads);
            }
            ++y;
        }
        const Matrix from{const_cast<float*>(input), Float::f32, columns};
        multiply(together, count, isa, from, batch(), d.int8, threads);
        y = outputs.begin();
        for (const Projection* p : projections) {
            for (int64_t n = 0; p->bias != nullptr && n < batch(); ++n)
                for (int64_t i = 0; i < p->rows; ++i) (*y)[n * p->rows + i] += p->bias[i];
            ++y;
        }
    }

    void normalize(const float* gain, const float* from, float* to) {
        for (int64_t n = 0; n < batch(); ++n) isa.normalize(from + n * d.hidden, gain, d.epsilon, d.hidden, to + n * d.hidden);
    }

    void add_to_x(const float* from) {
        for (int64_t i = 0; i < batch() * d.hidden; ++i) x[i] += from[i];
    }

    // Norms inside the heads, then the rotation of pairs (i, i + head / 2) by the position: Su et al. 2021, arXiv:2104.09864.
    void turn(float* states, int64_t heads, const float* gain) {
        const int64_t half = d.head / 2;
        for (int64_t n = 0; n < batch(); ++n) {
            const int64_t position = held - pads[n];
            const float *cosines = store.cosines + position * d.head, *sines = store.sines + position * d.head;
            for (int64_t h = 0; h < heads; ++h) {
                float* s = states + (n * heads + h) * d.head;
                if (gain != nullptr) isa.normalize(s, gain, d.epsilon, d.head, s);
                for (int64_t i = 0; i < half; ++i) {
                    const float low = s[i], high = s[i + half];
                    s[i] = low * cosines[i] - high * sines[i];
                    s[i + half] = high * cosines[i + half] + low * sines[i + half];
                }
            }
        }
    }

    char* place(int64_t block, int64_t which) const {
        const int64_t size = store.type == Float::f32 ? 4 : 2;
        return static_cast<char*>(store.data) + (2 * block + which) * batch() * d.kv_heads * store.room * d.head * size;
    }

    void keep(char* to, const float* states) const {
        const int64_t size = store.type == Float::f32 ? 4 : 2;
        for (int64_t i = 0; i < batch() * d.kv_heads; ++i)
            isa.from_float(states + i * d.head, store.type, d.head, to + (i * store.room + held) * d.head * size);
    }

    void attend(const Block& block, int64_t index) {
        project({&block.query, &block.key, &block.value}, normed, {queries, keys, values});
        turn(queries, d.heads, block.query_gain);
        turn(keys, d.kv_heads, block.key_gain);
        char *kept_keys = place(index, 0), *kept_values = place(index, 1);
        keep(kept_keys, keys);
        keep(kept_values, values);
        Attend call{&isa, {}, d.kv_heads, nullptr, 0};
        call.job = {queries, kept_keys, kept_values, store.type, d.kv_heads, d.heads / d.kv_heads, d.head, store.room, held + 1, pads, d.scale, attended};
        call.thread_floats = aligned(attention_floats(call.job));
        call.scores = scores(call.thread_floats * threads);
        run_tasks(threads, batch() * d.kv_heads, attend_task, &call);
        project({&block.out}, attended, {sum});
        add_to_x(sum);
    }

    float* scores(int64_t count) {
        if (score_floats < count) score = scratch.floats(score_floats = count);
        return score;
    }

    void feed(const Block& block) {
        project({&block.gate, &block.up}, normed, {gate, up});
        isa.gate(gate, up, batch() * block.gate.rows);
        project({&block.down}, gate, {sum});
        add_to_x(sum);
    }

    void embed(const int64_t* tokens) {
        const Projection& table = d.embedding;
        for (int64_t n = 0; n < batch(); ++n) {
            float* to = x + n * d.hidden;
            if (table.packed != nullptr) {
                decode(*table.packed, isa, tokens[n], tokens[n] + 1, {to, Float::f32, d.hidden}, 1);
            } else {
                const int64_t size = table.type == Float::f32 ? 4 : 2;
                isa.to_float(static_cast<const char*>(table.dense) + tokens[n] * d.hidden * size, table.type, d.hidden, to);
            }
        }
    }

    float* score = nullptr;
    int64_t score_floats = 0;
};

}  // namespace

void advance(const Decoder& d, const Isa& isa, const Store& store, int64_t held, const int64_t* tokens, const int64_t* pads,
             float* logits, Scratch& scratch, int threads) {
    scratch.reset();
    threads = std::clamp(threads, 1, kMaxThreads);
    int64_t inner = 0;
    for (const Block& block : d.blocks) inner = std::max(inner, block.gate.rows);
    const auto take = [&](int64_t width) { return scratch.floats(store.batch * width); };
    Run run{d, isa, store, held, pads, scratch, threads, take(d.hidden), take(d.hidden), take(d.heads * d.head),
            take(d.kv_heads * d.head), take(d.kv_heads * d.head), take(d.heads * d.head), take(inner), take(inner), take(d.hidden)};
    run.embed(tokens);
    for (size_t i = 0; i < d.blocks.size(); ++i) {
        const Block& block = d.blocks[i];
        run.normalize(block.attention_gain, run.x, run.normed);
        run.attend(block, static_cast<int64_t>(i));
        run.normalize(block.mlp_gain, run.x, run.normed);
        run.feed(block);
    }
    run.normalize(d.gain, run.x, run.normed);
    run.project({&d.logits}, run.normed, {logits});
}

}  // namespace fracbit
