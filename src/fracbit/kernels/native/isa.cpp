// The instruction sets that this process can run.
#include "isa.h"

#include <atomic>

namespace fracbit {
namespace {

std::atomic<const Isa*> chosen{nullptr};

}  // namespace

std::vector<const Isa*> instruction_sets() {
    std::vector<const Isa*> found;
    for (const Isa* isa : {isa_avx512(), isa_avx2(), isa_neon_dot(), isa_neon(), isa_plain()})
        if (isa != nullptr) found.push_back(isa);
    return found;
}

const Isa& chosen_isa() {
    const Isa* isa = chosen.load(std::memory_order_relaxed);
    return isa != nullptr ? *isa : *instruction_sets().front();
}

void choose_isa(const Isa& isa) { chosen.store(&isa, std::memory_order_relaxed); }

}  // namespace fracbit
