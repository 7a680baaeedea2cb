// NEON as every 64-bit ARM processor has it.
#include "isa.h"

#if defined(__aarch64__)
#include "neon.h"

namespace fracbit {
const Isa* isa_neon() {
    static constexpr Isa isa = isa_of<Neon>("neon", false);
    return &isa;
}
}  // namespace fracbit
#else
namespace fracbit {
const Isa* isa_neon() { return nullptr; }
}  // namespace fracbit
#endif
