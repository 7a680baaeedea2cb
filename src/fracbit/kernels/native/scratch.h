// Memory for one call: handed out piece by piece, and kept for the next call, since asking the system costs more than a small product.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace fracbit {

constexpr int64_t kAlignment = 64;  // bytes: a line of the cache, or a register of AVX-512
constexpr int64_t kAlignedFloats = kAlignment / static_cast<int64_t>(sizeof(float));

inline int64_t aligned(int64_t floats) { return (floats + kAlignedFloats - 1) / kAlignedFloats * kAlignedFloats; }

class Scratch {
  public:
    // `count` floats, aligned, until the next reset.
    float* floats(int64_t count) {
        count = aligned(count);
        if (blocks_.empty() || used_ + count > size_) add(count);
        float* result = blocks_.back().get() + used_;
        used_ += count;
        all_ += count;
        return result;
    }

    void reset() {
        if (blocks_.size() > 1) {  // one block for all of it next time
            blocks_.clear();
            add(all_);
        }
        used_ = all_ = 0;
    }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };

    void add(int64_t count) {
        size_ = count > kLeast ? count : kLeast;
        auto* block = static_cast<float*>(std::aligned_alloc(kAlignment, static_cast<size_t>(size_) * sizeof(float)));
        if (block == nullptr) throw std::bad_alloc();
        blocks_.emplace_back(block);
        used_ = 0;
    }

    static constexpr int64_t kLeast = 1 << 12;  // floats: small calls fit into one block at once
    std::vector<std::unique_ptr<float, Free>> blocks_;
    int64_t size_ = 0, used_ = 0, all_ = 0;
};

}  // namespace fracbit
