// Arrays from Python, checked: every size, type and layout is looked at here and in the other python_*.cpp, and what does not fit is a
// ValueError before anything is read. Behind these files pointers are trusted, and codes cannot lead outside a table, because every
// table has an entry for each of them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "isa.h"
#include "matrix.h"

namespace fracbit {

namespace nb = nanobind;

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;
using Shape = std::vector<int64_t>;

template <class A>
bool has_dimensions(const A& array, size_t count) {
    return array.is_valid() && array.ndim() == count;
}

// Vectors and sums read whole numbers: one that begins between two places is not one.
template <class A>
void check_alignment(const A& array, const char* name) {
    const size_t bytes = array.dtype().bits / 8;
    if (bytes > 1 && reinterpret_cast<uintptr_t>(array.data()) % bytes != 0) refuse(std::string(name) + " must be aligned");
}

inline std::string shape_text(const Shape& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

template <class A>
int64_t size_at(const A& array, size_t dimension) {
    return static_cast<int64_t>(array.shape(dimension));
}

template <class A>
Shape shape_of(const A& array) {
    Shape shape;
    for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(size_at(array, i));
    return shape;
}

template <class A>
void check_shape(const A& array, const char* name, const Shape& shape) {
    if (shape_of(array) != shape)
        refuse(std::string(name) + " should have shape " + shape_text(shape) + ", got " + shape_text(shape_of(array)));
}

// False for None too, which nanobind takes for an array inside a list or a pair.
template <class A>
bool is_type(const A& array, nb::dlpack::dtype_code code, int bits) {
    return array.is_valid() && array.dtype().code == static_cast<uint8_t>(code) && array.dtype().bits == bits && array.dtype().lanes == 1;
}

template <class A>
Float float_type(const A& array, const char* name) {
    if (is_type(array, nb::dlpack::dtype_code::Float, 32)) return Float::f32;
    if (is_type(array, nb::dlpack::dtype_code::Float, 16)) return Float::f16;
    if (is_type(array, nb::dlpack::dtype_code::Bfloat, 16)) return Float::bf16;
    refuse(std::string(name) + " must be float32, float16 or bfloat16");
}

// Row-major without gaps; strides of dimensions of size 1 mean nothing.
template <class A>
void check_layout(const A& array, const char* name, const Shape& shape) {
    check_shape(array, name, shape);
    check_alignment(array, name);
    int64_t expected = 1;
    for (size_t i = array.ndim(); i-- > 0;) {
        if (array.shape(i) != 1 && array.size() != 0 && array.stride(i) != expected) refuse(std::string(name) + " must be contiguous");
        expected *= size_at(array, i);
    }
}

inline const uint8_t* checked_bytes(const Array& array, const char* name, const Shape& shape) {
    if (!is_type(array, nb::dlpack::dtype_code::UInt, 8)) refuse(std::string(name) + " must be uint8");
    check_layout(array, name, shape);
    return static_cast<const uint8_t*>(array.data());
}

template <class A>
Float check_floats(const A& array, const char* name, const Shape& shape) {
    const Float type = float_type(array, name);
    check_layout(array, name, shape);
    return type;
}

// fp32 numbers only.
inline const float* checked_floats(const Array& array, const char* name, const Shape& shape) {
    if (!is_type(array, nb::dlpack::dtype_code::Float, 32)) refuse(std::string(name) + " must be float32");
    check_layout(array, name, shape);
    return static_cast<const float*>(array.data());
}

inline float* checked_floats(const Output& array, const char* name, const Shape& shape) {
    if (!is_type(array, nb::dlpack::dtype_code::Float, 32)) refuse(std::string(name) + " must be float32");
    check_layout(array, name, shape);
    return static_cast<float*>(array.data());
}

// [n, columns]; rows may lie apart but do not overlap.
template <class A>
Matrix matrix_of(const A& array, const char* name, int64_t columns) {
    const Float type = float_type(array, name);
    check_alignment(array, name);
    if (array.ndim() != 2 || size_at(array, 1) != columns)
        refuse(std::string(name) + " should have shape [n, " + std::to_string(columns) + "], got " + shape_text(shape_of(array)));
    const bool one_row = array.shape(0) <= 1;
    if ((columns > 1 && array.size() != 0 && array.stride(1) != 1) || (!one_row && array.stride(0) < columns))
        refuse(std::string(name) + " must have contiguous rows that do not overlap");
    return {const_cast<void*>(static_cast<const void*>(array.data())), type, one_row ? columns : array.stride(0)};
}

// The chosen one when `name` is empty.
inline const Isa& isa_named(const std::string& name) {
    if (name.empty()) return chosen_isa();
    std::string known;
    for (const Isa* isa : instruction_sets()) {
        if (name == isa->name) return *isa;
        known += std::string(known.empty() ? "" : ", ") + isa->name;
    }
    refuse("instruction set '" + name + "' is not available here; use " + known);
}

}  // namespace fracbit
