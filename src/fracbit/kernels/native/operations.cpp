// What each operation of operations.h does.
#include "operations.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "decode.h"
#include "tasks.h"

namespace fracbit {
namespace {

Heads heads_at(const Run& run, const HeadPlaces& places) {
    return {run.at(places.first, 0), run.width(places.first), places.per_group, places.step, places.group_stride};
}

Matrix matrix_at(const Run& run, Place place) { return {run.at(place, 0), Float::f32, run.width(place)}; }

}  // namespace

int64_t LookUp::begin(Run& run) const {
    float* row = run.scratch.floats(table.columns);
    for (int64_t n = 0; n < run.batch(); ++n) {
        const int64_t index = positions ? run.store.position(n) + offset : run.store.tokens[n];
        if (table.packed != nullptr) {
            decode(*table.packed, run.isa, index, index + 1, {row, Float::f32, table.columns}, 1);
        } else {
            run.isa.to_float(table.row(index), table.type, table.columns, row);
        }
        float* out = run.at(to, n);
        for (int64_t i = 0; i < table.columns; ++i) out[i] = positions ? out[i] + row[i] : factor * row[i];
    }
    return 0;
}

int64_t Norm::begin(Run& run) const {
    const Heads source = heads_at(run, from), target = heads_at(run, to);
    for (int64_t n = 0; n < run.batch(); ++n)
        for (int64_t h = 0; h < from.count; ++h) run.isa.normalize(source.at(n, h), gain, bias, epsilon, centered, from.size, target.at(n, h));
    return 0;
}

std::vector<const Projection*> Linear::reads() const {
    std::vector<const Projection*> all;
    for (const Projection& layer : layers) all.push_back(&layer);
    return all;
}

int64_t Linear::begin(Run& run) const {
    std::vector<Product>& products = run.list;
    products.clear();
    for (size_t i = 0; i < layers.size(); ++i) products.push_back({&layers[i], matrix_at(run, from), matrix_at(run, to[i]), after});
    return run.products.prepare(products.data(), products.size(), run.isa, run.batch(), run.int8, run.threads, run.scratch);
}

// One factor after another, the last first: the last axis is turned, and the next one moves to its place.
int64_t Spread::begin(Run& run) const {
    float *now = run.scratch.floats(width), *next = run.scratch.floats(width), *row = run.scratch.floats(width);
    for (int64_t n = 0; n < run.batch(); ++n) {
        std::copy_n(run.at(from, n), width, now);
        for (auto factor = factors.rbegin(); factor != factors.rend(); ++factor) {
            const int64_t size = factor->size, count = width / size;
            for (int64_t i = 0; i < count; ++i) {
                std::fill_n(row, size, 0.0f);
                for (int64_t k = 0; k < size; ++k) {
                    const float x = now[i * size + k];
                    const float* weights = factor->data + k * size;
                    for (int64_t j = 0; j < size; ++j) row[j] += x * weights[j];
                }
                for (int64_t j = 0; j < size; ++j) next[j * count + i] = row[j];
            }
            std::swap(now, next);
        }
        std::copy_n(now, width, run.at(to, n));
    }
    return 0;
}

float Round::nearest(float x) const {
    if (x != x) return x;
    if (step == 0.0f) return values[std::lower_bound(boundaries, boundaries + levels - 1, x) - boundaries];
    const float code = std::nearbyint((x - values[0]) / step);
    return values[static_cast<int64_t>(std::clamp(code, 0.0f, static_cast<float>(levels - 1)))];
}

int64_t Round::begin(Run& run) const {
    for (int64_t n = 0; n < run.batch(); ++n) {
        const float* x = run.at(from, n);
        float* y = run.at(to, n);
        for (int64_t first = 0; first < width; first += group) {
            const int64_t last = std::min(first + group, width);
            float most = scale * end;
            if (scale == 0.0f)
                for (int64_t i = first; i < last; ++i) most = std::abs(x[i]) > most || x[i] != x[i] ? std::abs(x[i]) : most;
            const float unit = most / end, inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
            for (int64_t i = first; i < last; ++i) {
                const float inside = x[i] * inverse;
                y[i] = nearest(inside > 1.0f ? 1.0f : inside < -1.0f ? -1.0f : inside) * unit;
            }
        }
    }
    return 0;
}

int64_t Rotate::begin(Run& run) const {
    const Rotation& by = run.store.rotations[rotation];
    const Heads all = heads_at(run, heads);
    for (int64_t n = 0; n < run.batch(); ++n) {
        const int64_t first = run.store.position(n) * by.count;
        for (int64_t h = 0; h < heads.count; ++h) run.isa.rotate(all.at(n, h), by.cosines + first, by.sines + first, by.count);
    }
    return 0;
}

int64_t Attend::begin(Run& run) const {
    const Store& store = run.store;
    const HeadPlaces* states[] = {&keys, &values};
    for (int64_t which = 0; which < 2; ++which) {
        const Heads from = heads_at(run, *states[which]);
        for (int64_t n = 0; n < run.batch(); ++n)
            for (int64_t h = 0; h < store.kv_heads; ++h) {
                const int64_t row = (((2 * index + which) * run.batch() + n) * store.kv_heads + h) * store.room + store.held;
                run.isa.from_float(from.at(n, h), store.type, store.head, number_at(store.data, store.type, row * store.head));
            }
    }
    run.scores = run.scratch.floats(kHeadsTogether * aligned(store.seen() + 1) * run.threads);
    run.restored = run.scratch.floats(store.groups == 0 ? 0 : restored_floats(run) * run.threads);
    return run.batch() * queries.count / heads_of_task(run);
}

// Heads that share keys and values are a task, unless that makes too few of them to go round. Codes are decoded once for all.
int64_t Attend::heads_of_task(const Run& run) const {
    const int64_t shared = run.batch() * run.store.kv_heads;
    return run.store.groups > 0 || shared >= kTasksPerThread * run.threads ? queries.count / run.store.kv_heads : 1;
}

// Of a worker: keys, values, and two rows of ranges.
int64_t Attend::restored_floats(const Run& run) const {
    const Store& store = run.store;
    return 2 * aligned((store.seen() + 1) * store.head) + 2 * aligned(std::max(store.head, store.group));
}

// Keys (0) or values (1) of a head of sequence n as floats [tokens, head]: those that are codes, then the others.
void Attend::restore(const Run& run, int64_t which, int64_t n, int64_t kv, float* out) const {
    const Store& store = run.store;
    const Older& from = store.older[which];
    const int64_t ranges = which == 0 ? store.head : store.group, bytes = code_bytes(store.head, store.bits);
    float *low = out + (2 - which) * aligned((store.seen() + 1) * store.head), *step = low + aligned(std::max(store.head, store.group));
    for (int64_t g = 0; g < store.groups; ++g) {
        const int64_t at = ((index * run.batch() + n) * store.kv_heads + kv) * store.groups + g;
        run.isa.to_float(number_at(from.low, from.type, at * ranges), from.type, ranges, low);
        run.isa.to_float(number_at(from.step, from.type, at * ranges), from.type, ranges, step);
        for (int64_t t = 0; t < store.group; ++t, out += store.head) {
            const uint8_t* codes = from.codes + (at * store.group + t) * bytes;
            for (int64_t d = 0; d < store.head; ++d) {
                const int code = store.bits == 8 ? codes[d] : codes[d / 2] >> (d % 2 * 4) & 15;
                const int64_t range = which == 0 ? d : t;
                out[d] = low[range] + static_cast<float>(code) * step[range];
            }
        }
    }
    const int64_t row = (((2 * index + which) * run.batch() + n) * store.kv_heads + kv) * store.room;
    run.isa.to_float(number_at(store.data, store.type, row * store.head), store.type, (store.held + 1) * store.head, out);
}

void Attend::task(Run& run, int64_t task, int worker) const {
    const Store& store = run.store;
    const int64_t heads = heads_of_task(run), n = task * heads / queries.count, head = task * heads % queries.count, tokens = store.seen() + 1;
    const int64_t kv = store.room * store.head, sequence = store.kv_heads * kv, plane = run.batch() * sequence, group = queries.count / store.kv_heads;
    Attention job{heads_at(run, queries), number_at(store.data, store.type, 2 * index * plane), number_at(store.data, store.type, (2 * index + 1) * plane),
                  store.type, sequence, kv, group, store.head, store.positions, tokens, store.pads, window, scale, cap,
                  biases < 0 ? nullptr : store.biases[biases], sinks, run.at(to, 0), run.width(to), aligned(tokens)};
    if (store.groups > 0) {
        float *keys = run.restored + worker * restored_floats(run), *values = keys + aligned(tokens * store.head);
        restore(run, 0, n, head / group, keys);
        restore(run, 1, n, head / group, values);
        job.keys = keys;
        job.values = values;
        job.type = Float::f32;
        job.sequence = job.kv = 0;
    }
    run.isa.attend(job, n, head, heads, run.scores + worker * kHeadsTogether * aligned(tokens));
}

int64_t Activate::begin(Run& run) const {
    for (int64_t n = 0; n < run.batch(); ++n) {
        if (up.reg < 0) {
            run.isa.apply(curve, run.at(place, n), width);
        } else {
            run.isa.gate(curve, run.at(place, n), run.at(up, n), width);
        }
    }
    return 0;
}

int64_t Add::begin(Run& run) const {
    for (int64_t n = 0; n < run.batch(); ++n) {
        const float* x = run.at(from, n);
        float* y = run.at(to, n);
        for (int64_t i = 0; i < width; ++i) y[i] = keep == 0.0f ? factor * x[i] : keep * y[i] + factor * x[i];  // NaN times 0 is NaN
    }
    return 0;
}

int64_t Scale::begin(Run& run) const {
    for (int64_t n = 0; n < run.batch(); ++n) {
        const float factor = run.at(by, n)[0];
        float* y = run.at(to, n);
        for (int64_t i = 0; i < width; ++i) y[i] *= factor;
    }
    return 0;
}

int64_t Route::begin(Run& run) const {
    run.chosen.resize(static_cast<size_t>(run.batch() * top));
    run.shares.resize(run.chosen.size());
    std::vector<int64_t> order(static_cast<size_t>(experts));
    for (int64_t n = 0; n < run.batch(); ++n) {
        const float* score = run.at(logits, n);
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + top, order.end(), [&](int64_t a, int64_t b) { return score[a] > score[b] || (score[a] == score[b] && a < b); });
        const float most = score[order[0]];
        float sum = 0.0f;
        for (int64_t i = 0; i < (among ? top : experts); ++i) sum += std::exp(score[order[static_cast<size_t>(i)]] - most);
        for (int64_t i = 0; i < top; ++i) {
            const auto at = static_cast<size_t>(n * top + i);
            run.chosen[at] = order[static_cast<size_t>(i)];
            run.shares[at] = std::exp(score[run.chosen[at]] - most) / sum;
        }
    }
    return 0;
}

int64_t Experts::begin(Run& run) const {
    std::vector<Product>& products = run.list;
    products.clear();
    for (int64_t n = 0; n < run.batch(); ++n)
        for (int64_t i = 0; i < top; ++i)
            for (size_t which = 0; which < layers.size(); ++which) {
                const Projection& layer = layers[which][static_cast<size_t>(run.chosen[static_cast<size_t>(n * top + i)])];
                const Matrix x{run.at(from, n) + (apart ? i * layer.columns : 0), Float::f32, layer.columns};
                products.push_back({&layer, x, {run.at(to[which], n) + i * layer.rows, Float::f32, layer.rows}, {}});
            }
    return run.products.prepare(products.data(), products.size(), run.isa, 1, run.int8, run.threads, run.scratch);
}

int64_t Mix::begin(Run& run) const {
    for (int64_t n = 0; n < run.batch(); ++n) {
        const float* x = run.at(from, n);
        float* y = run.at(to, n);
        std::fill(y, y + width, 0.0f);
        for (int64_t i = 0; i < top; ++i) {
            const float share = run.shares[static_cast<size_t>(n * top + i)];
            for (int64_t d = 0; d < width; ++d) y[d] += share * x[i * width + d];
        }
    }
    return 0;
}

}  // namespace fracbit
