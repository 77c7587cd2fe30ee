// What activations and a residual make of low_rank's truth, and how near to that a kernel has to be.
#pragma once

#include "low_rank/activation.h"
#include "low_rank_truth.h"

namespace low_rank_truth {

using low_rank::Activation;

constexpr Activation kActivations[] = {Activation::none, Activation::relu, Activation::gelu, Activation::gelu_tanh,
                                       Activation::silu};

struct Epilogue {
  Activation activation = Activation::none;
  std::vector<uint16_t> residual;  // [m, n]; empty: none
};

template <class T>
Epilogue epilogue(const Sizes& s, Activation activation, bool has_residual, bool is_whole) {
  std::mt19937_64 random(s.m * 7 + s.n);
  const size_t count = has_residual ? size_t(s.m) * s.n : 0;
  return {activation, is_whole ? whole<T>(random, count, 1) : normal<T>(random, count, 1)};
}

// torch's formulas, in double.
inline double activated(double z, Activation activation) {
  switch (activation) {
    case Activation::relu: return z > 0 ? z : 0;
    case Activation::gelu: return z * std::erfc(-z / std::sqrt(2)) / 2;
    case Activation::gelu_tanh: return z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z))) / 2;
    case Activation::silu: return z / (1 + std::exp(-z));
    case Activation::none: break;
  }
  return z;
}

// No activation is steeper than 1.13. What float makes of one is wrong by some units of z's last place: 1 + erf(z) has no
// more of a large negative z.
template <class T>
void finish(Truth& t, const Epilogue& epilogue) {
  const double roundoff = std::is_same<T, device::Bf16>::value ? 0x1p-8 : 0x1p-11;
  for (size_t i = 0; i < t.y.size(); ++i) {
    const double z = t.y[i];
    const double residual = epilogue.residual.empty() ? 0 : device::widen<T>(epilogue.residual[i]);
    t.y[i] = activated(z, epilogue.activation) + residual;
    t.two_gemms[i] = activated(t.two_gemms[i], epilogue.activation) + residual;
    t.y_bound[i] = 1.13 * t.y_bound[i] + roundoff * std::fabs(t.y[i]) + 0x1p-22 * (std::fabs(z) + std::fabs(residual));
  }
  t.two_gemms = rounded<T>(t.two_gemms);
}

}  // namespace low_rank_truth
