// What the host side and the kernels of low_rank share: y = (x v^T) u^T + bias.   x [m, k]   v [r, k]   u [n, r]   y [m, n]
#pragma once

#include <cstdint>

#include "host/gpu.h"
#include "host/op_table.h"
#include "low_rank/activation.h"
#include "low_rank/chain_layout.h"
#include "low_rank/decode_layout.h"
#include "low_rank/small_batch_layout.h"
#include "low_rank/small_batch_sm80_layout.h"

namespace low_rank {

constexpr int64_t kDecodeRows = 16;       // m up to which a pass over the weights costs more than the arithmetic
constexpr int64_t kSmallBatchRows = 256;  // m up to which one block can have all rows
constexpr int64_t kChainRows = 4096;      // m from which the library's two products fill a GPU well enough

enum class Path { empty, decode, small_batch, small_batch_sm80, chain, library };

struct Config {
  Path path = Path::library;
  int64_t row_tile = 0;      // CPU: rows of a weight that share one load of x
  int64_t first_grain = 0;   // CPU: row tiles of v per task; 0: one thread does all
  int64_t second_grain = 0;  // CPU: row tiles of u per task; 0: one thread does all
  DecodePlan plan;           // GPU, decode
  SmallBatchPlan batch;      // GPU, small batch on an sm_90
  SmallBatchSm80Plan batch_sm80;
  ChainPlan chain;           // GPU, chain
};

Config choose_config(const Problem& problem);

// What every kernel of a GPU is given; elements are bf16 or fp16.
struct KernelOperands {
  const uint16_t* x;         // [m, k], like v and u with 16-byte aligned rows
  const uint16_t* v;         // [r, k]
  const uint16_t* u;         // [n, r]
  const uint16_t* bias;      // [n] or null, at any address
  const uint16_t* residual;  // [m, n] or null
  Activation activation;
  uint16_t* h;  // [m, r], written before it is read
  uint16_t* y;  // [m, n]
  int m, n, k, r;
};

// The decode kernels (decode.cu), which also take no h, where nobody wants it.
struct DecodeParams : KernelOperands {
  float* partials;    // [splits, m, r], workspace
  uint64_t* counter;  // of one launch: the barrier's, used by no grid of another size and by none at the same time
  int splits, tiles, prefetch;  // of the plan
};

// Returns null, or what CUDA says is wrong. Fills in what comes from the plan.
const char* launch_decode(const DecodePlan& plan, DecodeParams params, Dtype dtype, void* stream);

// The small-batch kernels; rows of residual and y are 16-byte aligned too.
using SmallBatchOperands = KernelOperands;

// Of an sm_90 (small_batch.cu). Returns null, or what CUDA says is wrong.
const char* launch_small_batch(const SmallBatchPlan& plan, const SmallBatchOperands& operands, Dtype dtype, void* stream);

// Of compute capability 8 (small_batch_sm80.cu); the same. partials: as many floats of workspace as the plan says.
// counter: as of DecodeParams.
const char* launch_small_batch_sm80(const SmallBatchSm80Plan& plan, const SmallBatchOperands& operands, float* partials,
                                    uint64_t* counter, Dtype dtype, void* stream);

// The chained kernel of an sm_90 (chain.cu); rows of residual and y are 16-byte aligned too.
struct ChainOperands : KernelOperands {
  float* partials;     // [chain_partials], workspace, 16-byte aligned; null where there are none
  uint32_t* counters;  // [kChainCounters], zero; zero again when the kernel has ended
};

// Returns null, or what CUDA says is wrong.
const char* launch_chain(const ChainPlan& plan, const ChainOperands& operands, Dtype dtype, void* stream);

// kChainCounters for chained kernels on one stream of the current device, zero when none of them runs (gpu.cu). Null when
// there are no more, or, with `error` set, when CUDA says that something is wrong.
uint32_t* chain_counters(int device, void* stream, const char*& error);

}  // namespace low_rank
