#include "isa.h"
namespace fracbit { const Isa* isa_avx2() { return nullptr; } }
