// How low_rank chooses between its own kernel and the library: a pure function of the problem, and of what the build has
// machine code for; with no torch in sight.
#include "low_rank/low_rank.h"

#include "cpu/config.h"
#include "low_rank/backward.h"

namespace low_rank {
namespace {

Config cpu_config(const Problem& p) {
  Config config;
  if (p.dtype != Dtype::float32 && p.dtype != Dtype::bfloat16) return config;
  if (p.m > cpu::most_tokens(p)) return config;
  config.path = Path::decode;
  config.row_tile = cpu::kRowTile;
  const int64_t bytes = element_bytes(p.dtype);
  if (p.r * (p.k + p.n) * bytes >= cpu::kThreadedBytes) {
    config.first_grain = cpu::grain_of(cpu::kRowTile * std::max<int64_t>(1, p.k) * bytes);
    config.second_grain = cpu::grain_of(cpu::kRowTile * p.r * bytes);
  }
  return config;
}

// A GPU build without machine code for an sm_90 runs the small-batch kernel of compute capability 8 there, from PTX.
//
// Not measured on a GPU yet: the first plan is our kernel where a pass over the weights is all there is to do, and one
// launch, because that needs nothing of the stream before it. Then the small-batch kernels, on an sm_90 those that are made
// for it; and there, one launch for both products as long as the tiles of the first do not fill the GPU.
Config cuda_config(const Problem& p) {
  Config config;
  if (p.dtype != Dtype::bfloat16 && p.dtype != Dtype::float16) return config;
  if (!p.is_aligned) return config;
  if (p.m <= kDecodeRows) {
    config.plan = plan_decode(p.m, p.n, p.k, p.r, p.sm_count, shared_memory_of(p.arch), false);
    if (config.plan.token_tiles > 0) config.path = Path::decode;
  } else if (p.arch == 90 && has_sm90_kernels()) {
    if (p.m <= kSmallBatchRows) {
      config.batch = plan_small_batch(p.m, p.n, p.k, p.r, p.sm_count, shared_memory_of(p.arch));
      if (config.batch.first.tokens > 0) config.path = Path::small_batch;
    } else if (p.m < kChainRows) {
      config.chain = plan_chain(p.m, p.n, p.k, p.r, p.sm_count, shared_memory_of(p.arch));
      if (config.chain.row_blocks > 0 && first_tiles(config.chain) < p.sm_count) config.path = Path::chain;
    }
  } else {
    config.batch_sm80 = plan_small_batch_sm80(p.m, p.n, p.k, p.r, p.sm_count, shared_memory_of(p.arch));
    if (config.batch_sm80.tokens > 0) config.path = Path::small_batch_sm80;
  }
  return config;
}

const char* name_of_path(Path path) {
  switch (path) {
    case Path::empty: return "empty";
    case Path::decode: return "decode";
    case Path::small_batch: return "small batch";
    case Path::small_batch_sm80: return "small batch sm_80";
    case Path::chain: return "chain";
    case Path::library: break;
  }
  return "library";
}

Described describe(const Problem& p) {
  const Config config = choose_config(p);
  Described all{{"path", name_of_path(config.path)}};
  if (config.path == Path::decode && p.device == Device::cpu) {
    all.insert(all.end(), {{"level", name_of(p.level)},
                           {"row_tile", config.row_tile},
                           {"first_grain", config.first_grain},
                           {"second_grain", config.second_grain}});
  }
  if (config.path == Path::decode && p.device == Device::cuda) {
    const DecodePlan& plan = config.plan;
    all.insert(all.end(), {{"variant", plan.first_smem_bytes > 0 ? "two launches" : "one launch"},
                           {"token_tiles", plan.token_tiles},
                           {"splits", plan.splits},
                           {"grid", plan.grid},
                           {"prefetch", plan.prefetch},
                           {"smem_bytes", plan.smem_bytes}});
  }
  if (config.path == Path::small_batch) {
    const BatchPhase &first = config.batch.first, &second = config.batch.second;
    all.insert(all.end(), {{"first_tokens", first.tokens},
                           {"first_grid", first.items * first.splits},
                           {"cluster", first.splits},
                           {"second_tokens", second.tokens},
                           {"second_grid", second.items},
                           {"prefetch", second.weight_slots}});
  }
  if (config.path == Path::chain) {
    const ChainPlan& plan = config.chain;
    all.insert(all.end(), {{"first_tiles", first_tiles(plan)},
                           {"splits", plan.splits},
                           {"second_tiles", chain_units(plan) - first_units(plan)},
                           {"grid", plan.grid},
                           {"smem_bytes", plan.smem_bytes}});
  }
  if (config.path == Path::small_batch_sm80) {
    const SmallBatchSm80Plan& plan = config.batch_sm80;
    all.insert(all.end(), {{"tokens", plan.tokens},
                           {"groups", plan.groups},
                           {"splits", plan.splits},
                           {"grid", plan.grid},
                           {"weight_slots", plan.weight_slots},
                           {"smem_bytes", plan.smem_bytes}});
  }
  return all;
}

const RegisterOp registered({"low_rank", compiled_cpu_levels(), compiled_cuda_archs(), &describe});
const RegisterOp registered_backward({"low_rank_backward", {}, compiled_cuda_archs(), &describe_backward<false>});
const RegisterOp registered_into({"low_rank_backward_into", {}, compiled_cuda_archs(), &describe_backward<true>});

}  // namespace

Config choose_config(const Problem& problem) {
  if (problem.m == 0) {
    Config config;
    config.path = Path::empty;
    return config;
  }
  return problem.device == Device::cpu ? cpu_config(problem) : cuda_config(problem);
}

}  // namespace low_rank
