#include "isa.h"
namespace fracbit { const Isa* isa_neon() { return nullptr; } }
