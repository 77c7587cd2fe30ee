// Host side of dictionary on a GPU: plan, launches, registration. (The conditions: dictionary.cpp.)
//   x [..., k]   d [P, Q, a, p]   values [n, Q s]   support   bias [n]   h [P, m, Q a]   y [..., n]
#include "dictionary/dictionary_cuda.h"

#ifdef LOWFAT_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "dictionary/library.h"
#include "host/call_counter.h"
#include "host/cuda_stream.h"

// Lives in libtorch_cuda.so alone: see host/cuda_stream.h.
#pragma weak aoti_torch_cuda_baddbmm_out

namespace dictionary {
namespace {

CallCounter decode_calls("dictionary", "cuda", "decode"), library_calls("dictionary", "cuda", "library");

// Contiguous, x as rows: the same bits for every layout of the same values, on whichever path.
struct Arguments {
  Tensor x, d, values, support;
  std::optional<Tensor> bias;

  Arguments(const Call& s, const Tensor& x_any, const Tensor& d_any, const Tensor& values_any, const Tensor& support_any,
            const std::optional<Tensor>& bias_any)
      : x(torch::stable::view(as_contiguous(x_any), {s.m, s.k})),
        d(as_contiguous(d_any)),
        values(as_contiguous(values_any)),
        support(as_contiguous(support_any)) {
    if (bias_any) bias = as_contiguous(*bias_any);
  }
};

struct Result {
  Tensor y, h;  // [..., n]; [P, m, Q a], empty where it was not asked for
};

// False where no counters are left, and then has done nothing.
bool decode(const Launches& on, const Arguments& in, const Tensor& mask, const ForwardPlan& plan, const Result& result,
            bool keep_h) {
  const Call& s = on.s;
  uint64_t* counter = barrier_counter(on.op, s.kind.device_index, on.stream, plan.grid, on.gpu.arch);
  if (!counter) return false;
  decode_calls.count();
  const Tensor partials = floats(s.kind, plan.splits * s.m * s.a);
  const auto to = [](const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); };
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  const ForwardParams p{elements(in.x), elements(in.d), elements(in.values), words_of(mask),
                        in.bias ? elements(*in.bias) : nullptr, keep_h ? to(result.h) : nullptr, to(result.y),
                        size(s.m), size(s.n), size(s.k), size(s.a), size(s.s), float_data(partials), counter, 0, 0, 0};
  on.done(launch_forward(plan, p, s.dtype, on.stream));
  return true;
}

// What the reference does: by torch's own products, of the dense coefficients.
Result library(const Launches& on, const Arguments& in, const Tensor& mask) {
  library_calls.count();
  const Call& s = on.s;
  const sparse24::SparseFactor coefficients = on.coefficients(mask);
  Tensor h = middle_of(s, split_inputs(s, in.x), in.d);
  const Tensor rows = coefficients.expanded(in.values);
  const int64_t more[] = {0, 0, 0, s.b_out * s.rows() - s.n};  // up to whole blocks
  const Tensor all = more[3] == 0 ? rows : torch::stable::pad(rows, more);
  const Tensor codes = torch::stable::transpose(shaped(all, {s.b_out, s.rows(), s.middle()}), 1, 2);
  Tensor blocks = empty(s.kind, {s.b_out, s.m, s.rows()});
  if (in.bias) {  // added before the only rounding
    STD_TORCH_CHECK(&aoti_torch_cuda_baddbmm_out != nullptr, "dictionary: this torch has no CUDA support");
    const Tensor added = split_outputs(s, shaped(*in.bias, {1, s.n}));
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_baddbmm_out(blocks.get(), added.get(), h.get(), codes.get(), 1, 1));
  } else {
    blocks = torch::stable::matmul(h, codes);
  }
  Tensor y = shaped(torch::stable::transpose(blocks, 0, 1), {s.m, s.b_out * s.rows()});
  return {as_contiguous(torch::stable::narrow(y, 1, 0, s.n)), std::move(h)};
}

Result forward_cuda(const Tensor& x, const Tensor& d, const Tensor& values, const Tensor& support,
                    const std::optional<Tensor>& bias, bool keep_h) {
  const Call s = check(x, d, values, support, bias);
  const int device = s.kind.device_index;
  const torch::stable::accelerator::DeviceGuard guard(device);
  Result result{empty_rows(x, s.kind, s.n), empty(s.kind, {keep_h ? s.b_out : 0, s.m, s.middle()})};
  if (s.m == 0) return result;
  const Arguments in(s, x, d, values, support, bias);
  const Launches on{"dictionary", s, gpu_of(device), current_cuda_stream(device)};
  const Tensor mask = on.bitmap(in.support);
  const bool aligned = is_aligned(in.x) && is_aligned(in.d) && is_aligned(in.values) && is_aligned(mask);
  Problem problem = on_gpu({s.m, s.n, s.k, s.a, s.dtype}, on.gpu, aligned);
  problem.b_out = s.b_out, problem.b_in = s.b_in, problem.kept = s.s;
  const ForwardPlan plan = choose_forward(problem);
  if (plan.token_tiles > 0 && decode(on, in, mask, plan, result, keep_h)) return result;
  auto [y, h] = library(on, in, mask);
  return {shaped_like(y, x), std::move(h)};
}

Tensor dictionary_cuda(const Tensor& x, const Tensor& d, const Tensor& values, const Tensor& support,
                       const std::optional<Tensor>& bias) {
  return forward_cuda(x, d, values, support, bias, false).y;
}

std::tuple<Tensor, Tensor> dictionary_training_cuda(const Tensor& x, const Tensor& d, const Tensor& values,
                                                    const Tensor& support, const std::optional<Tensor>& bias) {
  Result result = forward_cuda(x, d, values, support, bias, true);
  return {std::move(result.y), std::move(result.h)};
}

}  // namespace
}  // namespace dictionary

STABLE_TORCH_LIBRARY_IMPL(lowfat, CUDA, m) {
  m.impl("dictionary", TORCH_BOX(&dictionary::dictionary_cuda));
  m.impl("dictionary_training", TORCH_BOX(&dictionary::dictionary_training_cuda));
}
#endif
