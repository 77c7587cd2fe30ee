// A tiny kernel per primitive, which brings raw registers or memory in and out: in the emulator the test compares them with
// the instruction's definition, on a GPU the same source shows whether the emulator is right about it.
#include "device/async_copy.h"
#include "device/cluster.h"
#include "device/convert.h"
#include "device/grid.h"
#include "device/launch.h"
#include "device/load.h"
#include "device/mma.h"
#include "device/reduce.h"
#include "device/tma.h"
#include "device/wgmma.h"

namespace primitives {

using namespace device;

struct Params {
  const uint32_t* a = nullptr;  // registers or bytes in, per primitive
  const uint32_t* b = nullptr;
  const uint32_t* c = nullptr;
  uint32_t* out = nullptr;
  uint64_t* counter = nullptr;
  int count = 0;
  int row = 0, column = 0;
  TensorMap map = {};
};

LOWFAT_DEVICE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
LOWFAT_DEVICE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

template <int kCount>
LOWFAT_DEVICE void load_registers(uint32_t (&r)[kCount], const uint32_t* gmem) {  // [threads][kCount]
  for (int i = 0; i < kCount; ++i) r[i] = load(gmem + threadIdx.x * kCount + i);
}

// ---- One warp: the products.

template <class Config>
__global__ void __launch_bounds__(32) mma(const __grid_constant__ Params p) {
  uint32_t a[4], b[Config::kB], c[4];
  load_registers(a, p.a);
  load_registers(b, p.b);
  load_registers(c, p.c);
  float d[4] = {as_float(c[0]), as_float(c[1]), as_float(c[2]), as_float(c[3])};
  Config::multiply(d, a, b, load(p.a + 128 + threadIdx.x));
  for (int i = 0; i < 4; ++i) store(p.out + threadIdx.x * 4 + i, as_bits(d[i]));
}

template <class T>
struct Dense {
  static constexpr int kB = 2;
  LOWFAT_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t) {
    mma_m16n8k16<T>(d, a, b);
  }
};
struct Tf32 {
  static constexpr int kB = 2;
  LOWFAT_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t) {
    mma_m16n8k8_tf32(d, a, b);
  }
};
template <class T, int kSelector>
struct Sparse {
  static constexpr int kB = 4;
  LOWFAT_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    mma_sp_m16n8k32<T, kSelector>(d, a, b, metadata);
  }
};

// ---- One warp: matrices between shared memory and registers. Lane l names 16-byte row 5 l mod 32 of a 512-byte block.

template <int kMatrices, bool kTransposed>
struct Matrices {
  static constexpr int kCount = kMatrices;
  static constexpr bool kIsTransposed = kTransposed;
};

template <class Config>
__global__ void __launch_bounds__(32) load_matrices(const __grid_constant__ Params p) {
  uint8_t* smem = shared_memory();
  store16_shared(smem + threadIdx.x * 16, load16(p.a + threadIdx.x * 4));
  __syncwarp();
  const uint8_t* row = smem + threadIdx.x * 5 % 32 * 16;
  uint32_t r[Config::kCount];
  if constexpr (Config::kIsTransposed) {
    ldmatrix_transposed<Config::kCount>(r, row);
  } else {
    ldmatrix<Config::kCount>(r, row);
  }
  for (int i = 0; i < Config::kCount; ++i) store(p.out + threadIdx.x * Config::kCount + i, r[i]);
}

template <class Config>
__global__ void __launch_bounds__(32) store_matrices(const __grid_constant__ Params p) {
  uint8_t* smem = shared_memory();
  store16_shared(smem + threadIdx.x * 16, make_uint4(0, 0, 0, 0));
  __syncwarp();
  uint32_t r[Config::kCount];
  load_registers(r, p.a);
  uint8_t* row = smem + threadIdx.x * 5 % 32 * 16;
  if constexpr (Config::kIsTransposed) {
    stmatrix_transposed<Config::kCount>(row, r);
  } else {
    stmatrix<Config::kCount>(row, r);
  }
  __syncwarp();
  store16(p.out + threadIdx.x * 4, load16_shared(smem + threadIdx.x * 16));
}

// ---- One warpgroup: the product of two tiles, 64 deep, which arrive as an image of shared memory (a, then b at kBytesA).

template <class Element, int n, Major major_a, Major major_b>
struct Tiles {
  using T = Element;
  static constexpr int kN = n;
  static constexpr Major kMajorA = major_a, kMajorB = major_b;
  static constexpr int kBytesA = 64 * 128, kBytesB = (n + 63) / 64 * 64 * 128;
  static constexpr int kBytes = kBytesA + kBytesB;
  static constexpr bool kIsNarrow = false;
};

// With b MN-major in rows that hold no more than n.
template <class Element, int n>
struct NarrowTiles : Tiles<Element, n, Major::k, Major::mn> {
  static constexpr int kRowBytes = n * 2;
  static constexpr bool kIsNarrow = true;
};

template <class Config>
__global__ void __launch_bounds__(128) multiply_tiles(const __grid_constant__ Params p) {
  uint8_t* smem = shared_memory();
  for (int i = threadIdx.x; i < Config::kBytes / 16; i += 128) store16_shared(smem + i * 16, load16(p.a + i * 4));
  fence_async_shared();
  __syncthreads();
  constexpr bool kIsAMn = Config::kMajorA == Major::mn, kIsBMn = Config::kMajorB == Major::mn;
  const uint64_t a = kIsAMn ? wgmma_tile_mn(smem, 8192) : wgmma_tile(smem);
  uint64_t b = kIsBMn ? wgmma_tile_mn(smem + Config::kBytesA, 8192) : wgmma_tile(smem + Config::kBytesA);
  uint64_t next_of_b = kIsBMn ? kNextKOfMn : kNextK;
  if constexpr (Config::kIsNarrow) {
    b = wgmma_tile_mn_narrow<Config::kRowBytes>(smem + Config::kBytesA);
    next_of_b = kNextKOfNarrow<Config::kRowBytes>;
  }
  float d[Config::kN / 2];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma<typename Config::T, Config::kN, Config::kMajorA, Config::kMajorB>(d, a + k * (kIsAMn ? kNextKOfMn : kNextK),
                                                                            b + k * next_of_b, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < Config::kN / 2; ++i) store(p.out + threadIdx.x * (Config::kN / 2) + i, as_bits(d[i]));
}

// ---- Copies. A whole box goes in, shared memory comes out, or the other way round.

template <class Config>
__global__ void __launch_bounds__(32) load_box(const __grid_constant__ Params p) {
  uint8_t* smem = shared_memory();
  auto* full = reinterpret_cast<uint64_t*>(smem + Config::kBytes);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&p.map);
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  __syncwarp();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(full, Config::kBytes);
    tma_load(smem, &p.map, p.row, p.column, full);
  }
  mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < Config::kBytes / 16; i += 32) store16(p.out + i * 4, load16_shared(smem + i * 16));
}

template <class Config>
__global__ void __launch_bounds__(32) store_box(const __grid_constant__ Params p) {
  uint8_t* smem = shared_memory();
  for (int i = threadIdx.x; i < Config::kBytes / 16; i += 32) store16_shared(smem + i * 16, load16(p.a + i * 4));
  fence_async_shared();
  __syncwarp();
  if (threadIdx.x == 0) {
    tma_store(&p.map, p.row, p.column, smem);
    commit_stores();
    wait_stores_written<0>();
  }
}

template <int rows, int row_bytes>
struct Box {
  static constexpr int kBytes = rows * row_bytes;
};

// Every block sends 512 bytes to the next of its cluster, which adds what the one before that has in plain shared memory.
template <class Config>
__global__ void __launch_bounds__(32) pass_around(const __grid_constant__ Params p) {
  uint8_t* smem = shared_memory();  // 512 bytes mine, 512 bytes received, the barriers
  auto* full = reinterpret_cast<uint64_t*>(smem + 1024);
  uint64_t* asked = full + 1;
  uint64_t* loaded = full + 2;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(asked, 2);
    mbarrier_init(loaded, 1);
    fence_mbarrier_init();
  }
  cluster_sync();
  const int rank = cluster_rank(), size = cluster_size();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(loaded, 512);
    bulk_load(smem, p.a + blockIdx.x * 128, 512, loaded);
    mbarrier_arrive_expect(full, 512);
    mbarrier_arrive_peer(peer_address(asked, (rank + size - 1) % size));  // I am ready for yours
    mbarrier_arrive_peer_read(peer_address(asked, (rank + size - 1) % size));
    mbarrier_wait(loaded, 0);
    mbarrier_wait_cluster(asked, 0);
    const int next = (rank + 1) % size;
    bulk_copy_to_peer(peer_address(smem + 512, next), smem, 512, peer_address(full, next));
  }
  mbarrier_wait(full, 0);
  mbarrier_wait(loaded, 0);
  cluster_sync();
  const auto* others = reinterpret_cast<const uint32_t*>(peer_pointer(smem, (rank + size - 2) % size));
  for (int i = threadIdx.x; i < 128; i += 32) {
    store(p.out + blockIdx.x * 128 + i, reinterpret_cast<const uint32_t*>(smem + 512)[i] + others[i]);
  }
  cluster_sync();
}

// cp.async in two groups: the first 512 bytes are there while the second may be under way; rows from count on are zero.
template <int kCopiedBytes>
struct Copied {
  static constexpr int kBytes = kCopiedBytes;
};

template <class Config>
__global__ void __launch_bounds__(32) copy_rows(const __grid_constant__ Params p) {
  uint8_t* smem = shared_memory();
  for (int half = 0; half < 2; ++half) {
    const int row = half * 32 + threadIdx.x;
    for (int word = 0; word < 4; word += Config::kBytes / 4) {
      if constexpr (Config::kBytes == 16) {
        copy16_async(smem + row * 16, p.a + row * 4, row < p.count);
      } else {
        copy4_async(smem + row * 16 + word * 4, p.a + row * 4 + word, row < p.count);
      }
    }
    commit_copies();
  }
  wait_copies<1>();
  __syncwarp();
  const int other = 31 - threadIdx.x;
  store16(p.out + other * 4, load16_shared(smem + other * 16));
  wait_copies<0>();
  __syncwarp();
  store16(p.out + (32 + other) * 4, load16_shared(smem + (32 + other) * 16));
}

// ---- Values.

template <class T>
__global__ void __launch_bounds__(32) convert(const __grid_constant__ Params p) {
  for (int i = threadIdx.x; i < p.count; i += 32) {  // a: floats in pairs
    const float lo = as_float(load(p.a + 2 * i)), hi = as_float(load(p.a + 2 * i + 1));
    const uint32_t both = pack2<T>(lo, hi);
    const float2 back = unpack2<T>(both);
    store(p.out + 4 * i, both);
    store(p.out + 4 * i + 1, narrow<T>(lo) | uint32_t{narrow<T>(hi)} << 16);
    store(p.out + 4 * i + 2, as_bits(back.x));
    store(p.out + 4 * i + 3, as_bits(back.y));
  }
}

template <class Config>
__global__ void __launch_bounds__(64) reduce(const __grid_constant__ Params p) {
  const float v = as_float(load(p.a + threadIdx.x));
  const float results[4] = {quad_sum(v), warp_sum(v), quad_max(v), warp_max(v)};
  for (int i = 0; i < 4; ++i) store(p.out + threadIdx.x * 4 + i, as_bits(results[i]));
}

template <class Config>
__global__ void __launch_bounds__(32) move16(const __grid_constant__ Params p) {
  const uint32_t* from = p.a + threadIdx.x * 4;
  const float4 f = load16_floats_l2(reinterpret_cast<const float*>(from));
  const uint2 low = load8_weights(from), high = load8_weights(from + 2);
  const uint4 values[5] = {load16_weights(from), load16(from), load16_l2(from),
                           make_uint4(as_bits(f.x), as_bits(f.y), as_bits(f.z), as_bits(f.w)),
                           make_uint4(low.x, low.y, high.x, high.y)};
  for (int i = 0; i < 5; ++i) store16(p.out + (i * 32 + threadIdx.x) * 4, values[i]);
}

// ---- Blocks and grids.

// Each round, every block writes its place and reads its neighbour's; out: count of right reads per block.
template <class Config>
__global__ void __launch_bounds__(64) barrier_rounds(const __grid_constant__ Params p) {
  uint32_t* places = p.out + gridDim.x;
  uint32_t right = 0;
  for (int round = 0; round < p.count; ++round) {
    if (threadIdx.x == 32) store(places + blockIdx.x, static_cast<uint32_t>(round * 1000 + blockIdx.x));
    grid_barrier(p.counter);
    const int neighbour = (blockIdx.x + 1) % gridDim.x;
    uint4 line = load16_l2(places + neighbour / 4 * 4);
    const uint32_t of_four[4] = {line.x, line.y, line.z, line.w};
    right += of_four[neighbour % 4] == static_cast<uint32_t>(round * 1000 + neighbour);
    grid_barrier(p.counter);
  }
  if (threadIdx.x == 63) store(p.out + blockIdx.x, right);
}

// Items are drawn by ticket; item i adds 1 to what item i - 1 left, after its flag. Any number of resident blocks.
template <class Config>
__global__ void __launch_bounds__(32) chain_of_tickets(const __grid_constant__ Params p) {
  uint32_t* flag = p.out + p.count;
  auto* ticket = reinterpret_cast<uint32_t*>(p.counter);
  for (;;) {
    uint32_t item = 0;
    if (threadIdx.x == 0) item = take_ticket(ticket);
    item = __shfl_sync(kAllLanes, item, 0);
    if (item >= static_cast<uint32_t>(p.count)) return;
    if (threadIdx.x == 0) {
      wait_until_reached(flag, item);
      store(p.out + item, item == 0 ? 1 : load(p.out + item - 1) + 1);
      add_release(flag, 1u);
    }
    __syncwarp();
  }
}

// The first grid fills out, the second, dependent one doubles it into the part behind.
template <class Config>
__global__ void __launch_bounds__(64) fill(const __grid_constant__ Params p) {
  launch_dependents();
  const int i = blockIdx.x * 64 + threadIdx.x;
  __syncthreads();
  store(p.out + i, static_cast<uint32_t>(i + 1));
}
template <class Config>
__global__ void __launch_bounds__(64) double_filled(const __grid_constant__ Params p) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  const uint32_t weight = load(p.a);  // what no grid writes may be read before
  wait_for_dependency();
  store(p.out + gridDim.x * 64 + i, load(p.out + i) * weight);
}

// Warp 0 fills a buffer again and again, warps 1 and 2 use it: two named barriers, "full" and "empty".
template <class Config>
__global__ void __launch_bounds__(96) hand_over(const __grid_constant__ Params p) {
  auto* smem = reinterpret_cast<uint32_t*>(shared_memory());
  constexpr int kFull = 1, kEmpty = 2;
  uint32_t sum = 0;
  for (int round = 0; round < p.count; ++round) {
    if (warp_index() == 0) {
      if (round > 0) barrier_sync(kEmpty, 96);
      smem[lane_index()] = round * 100 + lane_index();
      barrier_arrive(kFull, 96);
    } else {
      barrier_sync(kFull, 96);
      sum += smem[31 - lane_index()];
      if (round + 1 < p.count) barrier_arrive(kEmpty, 96);
    }
  }
  store(p.out + threadIdx.x, sum);
}

}  // namespace primitives
