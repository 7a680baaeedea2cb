// The parts of the Python module: each binds what its file holds.
#pragma once

#include "python_arrays.h"

namespace fracbit {

void bind_weight(nb::module_& m);
void bind_step(nb::module_& m);

}  // namespace fracbit
