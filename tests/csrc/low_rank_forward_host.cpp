// The arithmetic of csrc/low_rank/forward.cu on the host: every warp's lanes one after the other, their sums meeting as the
// shuffles make them meet. It shows indices, tails, rounding and bias; not the launch, and not what a GPU does.
#include "low_rank/forward.cu"

#include <vector>

namespace {

using namespace low_rank;

template <class Config>
void run(const Product& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    std::vector<std::vector<float>> lanes(kWarpLanes, std::vector<float>(Config::kTokens));
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      float sums[Config::kTokens];
      lane_sums<Config>(p, row, lane, sums);
      lanes[lane].assign(sums, sums + Config::kTokens);
    }
    for (int t = 0; t < Config::kTokens; ++t) {
      for (int other = kWarpLanes / 2; other > 0; other /= 2) {
        std::vector<float> before(kWarpLanes);
        for (int lane = 0; lane < kWarpLanes; ++lane) before[lane] = lanes[lane][t];
        for (int lane = 0; lane < kWarpLanes; ++lane) lanes[lane][t] = before[lane] + before[lane ^ other];
      }
      store<Config>(p, row, t, lanes[t][t]);
    }
  }
}

template <class Element>
void run_for(const Product& p) {
  with_config<Element>(p, [&](auto config) { run<decltype(config)>(p); });
}

}  // namespace

// x [m, k]   v [r, k]   u [n, r]   bias [n] or null   h [m, r]   y [m, n]   dtype: 0 float, 1 bf16, 2 half
extern "C" void forward_on_host(const void* x, const void* v, const void* u, const void* bias, void* h, void* y, int64_t m,
                                int64_t k, int64_t r, int64_t n, int dtype) {
  const auto run_dtype = dtype == 0 ? &run_for<float> : dtype == 1 ? &run_for<__nv_bfloat16> : &run_for<__half>;
  run_dtype({x, v, nullptr, h, m, k, r, nullptr});
  run_dtype({h, u, bias, y, m, r, n, nullptr});
}
