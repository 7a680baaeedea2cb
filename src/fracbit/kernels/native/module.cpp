// fracbit.kernels._native: the native CPU kernels as Python sees them. Weights and decoders are bound in python_weight.cpp and
// python_step.cpp, the rest here.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "gram.h"
#include "pool.h"
#include "python.h"
#include "read.h"

namespace fracbit {
namespace {

// Raised whenever a signature changes, so that Python refuses an extension left over from another version.
constexpr int kAbi = 10;

std::vector<std::string> names_of_instruction_sets() {
    std::vector<std::string> names;
    for (const Isa* isa : instruction_sets()) names.emplace_back(isa->name);
    return names;
}

// Some kernels are written for AVX-512 alone.
bool is_avx512() { return std::string("avx512") == chosen_isa().name; }

uint64_t read_checked(const Array& bytes, int threads) {
    if (!has_dimensions(bytes, 1)) refuse("bytes must be one-dimensional");
    const uint8_t* data = checked_bytes(bytes, "bytes", shape_of(bytes));
    nb::gil_scoped_release release;
    return read(isa_named(""), data, size_at(bytes, 0), threads);
}

void add_gram_checked(const Array& x, const Output& gram, int threads) {
    if (!has_gram()) refuse("this machine, or the compiler that built this module, has no bfloat16 products");
    if (!has_dimensions(x, 2) || !is_type(x, nb::dlpack::dtype_code::Bfloat, 16)) refuse("x must be bfloat16 [tokens, width]");
    const int64_t tokens = size_at(x, 0), width = size_at(x, 1);
    float* sums = checked_floats(gram, "gram", {width, width});
    const Matrix from = matrix_of(x, "x", width);
    nb::gil_scoped_release release;
    add_gram(static_cast<const uint16_t*>(from.data), from.stride, tokens, width, sums, threads);
}

// Where a [sequences, heads, tokens, head] array of floats keeps them; a head lies in one piece.
Strides strides_of(const Output& array, const char* name, const Shape& shape) {
    if (!is_type(array, nb::dlpack::dtype_code::Float, 32)) refuse(std::string(name) + " must be float32");
    check_shape(array, name, shape);
    check_alignment(array, name);
    if (shape[3] > 1 && array.stride(3) != 1) refuse(std::string(name) + " must have contiguous heads");
    return {array.stride(0), array.stride(1), array.stride(2)};
}

void attend_causal_checked(const Output& queries, const Output& keys, const Output& values, const Output& out, float scale,
                           int threads) {
    if (!has_causal()) refuse("this machine, or the compiler that built this module, has no AVX-512");
    if (!has_dimensions(queries, 4) || !has_dimensions(keys, 4)) refuse("queries and keys must be [sequences, heads, tokens, head]");
    const Shape shape = shape_of(queries);
    const int64_t shared = size_at(keys, 1);
    if (shared < 1 || shape[1] % shared) refuse("the heads of the queries must be a multiple of those of the keys");
    if (shape[3] < 1 || shape[3] % kHeadStep) refuse("a head must be a multiple of " + std::to_string(kHeadStep));
    const Shape held{shape[0], shared, shape[2], shape[3]};
    const Causal job{static_cast<const float*>(queries.data()), static_cast<const float*>(keys.data()),
                     static_cast<const float*>(values.data()), static_cast<float*>(out.data()),
                     strides_of(queries, "queries", shape), strides_of(keys, "keys", held), strides_of(values, "values", held),
                     strides_of(out, "out", shape), shape[0], shape[1], shape[1] / shared, shape[2], shape[3], scale};
    nb::gil_scoped_release release;
    attend_causal(job, threads);
}

}  // namespace
}  // namespace fracbit

NB_MODULE(_native, m) {
    using namespace fracbit;
    nb::set_leak_warnings(false);  // weights held by modules that live until the interpreter ends are no leak
    m.doc() = "Native CPU kernels of fracbit.";
    m.def("abi", [] { return kAbi; }, "Version of the interface between fracbit's Python and its native kernels.");
    m.def("instruction_sets", &names_of_instruction_sets, "Instruction sets this process can run, best first.");
    m.def("instruction_set", [] { return std::string(chosen_isa().name); }, "The one that runs where none is named.");
    m.def("choose_instruction_set", [](const std::string& name) { choose_isa(isa_named(name)); }, nb::arg("name"),
          "Let one of instruction_sets() run from now on, instead of the best.");
    m.def("allow_threads_of_torch", &allow_threads_of_torch, nb::arg("allowed"),
          "Whether tasks may be shared out among the threads of torch's OpenMP library, as they are by default.");
    m.def("on_threads_of_torch", &on_threads_of_torch, "Whether they are: allowed, and torch has such a library.");
    m.def("read", &read_checked, nb::arg("bytes"), nb::arg("threads"),
          "Read bytes and do nothing else: the bandwidth a kernel can at best reach.");
    m.def("has_gram", [] { return has_gram() && is_avx512(); }, "Whether `add_gram` can run here: AVX-512 with bfloat16 products.");
    m.def("add_gram", &add_gram_checked, nb::arg("x"), nb::arg("gram"), nb::arg("threads"),
          "gram [width, width] fp32 += x^T x for x [tokens, width] bfloat16.");
    m.def("has_causal", [] { return has_causal() && is_avx512(); }, "Whether `attend_causal` can run here: AVX-512.");
    m.def("attend_causal", &attend_causal_checked, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("out"),
          nb::arg("scale"), nb::arg("threads"), "out = causal attention of [sequences, heads, tokens, head] fp32, whole sequences.");
    bind_weight(m);
    bind_step(m);
}
