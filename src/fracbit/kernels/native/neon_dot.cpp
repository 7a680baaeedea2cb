// NEON with the dot product of ARMv8.2: Cortex-A76, Neoverse N1, Apple M1 and later.
#include "isa.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "neon.h"

namespace fracbit {
const Isa* isa_neon_dot() {
    static constexpr Isa isa = isa_of<Neon>("neon dot", false);
#if defined(__linux__)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & kDotProducts) != 0 ? &isa : nullptr;
#elif defined(__APPLE__)
    return &isa;  // all of their processors have it
#else
    return nullptr;
#endif
}
}  // namespace fracbit
#else
namespace fracbit {
const Isa* isa_neon_dot() { return nullptr; }
}  // namespace fracbit
#endif
