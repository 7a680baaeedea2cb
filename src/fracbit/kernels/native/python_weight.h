// PackedWeight: a packed weight that keeps the arrays alive which it reads.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "python_arrays.h"
#include "weight.h"

namespace fracbit {

class PackedWeight {
  public:
    PackedWeight(int64_t rows, int64_t columns, int bits, const std::string& blocks, int64_t block, Array codes, Array scales,
                 std::optional<Array> offsets, std::optional<Array> zeros, Array table, std::optional<Array> outlier_columns,
                 std::optional<Array> outliers, const std::string& isa);

    void multiply(const Array& x, const Output& y, bool int8, int threads) const;
    void decode(int64_t first, const Output& out, int threads) const;

    int64_t derived_bytes() const { return weight_.derived_bytes(); }
    bool whole_lanes() const { return weight_.blocks.whole_lanes; }
    std::string isa_name() const { return isa_.name; }
    const Weight& weight() const { return weight_; }
    const Isa& isa() const { return isa_; }

  private:
    void take_scales(const Array& scales, const std::optional<Array>& offsets, const Shape& stored);
    void take_zeros(const std::optional<Array>& zeros, const Shape& stored);
    void take_outliers(const std::optional<Array>& outliers, std::vector<int32_t> columns);

    Weight weight_;
    const Isa& isa_;
    std::vector<Array> held_;
};

}  // namespace fracbit
