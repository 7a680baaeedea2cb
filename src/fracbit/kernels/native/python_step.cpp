// Decoder: a decoder that keeps the arrays and weights alive which it reads.
#include <nanobind/stl/pair.h>

#include <mutex>
#include <utility>

#include "python.h"
#include "python_weight.h"
#include "step.h"

namespace fracbit {
namespace {

constexpr int64_t kMostWidth = 1 << 24;  // products of two widths fit into 64 bits with room to spare
constexpr int64_t kMostHead = 1 << 14;
constexpr int64_t kAnyRows = -1;

class PyDecoder {
  public:
    using Layer = std::pair<nb::object, std::optional<Array>>;  // a PackedWeight or a float array [rows, columns], and a bias

    PyDecoder(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t head, double epsilon, double scale, bool int8,
              const Layer& embedding, const Layer& logits, const Array& gain, const std::string& isa)
        : isa_(isa_named(isa)) {
        d_.hidden = in_range(hidden, "hidden", kMostWidth);
        d_.heads = in_range(heads, "heads", kMostWidth);
        d_.kv_heads = in_range(kv_heads, "kv_heads", heads);
        d_.head = in_range(head, "head", kMostHead);
        if (head % 2 != 0 || heads % kv_heads != 0) refuse("a head must be even, and heads a multiple of kv_heads");
        d_.epsilon = static_cast<float>(epsilon);
        d_.scale = static_cast<float>(scale);
        d_.int8 = int8;
        d_.embedding = projection(embedding, "embedding", kAnyRows, hidden);
        d_.logits = projection(logits, "logits", kAnyRows, hidden);
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
        b.gate = projection(layers[4], "gate", kAnyRows, d_.hidden);
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
        const Store kept = checked_store(store, held, cosines, sines);
        float* out = checked_floats(logits, "logits", {kept.batch, d_.logits.rows});
        const int64_t* ids = integers(tokens, "tokens", kept.batch, d_.embedding.rows - 1);
        const int64_t* starts = integers(pads, "pads", kept.batch, held);
        nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> one(busy_);
        fracbit::advance(d_, isa_, kept, held, ids, starts, out, scratch_, threads);
    }

  private:
    Store checked_store(const Output& store, int64_t held, const Array& cosines, const Array& sines) const {
        if (store.ndim() != 6) refuse("the store must have shape [blocks, 2, batch, kv_heads, room, head]");
        const int64_t batch = size_at(store, 2), room = size_at(store, 4);
        const Float type = check_floats(store, "the store", {static_cast<int64_t>(d_.blocks.size()), 2, batch, d_.kv_heads, room, d_.head});
        if (held < 0 || held >= room) refuse("the store has no room for a token at " + std::to_string(held));
        const Shape turns{room, d_.head};
        return {store.data(), type, batch, room, checked_floats(cosines, "cosines", turns), checked_floats(sines, "sines", turns)};
    }

    const float* floats(const Array& array, const char* name, int64_t count) {
        arrays_.push_back(array);
        return checked_floats(array, name, {count});
    }

    static const int64_t* integers(const Array& array, const char* name, int64_t count, int64_t most) {
        if (!is_type(array, nb::dlpack::dtype_code::Int, 64)) refuse(std::string(name) + " must be int64");
        check_layout(array, name, {count});
        const auto* data = static_cast<const int64_t*>(array.data());
        for (int64_t i = 0; i < count; ++i)
            if (data[i] < 0 || data[i] > most) refuse(std::string(name) + " must lie in 0.." + std::to_string(most));
        return data;
    }

    Projection projection(const Layer& layer, const char* name, int64_t rows, int64_t columns) {
        Projection p = nb::isinstance<PackedWeight>(layer.first) ? packed(layer.first) : dense(nb::cast<Array>(layer.first), name);
        if ((rows != kAnyRows && p.rows != rows) || p.columns != columns)
            refuse(std::string(name) + " should have shape " + shape_text({rows == kAnyRows ? p.rows : rows, columns}) + ", got " +
                   shape_text({p.rows, p.columns}));
        if (layer.second) p.bias = floats(*layer.second, name, p.rows);
        return p;
    }

    Projection packed(const nb::object& weight) {
        held_.push_back(weight);
        Projection p;
        p.packed = &nb::cast<const PackedWeight&>(weight).weight();
        p.rows = p.packed->rows;
        p.columns = p.packed->columns;
        return p;
    }

    Projection dense(const Array& array, const char* name) {
        if (array.ndim() != 2) refuse(std::string(name) + " must be a packed weight or an array [rows, columns]");
        arrays_.push_back(array);
        Projection p;
        p.rows = size_at(array, 0);
        p.columns = size_at(array, 1);
        p.type = check_floats(array, name, {p.rows, p.columns});
        p.dense = array.data();
        return p;
    }

    Decoder d_;
    const Isa& isa_;
    std::vector<nb::object> held_;
    std::vector<Array> arrays_;
    std::mutex busy_;
    Scratch scratch_;
};

}  // namespace

void bind_step(nb::module_& m) {
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

}  // namespace fracbit
