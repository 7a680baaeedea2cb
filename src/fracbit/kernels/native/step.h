// One step of a decoder: the newest token of every sequence in, logits out, without going back to Python between the layers.
//
// What a model computes is data: a list of operations (operations.h) on registers, which hold fp32 numbers [batch, width]. Sums are
// fp32 throughout.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "product.h"

namespace fracbit {

// Cosines and sines of positions, [room, count]: they turn the first `count` numbers of a head.
struct Rotation {
    const float* cosines;
    const float* sines;
    int64_t count;
};

// What a step reads and writes besides the weights. Sequence n began with pads[n] positions that count for nothing.
struct Store {
    void* data;  // keys and values [attentions, 2, batch, kv_heads, room, head]
    Float type;
    int64_t batch, kv_heads, room, head;
    int64_t held;           // tokens before this one
    const int64_t* tokens;  // [batch]
    const int64_t* pads;    // [batch]
    const Rotation* rotations;
    const float* const* biases;  // of scores, each [heads, room]
    float* logits;               // [batch, vocabulary]: register 0

    int64_t position(int64_t n) const { return held - pads[n]; }
};

class Operation;
struct Run;

class Program {
  public:
    Program(const Isa& isa, bool int8, int64_t vocabulary);
    ~Program();

    // A register of that width; its number. Register 0 are the logits.
    int64_t add_register(int64_t width);
    int64_t width(int64_t reg) const;
    int64_t registers() const;
    void add(std::unique_ptr<const Operation> operation);
    // One step. A program runs one at a time.
    void advance(const Store& store, int threads);

  private:
    void plan_reads(int threads);

    std::vector<std::unique_ptr<const Operation>> operations_;
    std::vector<Upcoming> first_reads_;  // [stages, threads]
    int planned_ = 0;                    // threads of first_reads_
    std::unique_ptr<Run> run_;
};

}  // namespace fracbit
