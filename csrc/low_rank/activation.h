// What may be done to a linear layer's sum on its way to y.
#pragma once

namespace low_rank {

enum class Activation { none, relu, gelu, gelu_tanh, silu };  // torch's; gelu is the exact one, gelu_tanh its approximation

}  // namespace low_rank
