// fracbit.kernels._native: the Python face of the native CPU kernels.

#include <nanobind/nanobind.h>

namespace {

// Raised whenever a signature below changes, so that Python refuses an extension left over from another version.
constexpr int kAbi = 1;

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native CPU kernels of fracbit.";
    m.def("abi", [] { return kAbi; }, "Version of the interface between fracbit's Python and its native kernels.");
}
