// The operations of a decode step. A new one is a class here, its `begin` in operations.cpp, and a method in python_step.cpp.
#pragma once

#include "scratch.h"
#include "step.h"

namespace fracbit {

// The numbers of a register from `offset` on.
struct Place {
    int64_t reg;
    int64_t offset;
};

// What operations need while a step runs; kept between steps, so that no memory is asked for.
struct Run {
    Run(const Isa& its_isa, bool rounded) : isa(its_isa), int8(rounded) {}

    const Isa& isa;
    const bool int8;              // activations of packed weights are rounded to 8 bits
    std::vector<int64_t> widths;  // of the registers

    // Of this step.
    Store store{};
    int threads = 1;
    Scratch memory;
    std::vector<float*> registers;

    // Of the operation that runs.
    Scratch scratch;
    std::vector<Product> list;
    Products products;
    float* scores = nullptr;    // of attention, a piece for each worker
    float* restored = nullptr;  // keys and values of a head, the same

    // Of the last choice of experts, [batch, top] each: their numbers, and what each counts.
    std::vector<int64_t> chosen;
    std::vector<float> shares;

    void start(const Store& given, int count) {
        store = given;
        threads = count;
        memory.reset();
        registers.assign(1, store.logits);
        for (size_t i = 1; i < widths.size(); ++i) registers.push_back(memory.floats(batch() * widths[i]));
    }

    int64_t batch() const { return store.batch; }
    int64_t width(Place place) const { return widths[static_cast<size_t>(place.reg)]; }
    float* at(Place place, int64_t n) const { return registers[static_cast<size_t>(place.reg)] + n * width(place) + place.offset; }
};

// Heads in a register: see Heads in jobs.h.
struct HeadPlaces {
    Place first;
    int64_t count, size;
    int64_t per_group, step, group_stride;
};

class Operation {
  public:
    virtual ~Operation() = default;
    // Does what one thread does; returns the number of tasks that threads then share, 0 for none.
    virtual int64_t begin(Run& run) const = 0;
    virtual void task(Run&, int64_t /*index*/, int /*worker*/) const {}
    virtual bool has_tasks() const { return false; }
    // The layers that its tasks read; none where that is decided as it runs.
    virtual std::vector<const Projection*> reads() const { return {}; }
};

// Rows of a table times a factor: embeddings of tokens; with `positions`, added, of positions from `offset` on.
struct LookUp : Operation {
    Projection table;
    Place to;
    float factor;
    bool positions;
    int64_t offset;

    int64_t begin(Run& run) const override;
};

// Norms of rows, or of each head.
struct Norm : Operation {
    HeadPlaces from{}, to{};
    const float* gain;  // [size], or null
    const float* bias;
    float epsilon;
    bool centered;

    int64_t begin(Run& run) const override;
};

// Layers that read the same numbers.
struct Linear : Operation {
    std::vector<Projection> layers;
    Place from;
    std::vector<Place> to;
    Curve after;

    int64_t begin(Run& run) const override;
    void task(Run& run, int64_t index, int worker) const override { run.products.run(index, worker); }
    bool has_tasks() const override { return true; }
    std::vector<const Projection*> reads() const override;
};

// Numbers times a matrix that is the Kronecker product of small ones.
struct Spread : Operation {
    struct Factor {
        const float* data;  // [size, size]
        int64_t size;
    };
    Place from, to;
    int64_t width;
    std::vector<Factor> factors;

    int64_t begin(Run& run) const override;
};

// Numbers to the nearest values of a table, times a scale: of all `scale`, or (0) of each group so that its largest magnitude lies at
// the end of the table.
struct Round : Operation {
    Place from, to;
    int64_t width, group;
    const float* values;      // [levels], ascending
    const float* boundaries;  // [levels - 1]
    int64_t levels;
    float step;  // between values that are evenly spaced, or 0
    float end, scale;

    int64_t begin(Run& run) const override;
    float nearest(float x) const;
};

struct Rotate : Operation {
    HeadPlaces heads;
    int64_t rotation;  // which of the store's

    int64_t begin(Run& run) const override;
};

// Keeps the new keys and values, then every query reads what is held.
struct Attend : Operation {
    HeadPlaces queries, keys, values;
    Place to;
    int64_t index;  // among the attentions of the step
    float scale, cap;
    int64_t window;
    int64_t biases;      // which of the store's, or -1
    const float* sinks;  // [heads], or null

    int64_t heads_of_task(const Run& run) const;
    int64_t restored_floats(const Run& run) const;
    void restore(const Run& run, int64_t which, int64_t n, int64_t kv, float* out) const;
    int64_t begin(Run& run) const override;
    void task(Run& run, int64_t index, int worker) const override;
    bool has_tasks() const override { return true; }
};

// Numbers through a curve; with `up`, times other numbers.
struct Activate : Operation {
    Place place;
    Place up;  // reg -1: none
    int64_t width;
    Curve curve;

    int64_t begin(Run& run) const override;
};

// to = keep * to + factor * from; where `keep` is 0, whatever `to` held.
struct Add : Operation {
    Place from, to;
    int64_t width;
    float keep, factor;

    int64_t begin(Run& run) const override;
};

// to *= the one number at `by`.
struct Scale : Operation {
    Place by, to;
    int64_t width;

    int64_t begin(Run& run) const override;
};

// The `top` experts with the largest logits, and their shares by softmax: of all experts, or, `among`, of those chosen.
struct Route : Operation {
    Place logits;
    int64_t experts, top;
    bool among;

    int64_t begin(Run& run) const override;
};

// A layer of every chosen expert: [batch, top, width] from the token's own numbers or (`apart`) from those of its expert.
struct Experts : Operation {
    std::vector<std::vector<Projection>> layers;  // [which, expert]
    Place from;
    int64_t top;
    bool apart;
    std::vector<Place> to;

    int64_t begin(Run& run) const override;
    void task(Run& run, int64_t index, int worker) const override { run.products.run(index, worker); }
    bool has_tasks() const override { return true; }
};

// What the experts found [batch, top, width], each by its share.
struct Mix : Operation {
    Place from, to;
    int64_t top, width;

    int64_t begin(Run& run) const override;
};

}  // namespace fracbit
