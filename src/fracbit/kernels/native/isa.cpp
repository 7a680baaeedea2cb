// The instruction sets that this process can run.
#include "isa.h"

namespace fracbit {

std::vector<const Isa*> instruction_sets() {
    std::vector<const Isa*> found;
    for (const Isa* isa : {isa_avx512(), isa_avx2(), isa_neon_dot(), isa_neon(), isa_plain()})
        if (isa != nullptr) found.push_back(isa);
    return found;
}

}  // namespace fracbit
