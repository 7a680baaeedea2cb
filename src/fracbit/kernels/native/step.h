// One step of a decoder: the newest token of every sequence in, logits out, without going back to Python between the layers.
//
// The decoder has Llama's shape (Touvron et al. 2023, arXiv:2302.13971, section 2.2): x + o(attention(norm(x))), then
// x + down(silu(gate(norm(x))) * up(norm(x))), RMS norms, rotated queries and keys, grouped heads. Sums are fp32 throughout.
#pragma once

#include <cstdint>
#include <vector>

#include "scratch.h"
#include "weight.h"

namespace fracbit {

// A linear layer: a packed weight, or a float one [rows, columns].
struct Projection {
    const Weight* packed = nullptr;
    const void* dense = nullptr;
    Float type = Float::f32;
    int64_t rows = 0;
    int64_t columns = 0;
    const float* bias = nullptr;  // [rows], or null
};

struct Block {
    const float* attention_gain = nullptr;  // [hidden]
    const float* mlp_gain = nullptr;
    const float* query_gain = nullptr;  // [head], or null: norms inside a head
    const float* key_gain = nullptr;
    Projection query, key, value, out, gate, up, down;
};

struct Decoder {
    int64_t hidden = 0;
    int64_t heads = 0;
    int64_t kv_heads = 0;
    int64_t head = 0;  // numbers in a head
    float epsilon = 0;
    float scale = 0;  // of the scores
    bool int8 = false;
    Projection embedding, logits;
    const float* gain = nullptr;  // of the last norm
    std::vector<Block> blocks;
};

// Keys and values, [blocks, 2, batch, kv_heads, room, head]; `cosines` and `sines` of the positions [room, head].
struct Store {
    void* data;
    Float type;
    int64_t batch;
    int64_t room;
    const float* cosines;
    const float* sines;
};

// Read tokens [batch], which follow the `held` ones of the store, and write logits [batch, vocabulary]. Sequence n began
// with pads[n] positions that count for nothing.
void advance(const Decoder& decoder, const Isa& isa, const Store& store, int64_t held, const int64_t* tokens, const int64_t* pads,
             float* logits, Scratch& scratch, int threads);

}  // namespace fracbit
