// One step of a decoder, layer by layer: step.h says what it computes. Each product or attention is one job for the threads.
#include "step.h"

#include <algorithm>

#include "decode.h"
#include "pool.h"
#include "product.h"
#include "tasks.h"

namespace fracbit {
namespace {

struct Dense {
    const Isa& isa;
    DenseJob job;
    int64_t rows;  // of a task
};

void dense_task(void* context, int64_t index, int) {
    const auto& dense = *static_cast<const Dense*>(context);
    const int64_t first = index * dense.rows;
    dense.isa.multiply_dense(dense.job, first, std::min(first + dense.rows, dense.job.rows));
}

void multiply_dense(const Projection& p, const Isa& isa, const float* x, int64_t batch, float* y, int threads) {
    const int64_t bytes = std::max<int64_t>(p.columns * size_of(p.type), 1);
    Dense dense{isa, {p.dense, p.type, p.rows, p.columns, x, batch, y}, std::max<int64_t>(kMostTaskBytes / bytes, 1)};
    run_tasks(threads, tasks_for(p.rows, dense.rows), dense_task, &dense);
}

struct Attend {
    const Isa& isa;
    Attention job;
    float* scores;
    int64_t worker_floats;
};

void attend_task(void* context, int64_t index, int worker) {
    const auto& a = *static_cast<const Attend*>(context);
    a.isa.attend(a.job, index / a.job.kv_heads, index % a.job.kv_heads, a.scores + worker * a.worker_floats);
}

// What a step needs from its beginning to its end; `x` [batch, hidden] is the stream to which every block adds.
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
        for (const Projection* p : projections) add_bias(*p, *y++);
    }

    void add_bias(const Projection& p, float* y) const {
        if (p.bias == nullptr) return;
        for (int64_t n = 0; n < batch(); ++n)
            for (int64_t i = 0; i < p.rows; ++i) y[n * p.rows + i] += p.bias[i];
    }

    void normalize(const float* gain, const float* from, float* to) {
        for (int64_t n = 0; n < batch(); ++n) isa.normalize(from + n * d.hidden, gain, d.epsilon, d.hidden, to + n * d.hidden);
    }

    void add_to_x(const float* from) {
        for (int64_t i = 0; i < batch() * d.hidden; ++i) x[i] += from[i];
    }

    // Norms inside the heads, then their rotation by the position.
    void turn(float* states, int64_t heads, const float* gain) {
        for (int64_t n = 0; n < batch(); ++n) {
            const int64_t position = held - pads[n];
            for (int64_t h = 0; h < heads; ++h) {
                float* head = states + (n * heads + h) * d.head;
                if (gain != nullptr) isa.normalize(head, gain, d.epsilon, d.head, head);
                rotate(head, store.cosines + position * d.head, store.sines + position * d.head);
            }
        }
    }

    // Pairs (i, i + head / 2): Su et al. 2021, arXiv:2104.09864.
    void rotate(float* head, const float* cosines, const float* sines) const {
        const int64_t half = d.head / 2;
        for (int64_t i = 0; i < half; ++i) {
            const float low = head[i], high = head[i + half];
            head[i] = low * cosines[i] - high * sines[i];
            head[i + half] = high * cosines[i + half] + low * sines[i + half];
        }
    }

    // The keys (0) or values (1) of a block in the store.
    void* place(int64_t block, int64_t which) const {
        return number_at(store.data, store.type, (2 * block + which) * batch() * d.kv_heads * store.room * d.head);
    }

    // The new token's states to the store.
    void keep(void* to, const float* states) const {
        for (int64_t i = 0; i < batch() * d.kv_heads; ++i)
            isa.from_float(states + i * d.head, store.type, d.head, number_at(to, store.type, (i * store.room + held) * d.head));
    }

    void attend(const Block& block, int64_t index) {
        project({&block.query, &block.key, &block.value}, normed, {queries, keys, values});
        turn(queries, d.heads, block.query_gain);
        turn(keys, d.kv_heads, block.key_gain);
        void *kept_keys = place(index, 0), *kept_values = place(index, 1);
        keep(kept_keys, keys);
        keep(kept_values, values);
        const int64_t tokens = held + 1, floats = aligned(tokens);
        const Attention job{queries, kept_keys, kept_values, store.type, d.kv_heads, d.heads / d.kv_heads, d.head, store.room, tokens, pads, d.scale, attended};
        Attend call{isa, job, scores(floats * threads), floats};
        run_tasks(threads, batch() * d.kv_heads, attend_task, &call);
        project({&block.out}, attended, {sum});
        add_to_x(sum);
    }

    // Memory that all blocks share.
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
                isa.to_float(number_at(table.dense, table.type, tokens[n] * d.hidden), table.type, d.hidden, to);
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
