// dictionary on a GPU for a few rows of x: y = (x d^T) s^T + bias in one pass over the weights, h = x d^T rounded once,
// where of the coefficients s those that a bitmap names are stored.
//
//   x [m, k]   d [a, k]   values [n, stored]   mask [n, ceil(a / 32)]   bias [n]   h [m, a]   y [m, n]
//   m <= 16, n and a multiples of 8, bf16 or fp16, one block, rows of x and d 16-byte aligned
//
// The steps of low_rank's decode kernel (low_rank/decode_steps.h): the dictionary is its first factor. The second one comes
// packed: the values of neighbouring rows are one run of memory, as are their bitmaps, so a block copies those of its tiles
// to shared memory as they lie, before h is there. What is kept in front of each word of a bitmap is counted once; then a
// lane finds the eight coefficients that it multiplies by the bits in front of them, and zeros where there are none.
//
//   mask    0110 1001 ...   lowest bit first        a block: neighbouring tiles of 16 rows, as many as fit at a time
//   values  3 7  5 2  ...                           a warp: neighbouring (tile, word) items of the chunk
//   s      .37.  5..2  ...
//
// All sums are added in an order that the sizes alone decide: the same inputs give the same bits. A wrong mask gives wrong
// numbers and no access outside: a row has no more than its values.
//
// Compiled for sm_80, sm_90a and as PTX, and run by tests in an emulator; it HAS NEVER RUN ON A GPU, no speed is claimed.
#include "device/bits.h"
#include "device/grid.h"
#include "device/launch.h"
#include "dictionary/dictionary_cuda.h"
#include "low_rank/decode_steps.h"

namespace dictionary {

template <class T, int kTileCount>
struct ForwardConfig : low_rank::DecodeSizes<T, kTileCount>, low_rank::SingleForm<ForwardParams> {
  static_assert(low_rank::kDecodeThreads == kTileRows * kCountParts, "a thread counts a part of a row of a tile");
};

// A block's coefficients and what it does with them.
template <class Config>
struct Coefficients {
  const ForwardParams& p;
  const Row row;
  const Range tiles;  // of the block
  const int chunks;
  float* smem_sums;
  uint16_t* smem_h;
  uint16_t* smem_parts;
  uint16_t* smem_counts;
  uint8_t* smem_chunks;

  LOWFAT_DEVICE explicit Coefficients(const ForwardParams& params)
      : p(params),
        row{params.r, params.stored},
        tiles(share(parts_of(params.n, kTileRows), gridDim.x, blockIdx.x)),
        chunks(chunks_of(tiles, params.at_once)) {
    uint8_t* smem = device::shared_memory();
    const ForwardMemory at = forward_memory(Config::kTokenTiles, row, p.at_once, p.buffers);
    smem_sums = reinterpret_cast<float*>(smem);
    smem_h = reinterpret_cast<uint16_t*>(smem + at.h);
    smem_parts = reinterpret_cast<uint16_t*>(smem + at.parts);
    smem_counts = reinterpret_cast<uint16_t*>(smem + at.counts);
    smem_chunks = smem + at.chunks;
  }

  LOWFAT_DEVICE int rows_of(const Range& chunk) const {
    return smaller(chunk.last * kTileRows, p.n) - chunk.first * kTileRows;
  }
  LOWFAT_DEVICE uint16_t* values_of(int number) const {
    return reinterpret_cast<uint16_t*>(smem_chunks + number % p.buffers * p.at_once * row.tile_bytes());
  }
  LOWFAT_DEVICE uint32_t* mask_of(int number) const {
    return reinterpret_cast<uint32_t*>(values_of(number) + p.at_once * kTileRows * row.stored);
  }

  // Starts copying a chunk, if there is one, as a group of copies.
  LOWFAT_DEVICE void ask_for(int number) {
    if (number < chunks) {
      const Range chunk = chunk_of(tiles, p.at_once, number);
      const int64_t first = chunk.first * kTileRows;
      copy_run(values_of(number), p.values + first * row.stored, rows_of(chunk) * row.stored);
      copy_run(mask_of(number), p.mask + first * row.words(), rows_of(chunk) * row.words());
    }
    device::commit_copies();
  }
  template <class Element>
  LOWFAT_DEVICE static void copy_run(Element* smem, const Element* gmem, int count) {
    constexpr int kOfPiece = 16 / sizeof(Element);
    for (int i = threadIdx.x * kOfPiece; i < count; i += Config::kThreads * kOfPiece) {
      device::copy16_async(smem + i, gmem + i);
    }
  }

  // How many values are in front of each word of a row. The chunk is there, for all threads.
  LOWFAT_DEVICE void count(int number) {
    const Range chunk = chunk_of(tiles, p.at_once, number);
    const int of_tile = threadIdx.x / kCountParts, part = threadIdx.x % kCountParts, words = row.words();
    const Range mine = words_of_part(row, part);
    for (int tile = 0; tile < chunk.last - chunk.first; ++tile) {
      const int at = tile * kTileRows + of_tile;
      const uint32_t* mask = mask_of(number) + at * words;
      const bool is_row = at < rows_of(chunk);
      int bits = 0;
      for (int word = mine.first; is_row && word < mine.last; ++word) bits += device::popcount(mask[word]);
      smem_parts[threadIdx.x] = static_cast<uint16_t>(bits);
      __syncthreads();
      int before = 0;
      for (int i = 0; i < part; ++i) before += smem_parts[of_tile * kCountParts + i];
      uint16_t* counts = smem_counts + at * words;
      for (int word = mine.first; is_row && word < mine.last; ++word) {
        counts[word] = static_cast<uint16_t>(before);
        before += device::popcount(mask[word]);
      }
      __syncthreads();  // the next tile's parts go where these were; and counts are there
    }
  }

  // A lane's eight coefficients of a row of the chunk, as they lie in a dense one. Past the last row they are what shared
  // memory holds, and nobody stores their sums.
  LOWFAT_DEVICE uint4 expanded(int number, int at, int word) const {
    const uint32_t bits = mask_of(number)[at * row.words() + word];
    const int column = low_rank::lane_column(device::lane_index());
    const uint16_t* values = values_of(number) + at * row.stored;
    int next = smem_counts[at * row.words() + word] + device::popcount(bits & ((1u << column) - 1));
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t of_two[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool is_kept = (bits >> (column + 2 * i + j) & 1) && next < row.stored;
        of_two[j] = is_kept ? values[next] : 0;
        next += is_kept;
      }
      pairs[i] = of_two[0] | of_two[1] << 16;
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }

  // The warp's items of a chunk, in order. h is there, and the chunk is counted.
  LOWFAT_DEVICE void multiply(int number) {
    const Range chunk = chunk_of(tiles, p.at_once, number);
    const SecondShare items = items_of_chunk(chunk, row);
    const int warp = device::warp_index(), lane = device::lane_index(), stride = low_rank::h_stride(p.r);
    const Range mine = low_rank::warp_items(items, warp);
    const uint16_t* smem_lane = smem_h + low_rank::lane_row(lane) * stride + low_rank::lane_column(lane);
    low_rank::Sums<Config> sums;
    low_rank::clear<Config>(sums);
    for (int item = mine.first; item < mine.last; ++item) {
      const int tile = item / items.steps, step = item % items.steps;
      const int at = tile * kTileRows + low_rank::lane_row(lane);
      const uint4 upper = expanded(number, at, step), lower = expanded(number, at + 8, step);
      uint4 h[Config::kTokenTiles];
#pragma unroll
      for (int tokens = 0; tokens < Config::kTokenTiles; ++tokens) {
        const bool is_token = tokens * kTokenTile + low_rank::lane_row(lane) < p.m;  // the other rows of h were not written
        h[tokens] = is_token ? device::load16_shared(smem_lane + tokens * kTokenTile * stride + step * kStep)
                             : device::zero16();
      }
      low_rank::multiply<Config>(sums, upper, lower, h);
      if (step == items.steps - 1 || item == mine.last - 1) {
        low_rank::store_sums<Config>(
            smem_sums + low_rank::slot_of(tile, warp) * low_rank::slot_floats(Config::kTokenTiles), sums);
        low_rank::clear<Config>(sums);
      }
    }
  }

  LOWFAT_DEVICE void store_y(int number) const {
    using T = typename Config::Element;
    const Range chunk = chunk_of(tiles, p.at_once, number);
    const SecondShare items = items_of_chunk(chunk, row);
    const int count = (chunk.last - chunk.first) * Config::kTokens * kTileRows;
    for (int i = threadIdx.x; i < count; i += Config::kThreads) {
      const int at = i % kTileRows, token = i / kTileRows % Config::kTokens, tile = i / (kTileRows * Config::kTokens);
      const int column = (chunk.first + tile) * kTileRows + at;
      if (token >= p.m || column >= p.n) continue;
      const float bias = p.bias ? device::widen<T>(device::load(p.bias + column)) : 0;
      const float sum = low_rank::sum_of<Config>(smem_sums, low_rank::warps_of_tile(items, tile), tile, token, at);
      device::store(p.y + (int64_t{token} * p.n + column), device::narrow<T>(sum + bias));
    }
  }
};

// One block to a multiprocessor.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) forward(const __grid_constant__ ForwardParams p) {
  low_rank::First<Config, true> first(p);
  Coefficients<Config> coefficients(p);
  coefficients.ask_for(0);
  coefficients.ask_for(1);  // in the other buffer, where there are two chunks
  first.finish(coefficients.smem_sums);
  const uint64_t target = device::grid_arrive(p.counter);
  for (int number = 0; number < larger(1, coefficients.chunks); ++number) {
    device::wait_copies<1>();
    __syncthreads();
    if (number < coefficients.chunks) coefficients.count(number);
    if (number == 0) {
      device::grid_wait(p.counter, target);
      low_rank::gather_h<Config>(p, p.partials, p.r, coefficients.smem_h, p.h);
      __syncthreads();
    }
    if (number >= coefficients.chunks) break;
    coefficients.multiply(number);
    __syncthreads();
    coefficients.store_y(number);
    coefficients.ask_for(number + 2);  // where this one was, that everybody has multiplied
  }
  device::wait_copies<0>();
}

// --- launch ---

template <class Config>
const char* launch(const ForwardPlan& plan, const ForwardParams& params, void* stream) {
  device::Launch shape;
  shape.grid = dim3(plan.grid);
  shape.threads = Config::kThreads;
  shape.smem_bytes = plan.smem_bytes;
  shape.is_cooperative = true;
  shape.stream = stream;
  return device::launch(forward<Config>, shape, params);
}

const char* launch_forward(const ForwardPlan& plan, ForwardParams params, Dtype dtype, void* stream) {
  params.splits = plan.splits, params.at_once = plan.at_once, params.buffers = plan.buffers;
  const bool is_bf16 = dtype == Dtype::bfloat16;
  if (plan.token_tiles == 1) {
    return is_bf16 ? launch<ForwardConfig<device::Bf16, 1>>(plan, params, stream)
                   : launch<ForwardConfig<device::Fp16, 1>>(plan, params, stream);
  }
  return is_bf16 ? launch<ForwardConfig<device::Bf16, 2>>(plan, params, stream)
                 : launch<ForwardConfig<device::Fp16, 2>>(plan, params, stream);
}

}  // namespace dictionary
