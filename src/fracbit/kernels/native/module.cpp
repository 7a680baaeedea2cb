// fracbit.kernels._native: the Python face of the native CPU kernels.
//
// Every size and type is checked here, at the boundary; what does not fit is a ValueError and nothing is read. Behind this
// file pointers are trusted, and codes cannot lead outside a table because every table has an entry for each of them.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "attention.h"
#include "gram.h"
#include "linear.h"
#include "pool.h"
#include "step.h"

namespace nb = nanobind;
using namespace fracbit;

namespace {

// Raised whenever a signature below changes, so that Python refuses an extension left over from another version.
constexpr int kAbi = 7;

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;

[[noreturn]] void refuse(const std::string& what) { throw nb::value_error(what.c_str()); }

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

template <class A>
std::vector<int64_t> shape_of(const A& array) {
    std::vector<int64_t> shape;
    for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(static_cast<int64_t>(array.shape(i)));
    return shape;
}

template <class A>
bool is_type(const A& array, nb::dlpack::dtype_code code, int bits) {
    return array.dtype().code == static_cast<uint8_t>(code) && array.dtype().bits == bits && array.dtype().lanes == 1;
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
void check_layout(const A& array, const char* name, const std::vector<int64_t>& shape) {
    if (shape_of(array) != shape)
        refuse(std::string(name) + " should have shape " + shape_text(shape) + ", got " + shape_text(shape_of(array)));
    int64_t expected = 1;
    for (size_t i = array.ndim(); i-- > 0;) {
        if (array.shape(i) != 1 && array.size() != 0 && array.stride(i) != expected) refuse(std::string(name) + " must be contiguous");
        expected *= static_cast<int64_t>(array.shape(i));
    }
}

void check_bytes(const Array& array, const char* name, const std::vector<int64_t>& shape) {
    if (!is_type(array, nb::dlpack::dtype_code::UInt, 8)) refuse(std::string(name) + " must be uint8");
    check_layout(array, name, shape);
}

Float check_floats(const Array& array, const char* name, const std::vector<int64_t>& shape) {
    const Float type = float_type(array, name);
    check_layout(array, name, shape);
    return type;
}

int64_t positive(int64_t value, const char* name, int64_t most) {
    if (value < 1 || value > most) refuse(std::string(name) + " must be in 1.." + std::to_string(most) + ", got " + std::to_string(value));
    return value;
}

const Isa& isa_named(const std::string& name) {
    std::string known;
    for (const Isa* isa : instruction_sets()) {
        if (name == isa->name || name.empty()) return *isa;
        known += std::string(known.empty() ? "" : ", ") + isa->name;
    }
    refuse("instruction set '" + name + "' is not available here; use " + known);
}

// A packed weight that keeps the arrays it reads alive.
class PackedWeight {
  public:
    PackedWeight(int64_t rows, int64_t columns, int bits, const std::string& blocks, int64_t block, Array codes, Array scales,
                 std::optional<Array> offsets, std::optional<Array> zeros, Array table, std::optional<Array> outlier_columns,
                 std::optional<Array> outliers, const std::string& isa)
        : isa_(isa_named(isa)), held_{codes, scales} {
        constexpr int64_t kMost = int64_t{1} << 31;  // lane positions are 32-bit
        w_.rows = positive(rows, "rows", kMost - 1);
        w_.columns = positive(columns, "columns", kMost - 1);
        w_.bits = static_cast<int>(positive(bits, "bits", 8));
        positive(block, "block", int64_t{1} << 62);
        const int64_t others = set_outliers(outlier_columns, outliers);
        w_.kept = w_.columns - others;
        if (w_.kept < 1) refuse("every column is an outlier: nothing is quantized");
        check_bytes(codes, "codes", {w_.rows, w_.stride()});
        w_.codes = static_cast<const uint8_t*>(codes.data());
        const std::vector<int64_t> stored = set_blocks(blocks, block);
        w_.scale_type = check_floats(scales, "scales", stored);
        w_.scales = scales.data();
        if (offsets) {
            if (check_floats(*offsets, "offsets", stored) != w_.scale_type) refuse("offsets must have the type of the scales");
            w_.offsets = offsets->data();
            held_.push_back(*offsets);
        }
        const int64_t zero_rows = stored.size() == 2 ? stored[0] : 1, zero_columns = stored.back();
        if (zeros) {
            if (offsets) refuse("a weight has offsets or zeros, not both");
            check_bytes(*zeros, "zeros", {zero_rows, (zero_columns * w_.bits + 7) / 8});
        }
        const int64_t levels = set_table(table, zeros.has_value());
        const std::vector<int32_t> columns_copy = checked_columns(outlier_columns);
        derive(w_, static_cast<const float*>(table.data()), levels, zeros ? static_cast<const uint8_t*>(zeros->data()) : nullptr,
               zero_rows, zero_columns, columns_copy.data(), static_cast<int64_t>(columns_copy.size()));
    }

    void multiply(const Array& x, const Output& y, bool int8, int threads) const {
        const Matrix from = matrix(x, "x", w_.columns), to = matrix(y, "y", w_.rows);
        if (x.shape(0) != y.shape(0)) refuse("x and y must have the same number of rows");
        const auto batch = static_cast<int64_t>(x.shape(0));
        nb::gil_scoped_release release;
        fracbit::multiply(w_, isa_, from, to, batch, int8, threads);
    }

    void decode(int64_t first, const Output& out, int threads) const {
        const Matrix to = matrix(out, "out", w_.columns);
        const auto count = static_cast<int64_t>(out.shape(0));
        if (first < 0 || first > w_.rows || count > w_.rows - first) refuse("rows to decode lie outside the weight");
        nb::gil_scoped_release release;
        fracbit::decode(w_, isa_, first, first + count, to, threads);
    }

    // Bytes derived at load time, besides the arrays that are shared with the caller.
    int64_t derived_bytes() const {
        return static_cast<int64_t>(w_.zeros.size() + w_.high.size() + w_.low.size() + 4 * w_.values.size() + 4 * w_.steps.size() +
                                    4 * (w_.lane.size() + w_.kept_columns.size() + w_.other_columns.size()));
    }
    bool whole_lanes() const { return w_.whole_lanes; }
    std::string isa() const { return isa_.name; }
    const Weight& weight() const { return w_; }

    const Isa& set() const { return isa_; }

    template <class A>
    static Matrix matrix(const A& array, const char* name, int64_t columns) {
        const Float type = float_type(array, name);
        if (array.ndim() != 2 || static_cast<int64_t>(array.shape(1)) != columns)
            refuse(std::string(name) + " should have shape [n, " + std::to_string(columns) + "], got " + shape_text(shape_of(array)));
        const bool one_row = array.shape(0) <= 1;
        if ((columns > 1 && array.size() != 0 && array.stride(1) != 1) || (!one_row && array.stride(0) < columns))
            refuse(std::string(name) + " must have contiguous rows that do not overlap");
        return {const_cast<void*>(static_cast<const void*>(array.data())), type, one_row ? columns : array.stride(0)};
    }

  private:
    int64_t set_outliers(const std::optional<Array>& columns, const std::optional<Array>& outliers) {
        if (columns.has_value() != outliers.has_value()) refuse("outlier columns and their weights come together");
        if (!columns) return 0;
        if (columns->ndim() != 1) refuse("outlier columns must be one-dimensional");
        const auto count = static_cast<int64_t>(columns->shape(0));
        w_.outlier_type = check_floats(*outliers, "outliers", {w_.rows, count});
        w_.outliers = outliers->data();
        held_.push_back(*outliers);
        return count;
    }

    std::vector<int32_t> checked_columns(const std::optional<Array>& columns) const {
        if (!columns) return {};
        if (!is_type(*columns, nb::dlpack::dtype_code::Int, 32)) refuse("outlier columns must be int32");
        check_layout(*columns, "outlier columns", {static_cast<int64_t>(columns->shape(0))});
        const auto* data = static_cast<const int32_t*>(columns->data());
        std::vector<int32_t> copy(data, data + columns->shape(0));
        for (size_t i = 0; i < copy.size(); ++i)
            if (copy[i] < 0 || copy[i] >= w_.columns || (i > 0 && copy[i] <= copy[i - 1]))
                refuse("outlier columns must ascend and lie in 0.." + std::to_string(w_.columns - 1));
        return copy;
    }

    // The shape in which scales are stored.
    std::vector<int64_t> set_blocks(const std::string& kind, int64_t block) {
        const auto count = [](int64_t length, int64_t size) { return length / size + (length % size != 0); };
        if (kind == "in") {
            w_.block = std::min(block, w_.kept);
            w_.blocks = w_.scale_stride = count(w_.kept, w_.block);
            return {w_.rows, w_.blocks};
        }
        if (kind == "out") {
            w_.along_out = true;
            w_.block = std::min(block, w_.rows);
            w_.blocks = count(w_.rows, w_.block);
            return {w_.blocks, w_.kept};
        }
        if (kind == "tensor") {
            w_.block = w_.kept;
            w_.blocks = 1;
            return {1, 1};
        }
        if (kind != "flat") refuse("blocks must be 'in', 'out', 'tensor' or 'flat', got '" + kind + "'");
        w_.block = std::min(block, w_.rows * w_.kept);
        const std::vector<int64_t> stored = {count(w_.rows * w_.kept, w_.block)};
        if (w_.kept % w_.block == 0) {  // no block crosses rows: the scales of a row lie together
            w_.blocks = w_.scale_stride = w_.kept / w_.block;
        } else {
            w_.flat = true;
            w_.blocks = w_.kept / w_.block + 2;  // the most that a row can touch
        }
        return stored;
    }

    int64_t set_table(const Array& table, bool zeros) {
        if (!is_type(table, nb::dlpack::dtype_code::Float, 32)) refuse("table must be float32");
        if (table.ndim() != 2) refuse("table must have shape [1 or rows, levels]");
        w_.table_rows = static_cast<int64_t>(table.shape(0));
        const auto levels = static_cast<int64_t>(table.shape(1));
        if (w_.table_rows != 1 && w_.table_rows != w_.rows) refuse("table must have 1 row or one per row of the weight");
        if (levels < 1 || levels > (int64_t{1} << w_.bits)) refuse("table must have 1 to 2^bits levels, got " + std::to_string(levels));
        if (zeros && w_.table_rows != 1) refuse("zero codes need one table for all rows");
        check_layout(table, "table", {w_.table_rows, levels});
        return levels;
    }

    Weight w_;
    const Isa& isa_;
    std::vector<Array> held_;
};

// y [batch, rows] of several weights that read the same x.
void multiply_together(const std::vector<const PackedWeight*>& weights, const Array& x, const std::vector<Output>& y, bool int8, int threads) {
    if (weights.empty() || weights.size() != y.size()) refuse("weights and results must be as many, and at least one");
    const Matrix from = PackedWeight::matrix(x, "x", weights[0]->weight().columns);
    std::vector<Product> products;
    for (size_t i = 0; i < y.size(); ++i) {
        if (weights[i]->weight().columns != weights[0]->weight().columns) refuse("weights that share x must have as many columns");
        if (y[i].ndim() != 2 || y[i].shape(0) != x.shape(0)) refuse("x and y must have the same number of rows");
        products.push_back({&weights[i]->weight(), PackedWeight::matrix(y[i], "y", weights[i]->weight().rows)});
    }
    const auto batch = static_cast<int64_t>(x.shape(0));
    nb::gil_scoped_release release;
    multiply(products.data(), static_cast<int64_t>(products.size()), weights[0]->set(), from, batch, int8, threads);
}

// A decoder that keeps the arrays and weights it reads alive.
class PyDecoder {
  public:
    using Layer = std::pair<nb::object, std::optional<Array>>;  // a PackedWeight or a float array [rows, columns], and a bias

    PyDecoder(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head, double epsilon, double scale, bool int8,
              const Layer& embedding, const Layer& logits, const Array& gain, const std::string& isa)
        : isa_(isa_named(isa)) {
        constexpr int64_t kMost = 1 << 24;
        d_.hidden = positive(hidden, "hidden", kMost);
        d_.heads = positive(heads, "heads", kMost);
        d_.kv_heads = positive(kv_heads, "kv_heads", heads);
        d_.head = positive(head, "head", 1 << 14);
        if (head % 2 != 0 || heads % kv_heads != 0) refuse("a head must be even, and heads a multiple of kv_heads");
        d_.epsilon = static_cast<float>(epsilon);
        d_.scale = static_cast<float>(scale);
        d_.int8 = int8;
        d_.embedding = projection(embedding, "embedding", -1, hidden);
        d_.logits = projection(logits, "logits", -1, hidden);
        d_.gain = floats(gain, "gain", hidden);
    }

    // Layers: query, key, value, out, gate, up, down; gains: before attention, before the MLP, of queries, of keys.
    void add_block(const std::vector<Layer>& layers, const std::vector<std::optional<Array>>& gains) {
        if (layers.size() != 7 || gains.size() != 4 || !gains[0] || !gains[1]) refuse("a block has seven layers and two to four gains");
        const int64_t width = d_.heads * d_.head, kv_width = d_.kv_heads * d_.head;
        Block b;
        b.query = projection(layers[0], "query", width, d_.hidden);
        b.key = projection(layers[1], "key", kv_width, d_.hidden);
        b.value = projection(layers[2], "value", kv_width, d_.hidden);
        b.out = projection(layers[3], "out", d_.hidden, width);
        b.gate = projection(layers[4], "gate", -1, d_.hidden);
        b.up = projection(layers[5], "up", b.gate.rows, d_.hidden);
        b.down = projection(layers[6], "down", d_.hidden, b.gate.rows);
        b.attention_gain = floats(*gains[0], "gain", d_.hidden);
        b.mlp_gain = floats(*gains[1], "gain", d_.hidden);
        if (gains[2]) b.query_gain = floats(*gains[2], "gain", d_.head);
        if (gains[3]) b.key_gain = floats(*gains[3], "gain", d_.head);
        d_.blocks.push_back(b);
    }

    void advance(const Output& store, int64_t held, const Array& tokens, const Array& pads, const Array& cosines, const Array& sines,
                 const Output& logits, int threads) {
        if (store.ndim() != 6) refuse("the store must have shape [blocks, 2, batch, kv_heads, room, head]");
        const auto batch = static_cast<int64_t>(store.shape(2)), room = static_cast<int64_t>(store.shape(4));
        const Float type = float_type(store, "the store");
        check_layout(store, "the store", {static_cast<int64_t>(d_.blocks.size()), 2, batch, d_.kv_heads, room, d_.head});
        if (held < 0 || held >= room) refuse("the store has no room for a token at " + std::to_string(held));
        check_floats(cosines, "cosines", {room, d_.head});
        check_floats(sines, "sines", {room, d_.head});
        if (float_type(cosines, "cosines") != Float::f32 || float_type(sines, "sines") != Float::f32) refuse("rotations must be float32");
        check_layout(logits, "logits", {batch, d_.logits.rows});
        if (float_type(logits, "logits") != Float::f32) refuse("logits must be float32");
        const int64_t* ids = integers(tokens, "tokens", batch, d_.embedding.rows - 1);
        const int64_t* starts = integers(pads, "pads", batch, held);
        const Store kept{store.data(), type, batch, room, static_cast<const float*>(cosines.data()), static_cast<const float*>(sines.data())};
        nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> one(busy_);
        fracbit::advance(d_, isa_, kept, held, ids, starts, static_cast<float*>(logits.data()), scratch_, threads);
    }

  private:
    const float* floats(const Array& array, const char* name, int64_t count) {
        if (check_floats(array, name, {count}) != Float::f32) refuse(std::string(name) + " must be float32");
        arrays_.push_back(array);
        return static_cast<const float*>(array.data());
    }

    static const int64_t* integers(const Array& array, const char* name, int64_t count, int64_t most) {
        if (!is_type(array, nb::dlpack::dtype_code::Int, 64)) refuse(std::string(name) + " must be int64");
        check_layout(array, name, {count});
        const auto* data = static_cast<const int64_t*>(array.data());
        for (int64_t i = 0; i < count; ++i)
            if (data[i] < 0 || data[i] > most) refuse(std::string(name) + " must lie in 0.." + std::to_string(most));
        return data;
    }

    // Rows of -1: as many as there are.
    Projection projection(const Layer& layer, const char* name, int64_t rows, int64_t columns) {
        Projection p;
        if (nb::isinstance<PackedWeight>(layer.first)) {
            p.packed = &nb::cast<const PackedWeight&>(layer.first).weight();
            p.rows = p.packed->rows;
            p.columns = p.packed->columns;
            held_.push_back(layer.first);
        } else {
            const auto array = nb::cast<Array>(layer.first);
            if (array.ndim() != 2) refuse(std::string(name) + " must be a packed weight or an array [rows, columns]");
            p.rows = static_cast<int64_t>(array.shape(0));
            p.columns = static_cast<int64_t>(array.shape(1));
            p.type = check_floats(array, name, {p.rows, p.columns});
            p.dense = array.data();
            arrays_.push_back(array);
        }
        if ((rows >= 0 && p.rows != rows) || p.columns != columns)
            refuse(std::string(name) + " should have shape " + shape_text({rows < 0 ? p.rows : rows, columns}) + ", got " + shape_text({p.rows, p.columns}));
        if (layer.second) p.bias = floats(*layer.second, name, p.rows);
        return p;
    }

    Decoder d_;
    const Isa& isa_;
    std::vector<nb::object> held_;
    std::vector<Array> arrays_;
    std::mutex busy_;
    Scratch scratch_;
};

void add_gram_checked(const Array& x, const Output& gram, int threads) {
    if (!has_gram()) refuse("this machine, or the compiler that built this module, has no bfloat16 products");
    if (x.ndim() != 2 || !is_type(x, nb::dlpack::dtype_code::Bfloat, 16)) refuse("x must be bfloat16 [tokens, width]");
    if (!is_type(gram, nb::dlpack::dtype_code::Float, 32)) refuse("gram must be float32");
    const auto tokens = static_cast<int64_t>(x.shape(0)), width = static_cast<int64_t>(x.shape(1));
    check_layout(gram, "gram", {width, width});
    if ((width > 1 && tokens > 0 && x.stride(1) != 1) || (tokens > 1 && x.stride(0) < width))
        refuse("x must have contiguous rows that do not overlap");
    nb::gil_scoped_release release;
    add_gram(static_cast<const uint16_t*>(x.data()), tokens > 1 ? x.stride(0) : width, tokens, width,
             static_cast<float*>(gram.data()), threads);
}

// Where a [sequences, heads, tokens, head] array of floats keeps them; a head lies in one piece.
Strides strides_of(const nb::ndarray<nb::device::cpu>& array, const char* name, const std::vector<int64_t>& shape) {
    if (!is_type(array, nb::dlpack::dtype_code::Float, 32)) refuse(std::string(name) + " must be float32");
    if (shape_of(array) != shape)
        refuse(std::string(name) + " should have shape " + shape_text(shape) + ", got " + shape_text(shape_of(array)));
    if (shape[3] > 1 && array.stride(3) != 1) refuse(std::string(name) + " must have contiguous heads");
    return {array.stride(0), array.stride(1), array.stride(2)};
}

void attend_causal_checked(const Output& queries, const Output& keys, const Output& values, const Output& out, float scale,
                           int threads) {
    if (!has_causal()) refuse("this machine, or the compiler that built this module, has no AVX-512");
    if (queries.ndim() != 4 || keys.ndim() != 4) refuse("queries and keys must be [sequences, heads, tokens, head]");
    const auto shape = shape_of(queries);
    const auto shared = static_cast<int64_t>(keys.shape(1));
    if (shared < 1 || shape[1] % shared) refuse("the heads of the queries must be a multiple of those of the keys");
    if (shape[3] < 1 || shape[3] % kHeadStep) refuse("a head must be a multiple of " + std::to_string(kHeadStep));
    const std::vector<int64_t> held{shape[0], shared, shape[2], shape[3]};
    const Causal job{static_cast<const float*>(queries.data()), static_cast<const float*>(keys.data()),
                     static_cast<const float*>(values.data()), static_cast<float*>(out.data()),
                     strides_of(queries, "queries", shape), strides_of(keys, "keys", held), strides_of(values, "values", held),
                     strides_of(out, "out", shape), shape[0], shape[1], shape[1] / shared, shape[2], shape[3], scale};
    nb::gil_scoped_release release;
    attend_causal(job, threads);
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // weights held by modules that live until the interpreter ends are no leak
    m.doc() = "Native CPU kernels of fracbit.";
    m.def("has_gram", &has_gram, "Whether `add_gram` can run here: AVX-512 with bfloat16 products.");
    m.def("add_gram", &add_gram_checked, nb::arg("x"), nb::arg("gram"), nb::arg("threads"),
          "gram [width, width] fp32 += x^T x for x [tokens, width] bfloat16.");
    m.def("has_causal", &has_causal, "Whether `attend_causal` can run here: AVX-512.");
    m.def("attend_causal", &attend_causal_checked, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("out"),
          nb::arg("scale"), nb::arg("threads"), "out = causal attention of [sequences, heads, tokens, head] fp32, whole sequences.");
    m.def("on_threads_of_torch", &on_threads_of_torch, "Whether tasks are shared out among the threads of torch's OpenMP library.");
    m.def("abi", [] { return kAbi; }, "Version of the interface between fracbit's Python and its native kernels.");
    m.def(
        "instruction_sets",
        [] {
            std::vector<std::string> names;
            for (const Isa* isa : instruction_sets()) names.emplace_back(isa->name);
            return names;
        },
        "Instruction sets this process can run, best first.");
    m.def(
        "read",
        [](const Array& bytes, int threads) {
            if (bytes.ndim() != 1) refuse("bytes must be one-dimensional");
            check_bytes(bytes, "bytes", {static_cast<int64_t>(bytes.shape(0))});
            nb::gil_scoped_release release;
            return fracbit::read(isa_named(""), static_cast<const uint8_t*>(bytes.data()), static_cast<int64_t>(bytes.shape(0)), threads);
        },
        nb::arg("bytes"), nb::arg("threads"), "Read bytes and do nothing else: the bandwidth a kernel can at best reach.");
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
        .def_prop_ro("derived_bytes", &PackedWeight::derived_bytes)
        .def_prop_ro("whole_lanes", &PackedWeight::whole_lanes)
        .def_prop_ro("isa", &PackedWeight::isa);
    m.def("multiply_together", &multiply_together, nb::arg("weights"), nb::arg("x"), nb::arg("y"), nb::arg("int8"), nb::arg("threads"),
          "y [batch, rows] of several weights that read the same x [batch, columns]; its rounding is done once.");
    nb::class_<PyDecoder>(m, "Decoder", "Blocks of Llama's shape that are run one token at a time.")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, double, double, bool, const PyDecoder::Layer&, const PyDecoder::Layer&,
                      const Array&, const std::string&>(),
             nb::arg("hidden"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head"), nb::arg("epsilon"), nb::arg("scale"),
             nb::arg("int8"), nb::arg("embedding"), nb::arg("logits"), nb::arg("gain"), nb::arg("isa") = "")
        .def("add_block", &PyDecoder::add_block, nb::arg("layers"), nb::arg("gains"),
             "Layers: query, key, value, out, gate, up, down; gains: before attention, before the MLP, of queries, of keys.")
        .def("advance", &PyDecoder::advance, nb::arg("store"), nb::arg("held"), nb::arg("tokens"), nb::arg("pads"),
             nb::arg("cosines"), nb::arg("sines"), nb::arg("logits"), nb::arg("threads"),
             "Read tokens [batch] after `held` others; fills logits [batch, vocabulary] and the store.");
}
