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

// Cosines and sines of positions, [positions, count]: they turn the first `count` numbers of a head.
struct Rotation {
    const float* cosines;
    const float* sines;
    int64_t count;
};

// Keys or values that are held as codes, low + code * step, in groups of tokens: codes [attentions, batch, kv_heads, groups, group, head]
// of 8 or 4 bits; ranges for every channel of a group (keys), or every token (values).
struct Older {
    const uint8_t* codes;
    const void *low, *step;
    Float type;
};

// What a step reads and writes besides the weights. Sequence n began with pads[n] positions that count for nothing.
struct Store {
    void* data;  // keys and values [attentions, 2, batch, kv_heads, room, head]
    Float type;
    int64_t batch, kv_heads, room, head;
    int64_t held;           // tokens in `data` before this one
    int64_t groups, group;  // those before these are codes: so many groups of so many tokens
    int bits;               // of a code
    Older older[2];
    int64_t positions;      // rows of the tables below
    const int64_t* tokens;  // [batch]
    const int64_t* pads;    // [batch]
    const Rotation* rotations;
    const float* const* biases;  // of scores, each [heads, positions]
    float* logits;               // [batch, vocabulary]: register 0

    int64_t seen() const { return groups * group + held; }
    int64_t position(int64_t n) const { return seen() - pads[n]; }
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
