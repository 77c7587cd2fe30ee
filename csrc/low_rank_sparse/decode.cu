// low_rank_sparse on a GPU for a few rows of x: y = x (scale u v + s)^T + bias in one pass over the weights, h = scale x v^T
// rounded once.
//
//   x [m, k]   v [r, k]   u [n, r]   s: values [nnz], starts [n + 1], columns [nnz] int16   bias [n]   h [m, r]   y [m, n]
//   m <= 16, bf16 or fp16, rows of x, v and u 16-byte aligned
//
// The steps of low_rank's decode kernel (low_rank/decode_steps.h), with s as a third stream. The rows of s that a block's
// tiles of u have are neighbours, and so are their entries: the block asks for all of them, as many as fit, before it has
// multiplied anything. x s^T needs no h: it is done while other blocks are still at h.
//
//   tensor cores   x v^T ............ | arrive       wait | h u^T | y
//   float units                         x s^T: a warp has a row of s, its lanes every 32nd entry
//
// For that x lies turned in shared memory, of each input the rows beside each other, so that an entry finds what it
// multiplies in one place; where not all rows fit there, it takes some at a time.
//
// All sums are added in an order that the sizes alone decide: the same inputs give the same bits. Indices are not trusted:
// of a support that is none, y has some numbers or other, the same each time, and nothing outside is read or written.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, no speed is claimed.
#include <type_traits>

#include "device/grid.h"
#include "device/launch.h"
#include "device/reduce.h"
#include "low_rank/decode_steps.h"
#include "low_rank_sparse/low_rank_sparse_cuda.h"

namespace low_rank_sparse {

struct SparseForm : low_rank::SingleForm<DecodeParams> {
  LOWFAT_DEVICE static Share share_of_block(const Params& p) {
    return low_rank::second_share(p.n, p.r, gridDim.x, blockIdx.x);
  }
  LOWFAT_DEVICE static low_rank::TileOfU u_at(const Params& p, const Share& mine, const Cursor& at) {
    return {p.u, (mine.tiles.first + at.tile) * kTileRows, p.n, p.r};
  }
  LOWFAT_DEVICE static DecodeMemory memory(const Params& p, int token_tiles) {
    return low_rank::decode_memory(token_tiles, p.tiles, p.r, p.prefetch);
  }
};

template <class T, int kTileCount>
struct DecodeConfig : low_rank::DecodeSizes<T, kTileCount>, SparseForm {
  LOWFAT_DEVICE static float of_h(const DecodeParams& p, float sum) { return p.scale * sum; }
};

// --- x, turned ---

// An input of kTokens rows of x, as one access has it.
template <int kTokens>
struct alignas(kTokens < 8 ? 2 * kTokens : 16) Input {
  uint32_t pairs[kTokens / 2];

  template <class T, class Visit>
  LOWFAT_DEVICE void visit(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const float2 both = device::unpack2<T>(pairs[i]);
      visit(2 * i, both.x);
      visit(2 * i + 1, both.y);
    }
  }
};

template <>
struct Input<1> {
  uint16_t only;

  template <class T, class Visit>
  LOWFAT_DEVICE void visit(const Visit& visit) const {
    visit(0, device::widen<T>(only));
  }
};

// Neighbouring inputs of each row of x, to where they lie by themselves.
LOWFAT_DEVICE void split_pair(Input<1>* to, const uint32_t (&x)[1]) { *reinterpret_cast<uint32_t*>(to) = x[0]; }

template <int kTokens>
LOWFAT_DEVICE void split_pair(Input<kTokens>* to, const uint32_t (&x)[kTokens]) {
  Input<kTokens> even, odd;
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    even.pairs[i] = (x[2 * i] & 0xffff) | x[2 * i + 1] << 16;
    odd.pairs[i] = x[2 * i] >> 16 | (x[2 * i + 1] & 0xffff0000);
  }
  to[0] = even;
  to[1] = odd;
}

// --- s ---

// A block's rows of s and what it does with them.
template <class Config>
struct SparseRows {
  using T = typename Config::Element;
  const DecodeParams& p;
  const int first_row, rows;
  Held held;
  float* smem_sums;  // [rows, tokens]
  uint8_t* smem_x;
  int* smem_starts;  // [rows + 1]
  uint16_t* smem_columns;
  uint16_t* smem_values;

  LOWFAT_DEVICE SparseRows(const DecodeParams& params, const low_rank::SecondShare& mine)
      : p(params),
        first_row(mine.tiles.first * kTileRows),
        rows(larger(0, smaller(mine.tiles.last * kTileRows, p.n) - first_row)),
        held{0, 0} {
    uint8_t* smem = device::shared_memory();
    const SparseMemory at = sparse_memory({Config::kTokenTiles, p.tiles, p.k, p.r, p.tokens, p.room, p.prefetch});
    smem_sums = reinterpret_cast<float*>(smem + at.sums);
    smem_x = smem + at.x;
    smem_starts = reinterpret_cast<int*>(smem + at.starts);
    smem_columns = reinterpret_cast<uint16_t*>(smem + at.columns);
    smem_values = reinterpret_cast<uint16_t*>(smem + at.values);
  }

  // Starts copying starts and entries, as one group. The last entries of all need not be a whole piece.
  LOWFAT_DEVICE void ask() {
    if (rows > 0) {
      const int start = device::load(p.starts + first_row), next = device::load(p.starts + first_row + rows);
      held = held_of(entries_between(start, next, p.entries), p.room);
      for (int i = threadIdx.x; i <= rows; i += Config::kThreads) {
        device::copy4_async(smem_starts + i, p.starts + first_row + i);
      }
    }
    for (int i = threadIdx.x * kPiece; i < held.last - held.first; i += Config::kThreads * kPiece) {
      const int entry = held.first + i;
      if (entry + kPiece <= p.entries) {
        device::copy16_async(smem_columns + i, p.columns + entry);
        device::copy16_async(smem_values + i, p.values + entry);
        continue;
      }
      for (int j = 0; entry + j < p.entries; ++j) {
        smem_columns[i + j] = device::load(p.columns + entry + j);
        smem_values[i + j] = device::load(p.values + entry + j);
      }
    }
    device::commit_copies();
  }

  // run(how many rows of x are in shared memory at a time, as a constant)
  template <class Run>
  LOWFAT_DEVICE void with_tokens(const Run& run) const {
    switch (p.tokens) {
      case 1: return run(std::integral_constant<int, 1>());
      case 2: return run(std::integral_constant<int, 2>());
      case 4: return run(std::integral_constant<int, 4>());
      case 8: return run(std::integral_constant<int, 8>());
      default:
        if constexpr (Config::kTokens >= 16) return run(std::integral_constant<int, 16>());
    }
  }

  template <int kTokens>
  LOWFAT_DEVICE void copy_x(int first_token) const {
    auto* to = reinterpret_cast<Input<kTokens>*>(smem_x);
    for (int pair = threadIdx.x; pair < p.k / 2; pair += Config::kThreads) {
      uint32_t x[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const int token = first_token + i;
        x[i] = token < p.m ? device::load(reinterpret_cast<const uint32_t*>(p.x + (token * p.k + 2 * pair))) : 0;
      }
      split_pair(to + 2 * pair, x);
    }
  }
  LOWFAT_DEVICE void copy_first_x() const {
    with_tokens([&](auto tokens) { copy_x<decltype(tokens)::value>(0); });
  }

  // A lane's sums of a row.
  template <int kTokens>
  LOWFAT_DEVICE void add_row(int row, float (&sums)[kTokens]) const {
    const auto* inputs = reinterpret_cast<const Input<kTokens>*>(smem_x);
    const Range entries = entries_between(smem_starts[row], smem_starts[row + 1], p.entries);
#pragma unroll 4
    for (int entry = entries.first + device::lane_index(); entry < entries.last; entry += device::kWarpThreads) {
      const uint32_t place = entry - held.first;
      const bool is_held = place < static_cast<uint32_t>(held.last - held.first);
      const uint32_t column = is_held ? smem_columns[place] : device::load(p.columns + entry);
      const float value = device::widen<T>(is_held ? smem_values[place] : device::load(p.values + entry));
      if (column >= static_cast<uint32_t>(p.k)) continue;
      const Input<kTokens> input = inputs[column];
      input.template visit<T>([&](int token, float x) { sums[token] = fmaf(value, x, sums[token]); });
    }
  }

  template <int kTokens>
  LOWFAT_DEVICE void multiply_pass(int first_token) const {
    for (int row = device::warp_index(); row < rows; row += kDecodeWarps) {
      float sums[kTokens] = {};
      add_row<kTokens>(row, sums);
      int number;
      const float sum = device::warp_sums(sums, number);
      if (device::lane_index() < kTokens) smem_sums[row * Config::kTokens + first_token + number] = sum;
    }
  }

  // The entries are there, and the first rows of x, for all threads.
  LOWFAT_DEVICE void multiply() const {
    with_tokens([&](auto tokens) {
      constexpr int kTokens = decltype(tokens)::value;
      for (int first = 0; first < p.m; first += kTokens) {
        if (first > 0) {
          __syncthreads();
          copy_x<kTokens>(first);
          __syncthreads();
        }
        multiply_pass<kTokens>(first);
      }
    });
  }
};

// --- from the sums to y ---

template <class Config>
LOWFAT_DEVICE void store_y(const DecodeParams& p, const low_rank::Second<Config>& second, const float* smem_sparse) {
  using T = typename Config::Element;
  const low_rank::SecondShare& mine = second.mine;
  const int count = (mine.tiles.last - mine.tiles.first) * Config::kTokens * kTileRows;
  for (int i = threadIdx.x; i < count; i += Config::kThreads) {
    const int row = i % kTileRows, token = i / kTileRows % Config::kTokens, tile = i / (kTileRows * Config::kTokens);
    const int of_block = tile * kTileRows + row, column = mine.tiles.first * kTileRows + of_block;
    if (token >= p.m || column >= p.n) continue;
    const float bias = p.bias ? device::widen<T>(second.smem_bias[of_block]) : 0;
    const float sum = low_rank::sum_of<Config>(second.smem_sums, low_rank::warps_of_tile(mine, tile), tile, token, row);
    const float sparse = smem_sparse[of_block * Config::kTokens + token];
    device::store(p.y + (int64_t{token} * p.n + column), device::narrow<T>(sum + sparse + bias));
  }
}

// --- the kernel ---

// One block to a multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) decode(const __grid_constant__ DecodeParams p) {
  low_rank::First<Config, true> first(p);
  low_rank::Second<Config> second(p);
  SparseRows<Config> sparse(p, second.mine);
  sparse.ask();
  second.prefetch();
  sparse.copy_first_x();
  first.finish(second.smem_sums);
  second.wait_before_prefetched();
  const uint64_t target = device::grid_arrive(p.counter);  // its barrier shows all threads the entries and x
  second.load_rest();
  low_rank::load_bias(p, second.mine, second.smem_bias);
  sparse.multiply();
  device::grid_wait(p.counter, target);
  low_rank::gather_h<Config>(p, p.partials, p.r, second.smem_h, p.h);
  second.multiply();
  store_y<Config>(p, second, sparse.smem_sums);
}

// --- launch ---

template <class Config>
const char* launch(const DecodePlan& plan, const DecodeParams& params, void* stream) {
  device::Launch shape;
  shape.grid = dim3(plan.grid);
  shape.threads = Config::kThreads;
  shape.smem_bytes = plan.smem_bytes;
  shape.is_cooperative = true;
  shape.stream = stream;
  return device::launch(decode<Config>, shape, params);
}

const char* launch_decode(const DecodePlan& plan, DecodeParams params, Dtype dtype, void* stream) {
  params.splits = plan.splits, params.tiles = plan.tiles, params.prefetch = plan.prefetch;
  params.tokens = plan.tokens, params.room = plan.room;
  const bool is_bf16 = dtype == Dtype::bfloat16;
  if (plan.token_tiles == 1) {
    return is_bf16 ? launch<DecodeConfig<device::Bf16, 1>>(plan, params, stream)
                   : launch<DecodeConfig<device::Fp16, 1>>(plan, params, stream);
  }
  return is_bf16 ? launch<DecodeConfig<device::Bf16, 2>>(plan, params, stream)
                 : launch<DecodeConfig<device::Fp16, 2>>(plan, params, stream);
}

}  // namespace low_rank_sparse
