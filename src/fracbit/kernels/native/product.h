// y = x W^T for the layers of a model: their rows are cut into tasks, and each task runs the kernel of an instruction set.
#pragma once

#include <vector>

#include "activations.h"
#include "matrix.h"
#include "weight.h"

namespace fracbit {

// A linear layer: a packed weight, or a float one [rows, columns].
struct Projection {
    const Weight* packed = nullptr;
    const void* dense = nullptr;
    Float type = Float::f32;
    int64_t rows = 0;
    int64_t columns = 0;
    const float* bias = nullptr;  // [rows], or null

    int64_t row_bytes() const { return packed != nullptr ? packed->stride() : columns * size_of(type); }
    const void* row(int64_t index) const {
        return packed != nullptr ? static_cast<const void*>(packed->codes + index * packed->stride()) : number_at(dense, type, index * columns);
    }
};

inline Projection projection_of(const Weight& weight) {
    Projection p;
    p.packed = &weight;
    p.rows = weight.rows;
    p.columns = weight.columns;
    return p;
}

// One of several products that the threads share out as one job. Of a float weight, x and y are fp32.
struct Product {
    const Projection* layer;
    Matrix x;     // [batch, columns]
    Matrix y;     // [batch, rows]
    Curve after;  // what the results go through, once the bias is added
    int64_t batch = 0;  // rows of x and y; 0: as many as all the others
};

// How the rows of a layer are cut into tasks. Along out a task lies inside one group of rows.
struct Tasks {
    int64_t count;
    int64_t rows;       // of a task
    int64_t per_group;  // along out
};

// A product with what its tasks read.
struct ProductCall {
    Product product{};
    const Isa* isa = nullptr;
    Activations x{};
    Results y{};
    Tasks tasks{};
    float* scratch = nullptr;
    int64_t scratch_floats = 0;  // of a worker

    const Weight& weight() const { return *product.layer->packed; }
    bool has_shifts() const { return weight().scales.offsets != nullptr || !weight().scales.zeros.empty(); }
};

constexpr int64_t kBatchRows = 32;  // rows of activations at a time: what is derived from them stays small
constexpr int64_t kJobRows = 8 * kBatchRows;  // of all products of a job that have batches of their own

// Products whose tasks any thread may take. Those of the same x and the same form, one after another, share what is derived from it.
class Products {
  public:
    // Makes ready what the tasks read, in memory of `scratch`; returns how many tasks there are. A product has at most kBatchRows rows,
    // `batch` where it does not say.
    int64_t prepare(const Product* products, size_t count, const Isa& isa, int64_t batch, bool int8, int threads, Scratch& scratch);
    void run(int64_t index, int worker) const;
    // Results of other types than fp32 to where they belong, when all tasks are done.
    void finish() const;

  private:
    std::vector<ProductCall> calls_;
};

// Memory that worker `worker` of `threads` reads first when the layers are multiplied together.
Upcoming first_read(const Projection* const* layers, size_t count, int threads, int worker);

// All products at once, of any number of rows.
void multiply(std::vector<Product> products, const Isa& isa, int64_t batch, bool int8, int threads);

// Products with batches of their own, of any number of rows: as few jobs as their activations allow.
void multiply_each(const std::vector<Product>& products, const Isa& isa, bool int8, int threads);

// Where the share of worker `worker` in `count` tasks begins: neighbours, so that a worker reads one stream of memory.
static inline int64_t share_begin(int64_t count, int threads, int worker) { return count * worker / threads; }

}  // namespace fracbit
