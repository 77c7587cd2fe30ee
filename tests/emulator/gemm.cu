// A persistent GEMM that uses the sm_90 primitives together: c = a b^T, a test of them and of the emulator.
//
//   a [m, k]   b [n, k]   c [m, n]     bf16, float sums
//
// One warpgroup loads tiles by TMA into a ring of slots, two multiply 64 rows each; each warpgroup's result goes through a
// swizzled tile in shared memory and leaves by TMA.
#include "device/launch.h"
#include "device/layout.h"
#include "device/mma.h"
#include "device/tma.h"
#include "device/wgmma.h"

namespace gemm_test {

using namespace device;

struct Config {
  static constexpr int kRows = 128, kColumns = 128, kDepth = 64;  // of a tile
  static constexpr int kSlots = 3;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
  static constexpr int kBytesA = kRows * kDepth * 2, kBytesB = kColumns * kDepth * 2;
  static constexpr int kBoxBytes = 64 * 128;  // 64 rows of 64 elements of c
  struct Shared {
    alignas(1024) uint8_t a[kSlots][kBytesA];
    uint8_t b[kSlots][kBytesB];
    uint8_t c[kConsumers][kColumns / 64][kBoxBytes];
    uint64_t full[kSlots], empty[kSlots];
  };
  static_assert(kRows == 64 * kConsumers, "a warpgroup multiplies 64 rows");
};

struct Params {
  TensorMap a, b, c;  // boxes of kRows x 64, kColumns x 64, 64 x 64
  int tile_rows, tile_columns, tile_depths;
};

// A position in the ring: the slot, and the parity of the phase that a consumer waits for there.
template <class Config>
struct Ring {
  int slot = 0, parity = 0;
  LOWFAT_DEVICE void advance() {
    if (++slot == Config::kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <class Config>
LOWFAT_DEVICE void produce(const Params& p, typename Config::Shared& smem) {
  Ring<Config> ring;
  for (int tile = blockIdx.x; tile < p.tile_rows * p.tile_columns; tile += gridDim.x) {
    const int row = tile / p.tile_columns * Config::kRows, column = tile % p.tile_columns * Config::kColumns;
    for (int depth = 0; depth < p.tile_depths; ++depth) {
      mbarrier_wait(&smem.empty[ring.slot], ring.parity ^ 1);
      mbarrier_arrive_expect(&smem.full[ring.slot], Config::kBytesA + Config::kBytesB);
      tma_load(smem.a[ring.slot], &p.a, row, depth * Config::kDepth, &smem.full[ring.slot]);
      tma_load(smem.b[ring.slot], &p.b, column, depth * Config::kDepth, &smem.full[ring.slot]);
      ring.advance();
    }
  }
}

template <class Config>
LOWFAT_DEVICE void store_tile(const Params& p, typename Config::Shared& smem, int consumer, int row, int column,
                              const float (&d)[Config::kColumns / 2]) {
  const int thread = threadIdx.x % kWarpgroupThreads, lane = lane_index();
  const int barrier = 1 + consumer;
  if (thread == 0) wait_stores_read<0>();  // the tile before has left
  barrier_sync(barrier, kWarpgroupThreads);
  const Position mine = ldmatrix_row(lane);
#pragma unroll
  for (int j = 0; j < Config::kColumns / 16; ++j) {
    const uint32_t r[4] = {pack2<Bf16>(d[8 * j], d[8 * j + 1]), pack2<Bf16>(d[8 * j + 2], d[8 * j + 3]),
                           pack2<Bf16>(d[8 * j + 4], d[8 * j + 5]), pack2<Bf16>(d[8 * j + 6], d[8 * j + 7])};
    const int in_box = j % 4 * 2 + mine.column / 8;
    stmatrix<4>(smem.c[consumer][j / 4] + swizzled_piece(thread / 32 * 16 + mine.row, in_box), r);
  }
  fence_async_shared();
  barrier_sync(barrier, kWarpgroupThreads);
  if (thread == 0) {
    for (int box = 0; box < Config::kColumns / 64; ++box) {
      tma_store(&p.c, row + consumer * 64, column + box * 64, smem.c[consumer][box]);
    }
    commit_stores();
  }
}

template <class Config>
LOWFAT_DEVICE void consume(const Params& p, typename Config::Shared& smem, int consumer) {
  Ring<Config> ring;
  for (int tile = blockIdx.x; tile < p.tile_rows * p.tile_columns; tile += gridDim.x) {
    float d[Config::kColumns / 2];
    for (int depth = 0; depth < p.tile_depths; ++depth) {
      mbarrier_wait(&smem.full[ring.slot], ring.parity);
      const uint64_t a = wgmma_tile(smem.a[ring.slot] + consumer * 64 * 128), b = wgmma_tile(smem.b[ring.slot]);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Config::kDepth / 16; ++step) {
        wgmma<Bf16, Config::kColumns>(d, a + step * kNextK, b + step * kNextK, depth + step > 0);
      }
      wgmma_commit();
      wgmma_wait<0>();
      if (threadIdx.x % kWarpgroupThreads == 0) mbarrier_arrive(&smem.empty[ring.slot]);
      ring.advance();
    }
    store_tile<Config>(p, smem, consumer, tile / p.tile_columns * Config::kRows, tile % p.tile_columns * Config::kColumns,
                       d);
  }
  if (threadIdx.x % kWarpgroupThreads == 0) wait_stores_read<0>();
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) gemm(const __grid_constant__ Params p) {
  auto& smem = *reinterpret_cast<typename Config::Shared*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      mbarrier_init(&smem.full[slot], 1);
      mbarrier_init(&smem.empty[slot], Config::kConsumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) produce<Config>(p, smem);
  } else {
    take_registers<232>();
    consume<Config>(p, smem, warpgroup - 1);
  }
}

inline const char* launch_gemm(const void* a, const void* b, void* c, int m, int n, int k, int blocks) {
  Params p;
  if (const char* wrong = make_tensor_map(p.a, {a, m, k, k, Config::kRows, 64})) return wrong;
  if (const char* wrong = make_tensor_map(p.b, {b, n, k, k, Config::kColumns, 64})) return wrong;
  if (const char* wrong = make_tensor_map(p.c, {c, m, n, n, 64, 64})) return wrong;
  p.tile_rows = static_cast<int>(ceil_div(m, Config::kRows));
  p.tile_columns = static_cast<int>(ceil_div(n, Config::kColumns));
  p.tile_depths = static_cast<int>(ceil_div(k, Config::kDepth));
  return launch(gemm<Config>, {dim3(blocks), Config::kThreads, sizeof(Config::Shared)}, p);
}

}  // namespace gemm_test
