// Reading bytes and nothing else, among threads: the bandwidth that a product can reach at best.
#pragma once

#include "isa.h"

namespace fracbit {

// Reads `count` bytes in pieces as large as those in which codes are read; returns their xor.
uint64_t read(const Isa& isa, const uint8_t* data, int64_t count, int threads);

}  // namespace fracbit
