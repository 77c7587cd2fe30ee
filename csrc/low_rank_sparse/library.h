// What both ways of a call of low_rank_sparse on a GPU share: its arguments, products of the library, and the weight.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "host/cuda_launch.h"
#include "host/gpu.h"
#include "low_rank_sparse/dense.h"
#include "low_rank_sparse/forward.h"
#include "low_rank_sparse/low_rank_sparse_cuda.h"

// Lives in libtorch_cuda.so alone: see host/cuda_stream.h.
#pragma weak aoti_torch_cuda_addmm_out

namespace low_rank_sparse {

// a b with a scale for all sums, rounded once.   a [rows, depth]   b [depth, columns]
inline Tensor scaled_product(const Kind& kind, const Tensor& a, const Tensor& b, double scale) {
  STD_TORCH_CHECK(&aoti_torch_cuda_addmm_out != nullptr, "low_rank_sparse: this torch has no CUDA support");
  const Tensor c = empty(kind, {a.size(0), b.size(1)});
  TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(c.get(), c.get(), a.get(), b.get(), 0, scale));  // c is not read
  return c;
}

// Contiguous, x as rows: the same bits for every layout of the same values, on whichever path.
struct Arguments {
  Tensor x, v, u, values, starts, columns;

  Arguments(const Call& s, const Tensor& x_any, const Tensor& v_any, const Tensor& u_any, const Tensor& values_any,
            const Tensor& starts_any, const Tensor& columns_any)
      : x(torch::stable::view(as_contiguous(x_any), {s.m, s.k})),
        v(as_contiguous(v_any)),
        u(as_contiguous(u_any)),
        values(as_contiguous(values_any)),
        starts(as_contiguous(starts_any)),
        columns(as_contiguous(columns_any)) {}

  bool are_aligned() const {
    return is_aligned(x) && is_aligned(v) && is_aligned(u) && is_aligned(values) && is_aligned(columns);
  }
};

// Where a call launches, and for whom.
struct Launches {
  const char* op;
  const Call& s;
  const Arguments& in;
  double scale;
  Gpu gpu;
  void* stream;

  void done(const char* error) const { check_launch(op, error, gpu.arch); }

  Problem problem() const {
    Problem problem = on_gpu({s.m, s.n, s.k, s.r, s.dtype}, gpu, in.are_aligned());
    problem.entries = s.nnz;
    return problem;
  }

  // The conditions are the kernels' own: their numbers are of 32 bits.
  Support support() const {
    constexpr int64_t kMost = 1 << 30;
    STD_TORCH_CHECK(s.n <= kMost && s.k <= kMost, op, ": the weight is ", s.n, " x ", s.k, ", a GPU takes ", kMost,
                    " of either at most");
    return {static_cast<const int32_t*>(in.starts.const_data_ptr()), in.columns.const_data_ptr(), static_cast<int>(s.n),
            static_cast<int>(s.k), static_cast<int>(s.nnz), !s.is_narrow};
  }

  // scale u v + s, rounded once, by the plan's kernel.   [n, k]
  Tensor weight(const MaterializePlan& plan) const {
    if (plan.tile == 0) return library_weight();
    const Tensor w = empty(s.kind, {s.n, s.k});
    const MaterializeOperands operands{elements(in.v), elements(in.u), elements(in.values), support(),
                                       static_cast<uint16_t*>(w.mutable_data_ptr()), static_cast<int>(s.r),
                                       static_cast<float>(scale)};
    done(launch_materialize(plan, operands, s.dtype, stream));
    return w;
  }

  // Of a dense gradient [n, k].   [nnz]
  Tensor selected(const Tensor& dense) const {
    const Tensor values = empty(s.kind, {s.nnz});
    if (s.nnz > 0) {
      const DenseOperands operands{dense.const_data_ptr(), values.mutable_data_ptr(), support()};
      done(launch_select_entries(operands, static_cast<int>(element_bytes(s.dtype)), gpu.sm_count, stream));
    }
    return values;
  }

 private:
  // The same by the library, whose result is of float at least until S has been added.
  Tensor library_weight() const {
    using torch::headeronly::ScalarType;
    const bool is_half = s.dtype == Dtype::bfloat16 || s.dtype == Dtype::float16;
    const auto wide = [&](const Tensor& t) { return is_half ? torch::stable::to(t, ScalarType::Float) : t; };
    Kind kind = s.kind;
    if (is_half) kind.dtype = aoti_torch_dtype_float32();
    const Tensor w = scaled_product(kind, wide(in.u), wide(in.v), scale), values = wide(in.values);
    if (s.nnz > 0) {
      const DenseOperands operands{values.const_data_ptr(), w.mutable_data_ptr(), support()};
      done(launch_add_entries(operands, is_half ? 4 : static_cast<int>(element_bytes(s.dtype)), gpu.sm_count, stream));
    }
    if (!is_half) return w;
    return torch::stable::to(w, s.dtype == Dtype::bfloat16 ? ScalarType::BFloat16 : ScalarType::Half);
  }
};

}  // namespace low_rank_sparse
