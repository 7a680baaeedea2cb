// Program: the operations of a decode step, checked as they are added, with the arrays and weights kept alive which they read.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "operations.h"
#include "python.h"
#include "python_weight.h"

namespace fracbit {
namespace {

constexpr int64_t kMostWidth = 1 << 24;  // products of two widths fit into 64 bits with room to spare
constexpr int64_t kMostTables = 1024;    // rotations or biases of a step

const std::map<std::string, Function> kFunctions{
    {"identity", Function::identity}, {"silu", Function::silu}, {"gelu", Function::gelu}, {"gelu_tanh", Function::gelu_tanh},
    {"quick_gelu", Function::quick_gelu}, {"relu", Function::relu}, {"relu_squared", Function::relu_squared},
    {"sigmoid", Function::sigmoid}, {"cap", Function::cap}, {"clamped", Function::clamped}};

class PyProgram {
  public:
    using Layer = std::pair<nb::object, std::optional<Array>>;  // a PackedWeight or a float array [rows, columns], and a bias
    using At = std::pair<int64_t, int64_t>;                     // register, offset
    using HeadsAt = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;  // the fields of HeadPlaces in order
    using Named = std::tuple<std::string, double, double>;      // a curve by its name, a, b

    PyProgram(int64_t vocabulary, bool int8, const std::string& isa) : program_(isa_named(isa), int8, in_range(vocabulary, "vocabulary", kMostWidth)) {}

    int64_t add_register(int64_t width) { return program_.add_register(in_range(width, "width", kMostWidth)); }

    void embed(const Layer& table, const At& to, double factor) {
        LookUp op;
        op.table = layer(table, "embedding");
        op.to = place(to, op.table.columns);
        op.factor = static_cast<float>(factor);
        op.positions = false;
        op.offset = 0;
        words_ = words_ < 0 ? op.table.rows : std::min(words_, op.table.rows);
        add(std::move(op));
    }

    void positions(const Layer& table, const At& to, int64_t offset) {
        LookUp op;
        op.table = layer(table, "positions");
        op.to = place(to, op.table.columns);
        op.factor = 1;
        op.positions = true;
        op.offset = offset < 0 || offset > op.table.rows ? refuse_offset() : offset;
        const int64_t most = op.table.rows - offset;
        most_positions_ = most_positions_ < 0 ? most : std::min(most_positions_, most);
        add(std::move(op));
    }

    void norm(const HeadsAt& from, const HeadsAt& to, const std::optional<Array>& gain, const std::optional<Array>& bias, double epsilon, bool centered) {
        Norm op;
        op.from = heads(from);
        op.to = heads(to);
        if (op.from.count != op.to.count || op.from.size != op.to.size) refuse("a norm reads and writes as many heads of one size");
        op.gain = gain ? floats(*gain, "gain", op.from.size) : nullptr;
        op.bias = bias ? floats(*bias, "bias", op.from.size) : nullptr;
        op.epsilon = static_cast<float>(epsilon);
        op.centered = centered;
        add(std::move(op));
    }

    void linear(const std::vector<Layer>& layers, const At& from, const std::vector<At>& to, const Named& after) {
        if (layers.empty() || layers.size() != to.size()) refuse("layers and where their results go must be as many, and at least one");
        Linear op;
        for (size_t i = 0; i < layers.size(); ++i) {
            op.layers.push_back(layer(layers[i], "layer"));
            op.to.push_back(place(to[i], op.layers[i].rows));
            if (op.layers[i].columns != op.layers[0].columns) refuse("layers that read the same numbers must have as many columns");
        }
        op.from = place(from, op.layers[0].columns);
        op.after = curve(after);
        add(std::move(op));
    }

    void spread(const At& from, const At& to, const std::vector<Array>& factors) {
        Spread op;
        op.width = 1;
        for (const Array& factor : factors) {
            if (!has_dimensions(factor, 2)) refuse("factors must be matrices");
            const int64_t size = in_range(size_at(factor, 0), "factor", kMostWidth);
            arrays_.push_back(factor);
            op.factors.push_back({checked_floats(factor, "factor", {size, size}), size});
            op.width = in_range(op.width * size, "width", kMostWidth);
        }
        op.from = place(from, op.width);
        op.to = place(to, op.width);
        add(std::move(op));
    }

    void round(const At& from, const At& to, int64_t width, int64_t group, const Array& values, const Array& boundaries, double step, double end,
               double scale) {
        Round op;
        op.width = in_range(width, "width", kMostWidth);
        op.group = in_range(group, "group", kMostWidth);
        op.from = place(from, width);
        op.to = place(to, width);
        op.levels = has_dimensions(values, 1) ? in_range(size_at(values, 0), "levels", kMostWidth) : 1;
        op.values = floats(values, "values", op.levels);
        op.boundaries = floats(boundaries, "boundaries", op.levels - 1);
        if (!(step >= 0) || !(end > 0) || !(scale >= 0)) refuse("steps and scales are not negative, and a table ends beyond 0");
        op.step = static_cast<float>(step);
        op.end = static_cast<float>(end);
        op.scale = static_cast<float>(scale);
        add(std::move(op));
    }

    void rotate(const HeadsAt& all, int64_t rotation, int64_t count) {
        Rotate op;
        op.heads = heads(all);
        op.rotation = table_at(rotation, 0, "rotation");
        if (count < 2 || count % 2 || count > op.heads.size) refuse("a rotation turns an even number of numbers of a head");
        if (rotations_.size() <= static_cast<size_t>(rotation)) rotations_.resize(static_cast<size_t>(rotation) + 1);
        rotations_[static_cast<size_t>(rotation)] = count;
        add(std::move(op));
    }

    void attend(const HeadsAt& queries, const HeadsAt& keys, const HeadsAt& values, const At& to, double scale, double cap, int64_t window,
                int64_t biases, const std::optional<Array>& sinks) {
        Attend op;
        op.queries = heads(queries);
        op.keys = heads(keys);
        op.values = heads(values);
        if (op.keys.count != op.values.count || op.queries.count % op.keys.count) refuse("query heads must be a multiple of key heads, and these as many as value heads");
        if (op.keys.size != op.queries.size || op.values.size != op.queries.size) refuse("heads of queries, keys and values must have one size");
        if (attentions_ > 0 && (kv_heads_ != op.keys.count || head_ != op.keys.size)) refuse("all attentions of a step must have key heads of one number and size");
        kv_heads_ = op.keys.count;
        head_ = op.keys.size;
        op.to = place(to, op.queries.count * head_);
        op.index = attentions_++;
        op.scale = static_cast<float>(scale);
        op.cap = static_cast<float>(cap);
        op.window = window < 0 ? 0 : window;
        op.biases = table_at(biases, -1, "biases");
        if (biases >= 0) {
            if (biases_.size() <= static_cast<size_t>(biases)) biases_.resize(static_cast<size_t>(biases) + 1);
            biases_[static_cast<size_t>(biases)] = op.queries.count;
        }
        op.sinks = sinks ? floats(*sinks, "sinks", op.queries.count) : nullptr;
        add(std::move(op));
    }

    void activate(const At& at, int64_t width, const Named& how) {
        Activate op;
        op.place = place(at, in_range(width, "width", kMostWidth));
        op.up = {-1, 0};
        op.width = width;
        op.curve = curve(how);
        add(std::move(op));
    }

    void gate(const At& at, const At& up, int64_t width, const Named& how) {
        Activate op;
        op.place = place(at, in_range(width, "width", kMostWidth));
        op.up = place(up, width);
        op.width = width;
        op.curve = curve(how);
        add(std::move(op));
    }

    void add_to(const At& from, const At& to, int64_t width, double keep, double factor) {
        Add op;
        op.from = place(from, in_range(width, "width", kMostWidth));
        op.to = place(to, width);
        op.width = width;
        op.keep = static_cast<float>(keep);
        op.factor = static_cast<float>(factor);
        add(std::move(op));
    }

    void scale_by(const At& by, const At& to, int64_t width) {
        Scale op;
        op.by = place(by, 1);
        op.to = place(to, in_range(width, "width", kMostWidth));
        op.width = width;
        add(std::move(op));
    }

    void route(const At& logits, int64_t experts, int64_t top, bool among) {
        Route op;
        op.experts = in_range(experts, "experts", kMostWidth);
        op.top = in_range(top, "top", experts);
        op.logits = place(logits, experts);
        op.among = among;
        experts_ = experts;
        top_ = top;
        add(std::move(op));
    }

    // Layers [which][expert].
    void experts(const std::vector<std::vector<Layer>>& layers, const At& from, const std::vector<At>& to, bool apart) {
        if (experts_ == 0) refuse("experts come after they were chosen");
        if (layers.empty() || layers.size() != to.size()) refuse("layers and where their results go must be as many, and at least one");
        Experts op;
        op.top = top_;
        op.apart = apart;
        int64_t columns = -1;
        for (size_t which = 0; which < layers.size(); ++which) {
            if (static_cast<int64_t>(layers[which].size()) != experts_) refuse("there must be a layer of every expert that can be chosen");
            op.layers.emplace_back();
            for (const Layer& one : layers[which]) {
                op.layers[which].push_back(layer(one, "expert"));
                const Projection &last = op.layers[which].back(), &first = op.layers[which].front();
                columns = columns < 0 ? last.columns : columns;
                if (last.columns != columns || last.rows != first.rows) refuse("experts must have layers of one shape");
            }
            op.to.push_back(place(to[which], op.top * op.layers[which].front().rows));
        }
        op.from = place(from, apart ? op.top * columns : columns);
        add(std::move(op));
    }

    void mix(const At& from, const At& to, int64_t width) {
        if (experts_ == 0) refuse("experts are mixed after they were chosen");
        Mix op;
        op.top = top_;
        op.width = in_range(width, "width", kMostWidth);
        op.from = place(from, top_ * width);
        op.to = place(to, width);
        add(std::move(op));
    }

    // `older`: codes, lows and steps of keys, then of values; or nothing.
    void advance(const Output& store, int64_t held, const std::vector<Array>& older, int bits, const Array& tokens, const Array& pads, const std::vector<std::pair<Array, Array>>& rotations,
                 const std::vector<Array>& biases, const Output& logits, int threads) {
        if (!has_dimensions(store, 6)) refuse("the store must have shape [attentions, 2, batch, kv_heads, room, head]");
        Store s{};
        s.batch = size_at(store, 2);
        s.room = size_at(store, 4);
        s.kv_heads = kv_heads_;
        s.head = head_;
        s.type = check_floats(store, "the store", {attentions_, 2, s.batch, kv_heads_, s.room, head_});
        s.data = store.data();
        if (held < 0 || held >= s.room) refuse("the store has no room for a token at " + std::to_string(held));
        s.held = held;
        if (!older.empty()) take_older(older, bits, s);
        const int64_t seen = s.seen();
        if (most_positions_ >= 0 && seen >= most_positions_) refuse("the model has no position " + std::to_string(seen) + ", only " + std::to_string(most_positions_));
        if (words_ < 0) refuse("nothing was embedded");
        s.tokens = integers(tokens, "tokens", s.batch, words_ - 1);
        s.pads = integers(pads, "pads", s.batch, seen);
        if (rotations.size() != rotations_.size() || biases.size() != biases_.size()) refuse("there must be as many rotations and biases as the operations name");
        s.positions = seen + 1;
        if (!rotations.empty() && has_dimensions(rotations[0].first, 2)) s.positions = size_at(rotations[0].first, 0);
        if (rotations.empty() && !biases.empty() && has_dimensions(biases[0], 2)) s.positions = size_at(biases[0], 1);
        if (s.positions <= seen) refuse("the tables end at position " + std::to_string(s.positions) + ", and the token is at " + std::to_string(seen));
        std::vector<Rotation> turns;
        for (size_t i = 0; i < rotations.size(); ++i) {
            const Shape shape{s.positions, rotations_[i]};
            turns.push_back({checked_floats(rotations[i].first, "cosines", shape), checked_floats(rotations[i].second, "sines", shape), rotations_[i]});
        }
        std::vector<const float*> added;
        for (size_t i = 0; i < biases.size(); ++i) added.push_back(checked_floats(biases[i], "biases", {biases_[i], s.positions}));
        s.rotations = turns.data();
        s.biases = added.data();
        s.logits = checked_floats(logits, "logits", {s.batch, program_.width(0)});
        nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> one(busy_);
        program_.advance(s, threads);
    }

  private:
    void take_older(const std::vector<Array>& older, int bits, Store& s) const {
        if (older.size() != 6 || !has_dimensions(older[0], 6)) refuse("older tokens are codes, lows and steps of keys, then of values");
        if (bits != 8 && (bits != 4 || head_ % 2 != 0)) refuse("codes of older tokens have 8 bits, or 4 where heads are even");
        s.groups = size_at(older[0], 3);
        s.group = size_at(older[0], 4);
        s.bits = bits;
        for (size_t which = 0; which < 2; ++which) {
            const Array *codes = &older[3 * which], *low = codes + 1, *step = codes + 2;
            if (!is_type(*codes, nb::dlpack::dtype_code::UInt, 8)) refuse("codes must be uint8");
            check_layout(*codes, "codes", {attentions_, s.batch, kv_heads_, s.groups, s.group, code_bytes(head_, bits)});
            const Shape ranges{attentions_, s.batch, kv_heads_, s.groups, which == 0 ? 1 : s.group, which == 0 ? head_ : 1};
            s.older[which] = {static_cast<const uint8_t*>(codes->data()), low->data(), step->data(), check_floats(*low, "lows", ranges)};
            if (check_floats(*step, "steps", ranges) != s.older[which].type) refuse("lows and steps must be of one type");
        }
    }

    template <class Op>
    void add(Op op) {
        program_.add(std::make_unique<const Op>(std::move(op)));
    }

    static int64_t table_at(int64_t index, int64_t least, const char* name) {
        if (index < least || index >= kMostTables) refuse(std::string(name) + " must be in " + std::to_string(least) + ".." + std::to_string(kMostTables - 1));
        return index;
    }

    [[noreturn]] static int64_t refuse_offset() { refuse("positions begin inside their table"); }

    Place place(const At& at, int64_t width) const {
        const auto [reg, offset] = at;
        if (reg < 0 || reg >= program_.registers()) refuse("there is no register " + std::to_string(reg));
        if (offset < 0 || width < 0 || offset > program_.width(reg) - width)
            refuse("register " + std::to_string(reg) + " of width " + std::to_string(program_.width(reg)) + " has no " + std::to_string(width) + " numbers at " + std::to_string(offset));
        return {reg, offset};
    }

    HeadPlaces heads(const HeadsAt& at) const {
        const auto [reg, offset, count, size, per_group, step, group_stride] = at;
        in_range(count, "heads", kMostWidth);
        in_range(size, "head", kMostWidth);
        in_range(per_group, "heads of a group", kMostWidth);
        if (step < 0 || group_stride < 0 || step > kMostWidth || group_stride > kMostWidth) refuse("heads lie one after another");
        const int64_t last = (count - 1) / per_group * group_stride + std::min(per_group, count) * step - step;
        return {place({reg, offset}, std::max(last, (count - 1) / per_group * group_stride) + size), count, size, per_group, step, group_stride};
    }

    static Curve curve(const Named& how) {
        const auto found = kFunctions.find(std::get<0>(how));
        if (found == kFunctions.end()) refuse("no function is called " + std::get<0>(how));
        return {found->second, static_cast<float>(std::get<1>(how)), static_cast<float>(std::get<2>(how))};
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

    Projection layer(const Layer& given, const char* name) {
        Projection p;
        if (nb::isinstance<PackedWeight>(given.first)) {
            held_.push_back(given.first);
            p = projection_of(nb::cast<const PackedWeight&>(given.first).weight());
        } else {
            const auto array = nb::cast<Array>(given.first);
            if (!has_dimensions(array, 2)) refuse(std::string(name) + " must be a packed weight or an array [rows, columns]");
            arrays_.push_back(array);
            p.rows = size_at(array, 0);
            p.columns = size_at(array, 1);
            p.type = check_floats(array, name, {p.rows, p.columns});
            p.dense = array.data();
        }
        if (given.second) p.bias = floats(*given.second, name, p.rows);
        return p;
    }

    Program program_;
    std::vector<nb::object> held_;
    std::vector<Array> arrays_;
    std::vector<int64_t> rotations_;  // how many numbers each turns
    std::vector<int64_t> biases_;     // heads of each
    int64_t attentions_ = 0, kv_heads_ = 0, head_ = 0;
    int64_t words_ = -1, most_positions_ = -1;
    int64_t experts_ = 0, top_ = 0;
    std::mutex busy_;
};

}  // namespace

void bind_step(nb::module_& m) {
    nb::class_<PyProgram>(m, "Program", "The operations of a decode step, run one token at a time. Register 0 takes the logits.")
        .def(nb::init<int64_t, bool, const std::string&>(), nb::arg("vocabulary"), nb::arg("int8"), nb::arg("isa") = "")
        .def("register", &PyProgram::add_register, nb::arg("width"))
        .def("embed", &PyProgram::embed, nb::arg("table"), nb::arg("to"), nb::arg("factor"))
        .def("positions", &PyProgram::positions, nb::arg("table"), nb::arg("to"), nb::arg("offset"))
        .def("norm", &PyProgram::norm, nb::arg("source"), nb::arg("to"), nb::arg("gain").none(), nb::arg("bias").none(), nb::arg("epsilon"), nb::arg("centered"))
        .def("linear", &PyProgram::linear, nb::arg("layers"), nb::arg("source"), nb::arg("to"), nb::arg("after"))
        .def("spread", &PyProgram::spread, nb::arg("source"), nb::arg("to"), nb::arg("factors"))
        .def("round", &PyProgram::round, nb::arg("source"), nb::arg("to"), nb::arg("width"), nb::arg("group"), nb::arg("values"), nb::arg("boundaries"),
             nb::arg("step"), nb::arg("end"), nb::arg("scale"))
        .def("rotate", &PyProgram::rotate, nb::arg("heads"), nb::arg("rotation"), nb::arg("count"))
        .def("attend", &PyProgram::attend, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("to"), nb::arg("scale"), nb::arg("cap"),
             nb::arg("window"), nb::arg("biases"), nb::arg("sinks").none())
        .def("activate", &PyProgram::activate, nb::arg("at"), nb::arg("width"), nb::arg("curve"))
        .def("gate", &PyProgram::gate, nb::arg("at"), nb::arg("up"), nb::arg("width"), nb::arg("curve"))
        .def("add", &PyProgram::add_to, nb::arg("source"), nb::arg("to"), nb::arg("width"), nb::arg("keep"), nb::arg("factor"))
        .def("scale_by", &PyProgram::scale_by, nb::arg("by"), nb::arg("to"), nb::arg("width"))
        .def("route", &PyProgram::route, nb::arg("logits"), nb::arg("experts"), nb::arg("top"), nb::arg("among"))
        .def("experts", &PyProgram::experts, nb::arg("layers"), nb::arg("source"), nb::arg("to"), nb::arg("apart"))
        .def("mix", &PyProgram::mix, nb::arg("source"), nb::arg("to"), nb::arg("width"))
        .def("advance", &PyProgram::advance, nb::arg("store"), nb::arg("held"), nb::arg("older"), nb::arg("bits"), nb::arg("tokens"), nb::arg("pads"), nb::arg("rotations"),
             nb::arg("biases"), nb::arg("logits"), nb::arg("threads"),
             "Read tokens [batch] after `held` others; fills logits [batch, vocabulary] and the store.");
}

}  // namespace fracbit
