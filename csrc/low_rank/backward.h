// What the host side and the backward kernels of low_rank share: gradients of y = (x v^T) u^T + bias, by dy [m, n].
#pragma once

#include <cstdint>

#include "host/op_table.h"
#include "low_rank/backward_layout.h"

namespace low_rank {

// Elements are bf16 or fp16, rows 16-byte aligned. What `needs` does not ask for is neither read nor written: no pointer has
// to be there then.
struct BackwardParams {
  const uint16_t* dy;  // [m, n]
  const uint16_t* x;   // [m, k], for dv
  const uint16_t* h;   // [m, r], for du: x v^T, rounded
  const uint16_t* v;   // [r, k], for dx
  const uint16_t* u;   // [n, r], for dx and dv
  uint16_t* dh;        // [m, r], for dx and dv: workspace
  float* partials;     // workspace, as many as the plan says
  uint16_t* dx;        // [m, k]
  void* dv;            // [r, k], like du and db of the dtype, or float and added to what is there (plan.is_added)
  void* du;            // [n, r]
  void* db;            // [n]
  int m, n, k, r;
  int needs;  // BackwardNeeds
};

// Returns null, or what CUDA says is wrong.
const char* launch_backward(const BackwardPlan& plan, const BackwardParams& params, Dtype dtype, int sm_count, void* stream);

// Floats that splits have left, to be added up: sum [count].
struct BackwardSum {
  const float* partials;  // [splits, count]
  void* sum;              // [count] of the dtype, or float
  int64_t count;          // a multiple of 8
  int splits;
  bool is_added;  // to the floats that are there
};

struct BackwardSums {
  BackwardSum list[3];
  int count;
};

// One launch for all of them, also for other ops; of bf16 or fp16. Returns null, or what CUDA says is wrong.
const char* launch_sums(const BackwardSums& sums, Dtype dtype, int sm_count, void* stream);

constexpr int64_t kBackwardRows = 64;   // m from which
constexpr int64_t kBackwardRank = 256;  // and r up to which the kernels are used

// The plan of a call, with tile 0 where the library does it. The kernels have NEVER RUN ON A GPU, and no speed is claimed:
// until somebody has measured, they take the shapes where arithmetic is not all there is (above r = 256 it is, and the
// library's products are hard to beat) and where a tile is not mostly empty.
inline BackwardPlan choose_backward(const Problem& p, int needs, bool is_added = false) {
  const bool has_kernel = (p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16) && p.device == Device::cuda &&
                          p.arch >= 80 && p.arch <= 90 && p.is_aligned;
  if (!has_kernel || p.m < kBackwardRows || p.r > kBackwardRank) return {};
  return plan_backward(p.m, p.n, p.k, p.r, needs, is_added, p.sm_count);
}

template <bool is_added>
Described describe_backward(const Problem& p) {
  const BackwardPlan plan = choose_backward(p, kNeedsDx | kNeedsDv | kNeedsDu | kNeedsDb, is_added);
  if (p.m == 0) return {{"path", "empty"}};
  if (plan.tile == 0) return {{"path", "library"}};
  return {{"path", "kernels"},
          {"tile", plan.tile},
          {"dh_splits", plan.dh_splits},
          {"weight_splits", plan.weight_splits},
          {"partials", plan.partials}};
}

}  // namespace low_rank
