// low_rank on a GPU for a few rows of x: one product of the chain, y = x w^T + bias, launched once for v and once for u.
//
//   x [m, depth]   w [rows, depth]   bias [rows]   y [m, rows]
//
// A warp owns one row of w. Its lanes read the row side by side, 16 bytes each where everything is aligned, and
// multiply it with all rows of x; the lanes' sums meet in a fixed order, so the same inputs give the same bits. Weights
// are read once, which is all there is to a decode step; x comes from the L1 cache.
//
// A first version, plain on purpose. It compiles for sm_80, sm_90a and as PTX, and tests run its arithmetic on the host;
// it HAS NEVER RUN ON A GPU, and no speed is claimed for it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "low_rank/low_rank.h"

namespace low_rank {
namespace {

constexpr int kWarpLanes = 32;
constexpr int kWarps = 8;  // in a block

template <class T, int kTokenCount, bool kIsAligned>
struct DecodeConfig {
  using Element = T;
  static constexpr int kTokens = kTokenCount;  // rows of x; those past m are computed on the last row and dropped
  static constexpr int kWidth = kIsAligned ? 16 / sizeof(T) : 1;  // elements in one load
  static_assert(kTokens <= kWarpLanes, "lane t stores token t");
};

__host__ __device__ inline float widen(float value) { return value; }
__host__ __device__ inline float widen(__half value) { return __half2float(value); }
__host__ __device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__host__ __device__ inline void narrow(float value, float& to) { to = value; }
__host__ __device__ inline void narrow(float value, __half& to) { to = __float2half_rn(value); }
__host__ __device__ inline void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

// One load instruction: kWidth neighbouring elements.
template <class Config>
struct alignas(Config::kWidth * sizeof(typename Config::Element)) Pack {
  typename Config::Element element[Config::kWidth];
};

// What one lane adds up: every 32nd pack of a row of w times the same pack of each row of x.
template <class Config>
__host__ __device__ inline void lane_sums(const Product& p, int64_t row, int lane, float (&sums)[Config::kTokens]) {
  using Element = typename Config::Element;
  const auto* x = static_cast<const Element*>(p.x);
  const auto* w = static_cast<const Element*>(p.w) + row * p.depth;
  for (int t = 0; t < Config::kTokens; ++t) sums[t] = 0;
  for (int64_t d = lane * Config::kWidth; d < p.depth; d += kWarpLanes * Config::kWidth) {
    const auto w_pack = *reinterpret_cast<const Pack<Config>*>(w + d);
    for (int t = 0; t < Config::kTokens; ++t) {
      const int64_t token = t < p.m ? t : p.m - 1;
      const auto x_pack = *reinterpret_cast<const Pack<Config>*>(x + token * p.depth + d);
      for (int i = 0; i < Config::kWidth; ++i) sums[t] += widen(w_pack.element[i]) * widen(x_pack.element[i]);
    }
  }
}

template <class Config>
__host__ __device__ inline void store(const Product& p, int64_t row, int token, float sum) {
  using Element = typename Config::Element;
  if (token >= p.m) return;
  if (p.bias) sum += widen(static_cast<const Element*>(p.bias)[row]);
  narrow(sum, static_cast<Element*>(p.y)[token * p.rows + row]);
}

bool is_aligned(const Product& p, int64_t element_bytes) {
  const auto start = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.w);
  return start % 16 == 0 && p.depth * element_bytes % 16 == 0;
}

// The one list of instances. 1 row of x is decode proper; 4 and 16 waste at most three quarters of the arithmetic, which is
// hidden behind the weights.
template <class Element, class Use>
auto with_config(const Product& p, const Use& use) {
  const bool aligned = is_aligned(p, sizeof(Element));
  if (p.m == 1) return aligned ? use(DecodeConfig<Element, 1, true>{}) : use(DecodeConfig<Element, 1, false>{});
  if (p.m <= 4) return aligned ? use(DecodeConfig<Element, 4, true>{}) : use(DecodeConfig<Element, 4, false>{});
  return aligned ? use(DecodeConfig<Element, 16, true>{}) : use(DecodeConfig<Element, 16, false>{});
}

#ifdef __CUDACC__  // what only a GPU can do; the rest also compiles for the host, where tests run it

template <class Config>
__global__ void __launch_bounds__(kWarps * kWarpLanes) decode(const Product p) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpLanes;
  if (row >= p.rows) return;  // a whole warp leaves
  float sums[Config::kTokens];
  lane_sums<Config>(p, row, lane, sums);
#pragma unroll
  for (int t = 0; t < Config::kTokens; ++t) {
    for (int other = kWarpLanes / 2; other > 0; other /= 2) sums[t] += __shfl_xor_sync(0xffffffffu, sums[t], other);
    if (lane == t) store<Config>(p, row, t, sums[t]);
  }
}

template <class Config>
cudaError_t launch(const Product& p, cudaStream_t stream) {
  const int64_t blocks = (p.rows + kWarps - 1) / kWarps;
  decode<Config><<<static_cast<unsigned>(blocks), kWarps * kWarpLanes, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class Element>
cudaError_t launch_for(const Product& p, cudaStream_t stream) {
  return with_config<Element>(p, [&](auto config) { return launch<decltype(config)>(p, stream); });
}

#endif

}  // namespace

#ifdef __CUDACC__

const char* launch_decode(const Product& p, Dtype dtype, void* stream) {
  if (p.rows == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t code = dtype == Dtype::float32    ? launch_for<float>(p, on)
                           : dtype == Dtype::bfloat16 ? launch_for<__nv_bfloat16>(p, on)
                                                      : launch_for<__half>(p, on);
  return code == cudaSuccess ? nullptr : cudaGetErrorString(code);
}

int device_arch() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major * 10 + minor;
}

#endif

}  // namespace low_rank
