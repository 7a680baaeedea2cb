// Causal attention of whole sequences in fp32, for calibrating a model and for judging it over text.
#pragma once

#include <cstdint>

namespace fracbit {

// Strides are in elements; the dimension of a head is contiguous. Heads in groups share keys and values.
struct Strides {
    int64_t sequence, head, token;
};

struct Causal {
    const float* queries;  // [sequences, heads, tokens, head]
    const float* keys;     // [sequences, heads / group, tokens, head]
    const float* values;
    float* out;            // as the queries
    Strides query, key, value, to;
    int64_t sequences, heads, group, tokens, head;
    float scale;
};

// Whether this process can run `attend_causal`: AVX-512, and a compiler that knew it.
bool has_causal();

// A token sees itself and those before it. `head` is a multiple of kHeadStep.
void attend_causal(const Causal& job, int threads);

constexpr int64_t kHeadStep = 8;

}  // namespace fracbit
