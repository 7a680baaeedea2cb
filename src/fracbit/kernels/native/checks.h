// Refusing what does not fit, with a sentence for people. nanobind turns the exception into a ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fracbit {

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument(what); }

inline int64_t in_range(int64_t value, const char* name, int64_t most) {
    if (value < 1 || value > most) refuse(std::string(name) + " must be in 1.." + std::to_string(most) + ", got " + std::to_string(value));
    return value;
}

}  // namespace fracbit
