// low_rank itself, as its host files share it: tensors in, tensors out, by the path that choose_config names.
#pragma once

#include <optional>
#include <string>

#include "host/tensor.h"
#include "low_rank/activation.h"
#include "low_rank/low_rank.h"

namespace low_rank {

// Whose arguments these are: errors name the op, the member of a group, and u as it is called there.
struct Who {
  const char* op = "low_rank";
  int64_t member = -1;
  const char* u = "u";

  std::string of(const char* argument) const {
    return member < 0 ? argument : argument + ("[" + std::to_string(member) + "]");
  }
};

struct Sizes {
  int64_t m, n, k, r;
  Kind kind;  // of every tensor
  Dtype dtype;
};

// The conditions that the Python function checks with a named error, for callers of torch.ops.
Sizes check(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias);

// Whether t is [..., last] with the leading sizes of x.
bool has_rows_of(const Tensor& t, const Tensor& x, int64_t last);

// What is done to the sum, in this order.
struct Epilogue {
  Activation activation = Activation::none;
  std::optional<Tensor> residual;  // [..., n]

  bool is_none() const { return activation == Activation::none && !residual; }
};

Sizes check(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
            const Epilogue& epilogue);
Activation activation_of(const std::string& name);

// The epilogue where no kernel does it: by torch's ops, each of which rounds. Writes to y.
Tensor finished(Tensor y, const Epilogue& epilogue);

// Contiguous: the same bits for every layout of the same values, on whichever path.
struct Operands {
  Tensor x, v, u;
  std::optional<Tensor> bias;

  Operands(const Tensor& x_any, const Tensor& v_any, const Tensor& u_any, const std::optional<Tensor>& bias_any)
      : x(as_contiguous(x_any)), v(as_contiguous(v_any)), u(as_contiguous(u_any)) {
    if (bias_any) bias = as_contiguous(*bias_any);
  }
};

struct Result {
  Tensor y;                 // [..., n]
  std::optional<Tensor> h;  // [..., r], where it was asked for
};

// Two products of torch's.
Result library(const Operands& in);

Result forward_cpu(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
                   bool keep_h, const Epilogue& epilogue = {});
#ifdef LOWFAT_CUDA
Result forward_cuda(const Who& who, const Tensor& x, const Tensor& v, const Tensor& u, const std::optional<Tensor>& bias,
                    bool keep_h, const Epilogue& epilogue = {});
#endif

}  // namespace low_rank
