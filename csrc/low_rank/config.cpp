// How low_rank chooses between its own kernel and the library: a pure function of the problem, with no torch in sight.
#include "low_rank/low_rank.h"

namespace low_rank {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;    // of weights: below, handing a task to a thread costs more than it saves
constexpr int64_t kThreadedBytes = 1 << 20;  // of both factors: below, one thread is done before others have woken up
constexpr int64_t kRowTile = 4;

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

Config cpu_config(const Problem& p) {
  Config config{Path::library, 0, 0, 0};
  if (p.dtype != Dtype::float32 && p.dtype != Dtype::bfloat16) return config;
  if (p.m > kDecodeRows) return config;
  config.path = Path::decode;
  config.row_tile = kRowTile;
  const int64_t bytes = element_bytes(p.dtype);
  if (p.r * (p.k + p.n) * bytes >= kThreadedBytes) {
    const auto grain = [&](int64_t depth) {
      const int64_t tile_bytes = kRowTile * depth * bytes;
      return (kTaskBytes + tile_bytes - 1) / tile_bytes;
    };
    config.first_grain = grain(p.k > 0 ? p.k : 1);
    config.second_grain = grain(p.r);
  }
  return config;
}

// Not measured on a GPU yet: the first plan is our kernel where a pass over the weights is all there is to do.
Config cuda_config(const Problem& p) {
  const bool has_kernel = p.dtype == Dtype::float32 || p.dtype == Dtype::bfloat16 || p.dtype == Dtype::float16;
  return {has_kernel && p.m <= kDecodeRows ? Path::decode : Path::library, 0, 0, 0};
}

const char* name_of_path(Path path) {
  return path == Path::decode ? "decode" : path == Path::library ? "library" : "empty";
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
  return all;
}

const RegisterOp registered({"low_rank", compiled_cpu_levels(), compiled_cuda_archs(), &describe});

}  // namespace

Config choose_config(const Problem& problem) {
  if (problem.m == 0) return {Path::empty, 0, 0, 0};
  return problem.device == Device::cpu ? cpu_config(problem) : cuda_config(problem);
}

}  // namespace low_rank
