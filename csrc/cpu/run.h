// A whole product by one kernel: x converted once, row tiles shared among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/lines.h"
#include "cpu/product.h"

namespace cpu {

// x as the product's kernel reads it.
class Prepared {
 public:
  Prepared(const Kernel& kernel, const Product& product) : x_(product.x) {
    const int64_t bytes = kernel.prepared_bytes(product.m, product.depth);
    if (bytes == 0) return;
    lines_ = new_lines(bytes);
    kernel.prepare(product, lines_.get());
    x_ = lines_.get();
  }
  const void* x() const { return x_; }

 private:
  const void* x_;
  Lines lines_;
};

// grain: row tiles per task; 0: one thread does all.
inline void multiply(const Kernel& kernel, Product product, int64_t grain) {
  const Prepared prepared(kernel, product);
  product.x = prepared.x();
  const int64_t tiles = (product.rows + kernel.row_tile - 1) / kernel.row_tile;
  if (grain == 0) return kernel.multiply(product, 0, tiles);
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t first, int64_t last) { kernel.multiply(product, first, last); });
}

}  // namespace cpu
