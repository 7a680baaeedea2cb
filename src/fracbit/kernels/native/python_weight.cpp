// PackedWeight: what Python gives for a weight, checked part by part, and the calls on it.
#include "python_weight.h"

#include <utility>

#include "decode.h"
#include "product.h"
#include "python.h"

namespace fracbit {
namespace {

std::vector<int32_t> outlier_columns_of(const std::optional<Array>& columns, const std::optional<Array>& outliers) {
    if (columns.has_value() != outliers.has_value()) refuse("outlier columns and their weights come together");
    if (!columns) return {};
    if (!has_dimensions(*columns, 1)) refuse("outlier columns must be one-dimensional");
    if (!is_type(*columns, nb::dlpack::dtype_code::Int, 32)) refuse("outlier columns must be int32");
    check_layout(*columns, "outlier columns", shape_of(*columns));
    const auto* data = static_cast<const int32_t*>(columns->data());
    return {data, data + columns->shape(0)};
}

// y [batch, rows] of several weights that read the same x.
void multiply_together(const std::vector<const PackedWeight*>& weights, const Array& x, const std::vector<Output>& y, bool int8, int threads) {
    if (weights.empty() || weights.size() != y.size()) refuse("weights and results must be as many, and at least one");
    for (const PackedWeight* weight : weights)
        if (weight == nullptr) refuse("weights must be packed weights, got None");
    const int64_t columns = weights[0]->weight().columns;
    const Matrix from = matrix_of(x, "x", columns);
    std::vector<Projection> layers;
    for (const PackedWeight* weight : weights) layers.push_back(projection_of(weight->weight()));
    std::vector<Product> products;
    for (size_t i = 0; i < y.size(); ++i) {
        const Weight& weight = weights[i]->weight();
        if (weight.columns != columns) refuse("weights that share x must have as many columns");
        if (!has_dimensions(y[i], 2) || y[i].shape(0) != x.shape(0)) refuse("x and y must have the same number of rows");
        products.push_back({&layers[i], from, matrix_of(y[i], "y", weight.rows), {}});
    }
    const int64_t batch = size_at(x, 0);
    nb::gil_scoped_release release;
    multiply(std::move(products), weights[0]->isa(), batch, int8, threads);
}

// y [batch, rows] of weights of one shape: the first sizes[0] rows of x [batch, columns] times the first weight, and so on.
void multiply_each_checked(const std::vector<const PackedWeight*>& weights, const Array& x, const Output& y, const std::vector<int64_t>& sizes,
                           bool int8, int threads) {
    if (weights.empty() || weights.size() != sizes.size()) refuse("weights and sizes must be as many, and at least one");
    for (const PackedWeight* weight : weights)
        if (weight == nullptr) refuse("weights must be packed weights, got None");
    const int64_t columns = weights[0]->weight().columns, rows = weights[0]->weight().rows;
    Matrix from = matrix_of(x, "x", columns), to = matrix_of(y, "y", rows);
    const int64_t batch = size_at(x, 0);
    if (size_at(y, 0) != batch) refuse("x and y must have the same number of rows");
    int64_t left = batch;
    for (int64_t size : sizes) {
        if (size < 0 || size > left) refuse("sizes must add up to the rows of x");
        left -= size;
    }
    if (left != 0) refuse("sizes must add up to the rows of x");
    std::vector<Projection> layers;
    for (const PackedWeight* weight : weights) {
        if (weight->weight().columns != columns || weight->weight().rows != rows) refuse("weights must have one shape");
        layers.push_back(projection_of(weight->weight()));
    }
    std::vector<Product> products;
    for (size_t i = 0; i < layers.size(); ++i) {
        if (sizes[i] > 0) products.push_back({&layers[i], from, to, {}, sizes[i]});
        from = from.from_row(sizes[i]);
        to = to.from_row(sizes[i]);
    }
    nb::gil_scoped_release release;
    multiply_each(products, weights[0]->isa(), int8, threads);
}

}  // namespace

PackedWeight::PackedWeight(int64_t rows, int64_t columns, int bits, const std::string& blocks, int64_t block, Array codes, Array scales,
                           std::optional<Array> offsets, std::optional<Array> zeros, Array table,
                           std::optional<Array> outlier_columns, std::optional<Array> outliers, const std::string& isa)
    : isa_(isa_named(isa)), held_{codes, scales} {
    std::vector<int32_t> others = outlier_columns_of(outlier_columns, outliers);
    set_size(weight_, rows, columns, bits, static_cast<int64_t>(others.size()));
    weight_.codes = checked_bytes(codes, "codes", {rows, weight_.stride()});
    const Shape stored = set_blocks(weight_, blocks, block);
    take_scales(scales, offsets, stored);
    if (!has_dimensions(table, 2)) refuse("table must have shape [1 or rows, levels]");
    const int64_t table_rows = size_at(table, 0), levels = size_at(table, 1);
    set_table(weight_, checked_floats(table, "table", {table_rows, levels}), table_rows, levels);
    if (offsets && zeros) refuse("a weight has offsets or zeros, not both");
    take_zeros(zeros, stored);
    take_outliers(outliers, std::move(others));
}

void PackedWeight::take_scales(const Array& scales, const std::optional<Array>& offsets, const Shape& stored) {
    weight_.scales.type = check_floats(scales, "scales", stored);
    weight_.scales.values = scales.data();
    if (!offsets) return;
    if (check_floats(*offsets, "offsets", stored) != weight_.scales.type) refuse("offsets must have the type of the scales");
    weight_.scales.offsets = offsets->data();
    held_.push_back(*offsets);
}

void PackedWeight::take_zeros(const std::optional<Array>& zeros, const Shape& stored) {
    if (!zeros) return;
    const int64_t rows = stored.size() == 2 ? stored[0] : 1, columns = stored.back();
    set_zeros(weight_, checked_bytes(*zeros, "zeros", {rows, code_bytes(columns, weight_.bits)}), rows, columns);
}

void PackedWeight::take_outliers(const std::optional<Array>& outliers, std::vector<int32_t> columns) {
    if (!outliers) return;
    weight_.outliers.type = check_floats(*outliers, "outliers", {weight_.rows, static_cast<int64_t>(columns.size())});
    weight_.outliers.values = outliers->data();
    held_.push_back(*outliers);
    set_outlier_columns(weight_, std::move(columns));
}

void PackedWeight::multiply(const Array& x, const Output& y, bool int8, int threads) const {
    const Matrix from = matrix_of(x, "x", weight_.columns), to = matrix_of(y, "y", weight_.rows);
    if (x.shape(0) != y.shape(0)) refuse("x and y must have the same number of rows");
    const int64_t batch = size_at(x, 0);
    const Projection layer = projection_of(weight_);
    nb::gil_scoped_release release;
    fracbit::multiply({{&layer, from, to, {}}}, isa_, batch, int8, threads);
}

void PackedWeight::decode(int64_t first, const Output& out, int threads) const {
    const Matrix to = matrix_of(out, "out", weight_.columns);
    const int64_t count = size_at(out, 0);
    if (first < 0 || first > weight_.rows || count > weight_.rows - first) refuse("rows to decode lie outside the weight");
    nb::gil_scoped_release release;
    fracbit::decode(weight_, isa_, first, first + count, to, threads);
}

void bind_weight(nb::module_& m) {
    nb::class_<PackedWeight>(m, "PackedWeight", "A packed weight; arrays are shared with the caller, not copied.")
        .def(nb::init<int64_t, int64_t, int, const std::string&, int64_t, Array, Array, std::optional<Array>, std::optional<Array>,
                      Array, std::optional<Array>, std::optional<Array>, const std::string&>(),
             nb::arg("rows"), nb::arg("columns"), nb::arg("bits"), nb::arg("blocks"), nb::arg("block"), nb::arg("codes"),
             nb::arg("scales"), nb::arg("offsets").none(), nb::arg("zeros").none(), nb::arg("table"),
             nb::arg("outlier_columns").none(), nb::arg("outliers").none(), nb::arg("isa") = "")
        .def("multiply", &PackedWeight::multiply, nb::arg("x"), nb::arg("y"), nb::arg("int8"), nb::arg("threads"),
             "y [batch, rows] = x [batch, columns] W^T.")
        .def("decode", &PackedWeight::decode, nb::arg("first"), nb::arg("out"), nb::arg("threads"),
             "Rows of W from `first` on, as many as `out` [n, columns] has.")
        .def_prop_ro("derived_bytes", &PackedWeight::derived_bytes, "Bytes that were derived, besides the shared arrays.")
        .def_prop_ro("whole_lanes", &PackedWeight::whole_lanes, "Whether blocks are whole lanes; others are decoded row by row.")
        .def_prop_ro("isa", &PackedWeight::isa_name);
    m.def("multiply_together", &multiply_together, nb::arg("weights"), nb::arg("x"), nb::arg("y"), nb::arg("int8"), nb::arg("threads"),
          "y [batch, rows] of several weights that read the same x [batch, columns]; its rounding is done once.");
    m.def("multiply_each", &multiply_each_checked, nb::arg("weights"), nb::arg("x"), nb::arg("y"), nb::arg("sizes"), nb::arg("int8"), nb::arg("threads"),
          "y [batch, rows] of weights of one shape, each of which has the next of `sizes` rows of x [batch, columns]: experts of a mixture.");
}

}  // namespace fracbit
