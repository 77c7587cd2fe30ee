// What the CPU parts of low_rank_sparse share.   y = (scale u v + S) x + bias   x [m, k]   y [m, n]   S in rows (CSR)
#pragma once

#include <cstdint>

#include "cpu/lines.h"
#include "cpu/product.h"

namespace low_rank_sparse {

enum class CpuPath { empty, decode, split, materialize, library };

struct CpuConfig {
  CpuPath path = CpuPath::library;
  int64_t first_grain = 0;   // decode: row tiles of v per task; 0: one thread does all
  int64_t second_grain = 0;  // decode: row tiles of u and S per task
};

CpuConfig choose_cpu_config(const Problem& problem);

// S as the kernels read it: nothing in it leads outside of any tensor.
struct Entries {
  const int32_t* bounds;  // [rows + 1]: row i has the entries bounds[i] to bounds[i + 1]
  const int32_t* places;  // the input of each entry
  const float* values;
};

// --- decode: a handful of tokens, S goes by once ---

struct Gather {
  const void* values;   // float or bf16, as x's dtype
  const void* columns;  // int16 or int32, unchecked: an entry whose column there is not is left out
  const int32_t* bounds;
  int64_t k;
};

struct GatherKernel {
  int64_t tokens;  // side by side in x as it is packed: m or more
  // from [m, columns], a row every from_row elements -> to [columns, tokens], zeros where there is no token.
  void (*pack)(const void* from, int64_t from_row, int64_t m, int64_t columns, float* to);
  // Rows from first_row on, up to last_row: sums [ceil(rows / 4), kMostTokens, 4], as cpu::Product's `added`.
  void (*sum)(const Gather& s, const float* x, int64_t m, int64_t first_row, int64_t last_row, float* sums);
};

// --- many tokens: they lie side by side, and inner loops run over them ---

constexpr int64_t kBlockTokens = 64;  // of a block: 256 bytes, so that 4096 inputs are 1 MB and stay in L2

struct TokensKernel {
  // from [tokens, columns], a row every from_row -> to [columns, kBlockTokens], zeros where there is no token.
  void (*pack)(const float* from, int64_t from_row, int64_t tokens, int64_t columns, float* to);
  // y += x S^T, for rows of S from first_row to last_row. x: a block; y [tokens, rows], a row of it every y_row.
  void (*add_rows)(const Entries& s, const float* x, int64_t tokens, int64_t first_row, int64_t last_row, float* y,
                   int64_t y_row);
  // to[e] += the inner product of dy's row with x's, for all entries e of the same rows. dy, x: a block each.
  void (*add_products)(const Entries& s, const float* dy, const float* x, int64_t first_row, int64_t last_row, float* to);
};

struct Kernels {
  TokensKernel tokens;
  GatherKernel (*gather)(Dtype dtype, bool is_narrow, int64_t m);
};

const Kernels& kernels_of(CpuLevel level);

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace low_rank_sparse
