// What the forward kernels of low_rank do to a sum on its way to y, all in float: bias, activation, residual, in this order.
#pragma once

#include <cmath>
#include <type_traits>

#include "device/simt.h"
#include "low_rank/activation.h"

namespace low_rank {

LOWFAT_DEVICE float silu(float z) { return z / (1 + expf(-z)); }

LOWFAT_DEVICE float activated(float z, Activation activation) {
  constexpr float kRootHalf = 0.70710678118654752f, kRootTwoOverPi = 0.79788456080286536f;
  switch (activation) {
    case Activation::relu: return z < 0 ? 0 : z;  // NaN stays NaN, as torch has it
    case Activation::gelu: return 0.5f * z * (1 + erff(z * kRootHalf));
    case Activation::gelu_tanh: return 0.5f * z * (1 + tanhf(kRootTwoOverPi * (z + 0.044715f * z * z * z)));
    case Activation::silu: return silu(z);
    case Activation::none: break;
  }
  return z;
}

LOWFAT_DEVICE float finished(float sum, float bias, Activation activation = Activation::none, float residual = 0) {
  return activated(sum + bias, activation) + residual;
}

// run(the activation as a constant): one choice for a whole tile, not one for each of its elements.
template <class Run>
LOWFAT_DEVICE void with_activation(Activation activation, const Run& run) {
  switch (activation) {
    case Activation::none: return run(std::integral_constant<Activation, Activation::none>());
    case Activation::relu: return run(std::integral_constant<Activation, Activation::relu>());
    case Activation::gelu: return run(std::integral_constant<Activation, Activation::gelu>());
    case Activation::gelu_tanh: return run(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::silu: return run(std::integral_constant<Activation, Activation::silu>());
  }
}

}  // namespace low_rank
