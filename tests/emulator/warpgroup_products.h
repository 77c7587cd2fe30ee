// wgmma: products of a warpgroup that read shared memory and write registers late.
//
// A product takes place when its group is waited for. Until then the accumulators hold NaN, and A and B are whatever shared
// memory holds in the end: releasing a buffer or reading a result too early gives wrong results.
#pragma once

#include <deque>

#include "device/convert.h"
#include "warp.h"

namespace emulator {

// The 128 threads' registers of one accumulator, kept here while products are under way.
struct Accumulator {
  float* d[128];
  int count;  // per thread
  std::vector<float> values;  // [128][count]
  int in_flight = 0;
};

struct Product {
  std::shared_ptr<Accumulator> accumulator;
  uint64_t a, b;
  int n;
  bool is_a_mn, is_b_mn, is_adding;
  float (*widen)(uint16_t);
  int group;
};

struct WarpgroupProducts {
  bool is_fenced = false;
  int groups = 0;  // committed so far
  std::deque<Product> queue;
};

inline WarpgroupProducts& warpgroup_products() {
  auto& products = current_block().products[current().thread / 128];
  if (!products) products = std::make_shared<WarpgroupProducts>();
  return *products;
}

// Bytes of a tile's row: 128, 64 or 32, by the descriptor's swizzle.
inline int row_bytes_of(uint64_t descriptor) { return 256 >> (descriptor >> 62); }

// i_count: how many i's the product takes of this operand.
inline void check_descriptor(uint64_t descriptor, bool is_mn, int i_count) {
  const int layout = static_cast<int>(descriptor >> 62), row_bytes = row_bytes_of(descriptor);
  if (layout == 0) fail("wgmma: the descriptor's layout is 0, not the 128-byte swizzle nor a narrow one");
  if (layout != 1 && (!is_mn || i_count * 2 != row_bytes)) {
    fail("wgmma: the descriptor's layout is %d, rows of %d bytes, for %d elements of a %s operand", layout, row_bytes, i_count,
         is_mn ? "MN-major" : "K-major");
  }
  if (descriptor >> 49 & 7) fail("wgmma: the descriptor has a base offset");
  if ((descriptor << 4 & 0x3ffff) / 128 % (8 * row_bytes / 128)) {
    fail("wgmma: the descriptor starts inside of an 8-row atom (0x%x)", static_cast<unsigned>(descriptor << 4 & 0x3ffff));
  }
}

// Element (i, k) of an operand, i along m or n. K-major: rows i of 128 bytes, eight rows to an atom, atoms one stride apart.
// MN-major: rows k of 64 i's (of 32 or 16, where that is all), eight rows to an atom; atoms of the next eight k's one stride
// apart, of the next 64 i's one leading distance apart. The swizzle exchanges bits of the address.
inline uint16_t read_element(Block& block, uint64_t descriptor, bool is_mn, int i, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const int bytes = row_bytes_of(descriptor), in_row = bytes / 2;
  const uint32_t plain = start + (is_mn ? i / in_row * leading + i % in_row * 2 + k / 8 * stride + k % 8 * bytes
                                        : i / 8 * stride + i % 8 * bytes + k * 2);
  const uint8_t* element = shared_pointer(block, plain ^ (plain >> 7 & (bytes / 16 - 1)) << 4);
  if (!is_shared(block, element, 2)) fail("wgmma: reads outside of shared memory, at 0x%x", plain);
  uint16_t bits;
  memcpy(&bits, element, 2);
  return bits;
}

inline void execute(const Product& product) {
  static float a[64][16], b[16][256];  // one product at a time; too large for an emulated thread's stack
  Block& block = current_block();
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 64; ++i) a[i][k] = product.widen(read_element(block, product.a, product.is_a_mn, i, k));
    for (int i = 0; i < product.n; ++i) b[k][i] = product.widen(read_element(block, product.b, product.is_b_mn, i, k));
  }
  static double sums[256];
  Accumulator& d = *product.accumulator;
  for (int row = 0; row < 64; ++row) {
    // Row `row` belongs to four lanes of warp row / 16; each has two neighbouring columns of every eight.
    const int first_thread = row / 16 * 32 + row % 8 * 4, upper = row % 16 / 8 * 2;
    auto value = [&](int column) -> float& {
      return d.values[(first_thread + column % 8 / 2) * d.count + column / 8 * 4 + upper + column % 2];
    };
    for (int column = 0; column < product.n; ++column) sums[column] = product.is_adding ? value(column) : 0.;
    for (int k = 0; k < 16; ++k) {
      const double factor = a[row][k];
      for (int column = 0; column < product.n; ++column) sums[column] += factor * b[k][column];
    }
    for (int column = 0; column < product.n; ++column) value(column) = static_cast<float>(sums[column]);
  }
}

struct WgmmaLane {
  float* d;
  uint64_t a, b;
  bool is_adding;
};

inline std::shared_ptr<Accumulator> accumulator_of(WarpgroupProducts& products, WgmmaLane** lanes, int count) {
  for (Product& product : products.queue) {
    if (product.accumulator->d[0] != lanes[0]->d) continue;
    if (product.accumulator->count != count) fail("wgmma: one accumulator for products of different n");
    return product.accumulator;
  }
  auto accumulator = std::make_shared<Accumulator>();
  accumulator->count = count;
  accumulator->values.resize(128 * count);
  for (int thread = 0; thread < 128; ++thread) {
    accumulator->d[thread] = lanes[thread]->d;
    memcpy(&accumulator->values[thread * count], lanes[thread]->d, count * sizeof(float));
    memset(lanes[thread]->d, 0xff, count * sizeof(float));
  }
  return accumulator;
}

template <class T>
void wgmma(int n, bool is_a_mn, bool is_b_mn, float* d, uint64_t a, uint64_t b, bool is_adding) {
  WgmmaLane values{d, a, b, is_adding};
  meet_warpgroup("wgmma", n, values, [&](WgmmaLane** lanes) {
    for (int thread = 1; thread < 128; ++thread) {
      const WgmmaLane &one = *lanes[thread], &first = *lanes[0];
      if (one.a != first.a || one.b != first.b || one.is_adding != first.is_adding) {
        fail("wgmma: threads 0 and %d of the warpgroup pass different descriptors", thread);
      }
    }
    check_descriptor(a, is_a_mn, 64);
    check_descriptor(b, is_b_mn, n);
    WarpgroupProducts& products = warpgroup_products();
    if (!products.is_fenced) fail("wgmma: no wgmma_fence before the first product of a group");
    products.queue.push_back(
        {accumulator_of(products, lanes, n / 2), a, b, n, is_a_mn, is_b_mn, is_adding, device::widen<T>, products.groups});
    ++products.queue.back().accumulator->in_flight;
    ++current_block().products_in_flight[current().thread / 128];
  });
}

inline void wgmma_fence() {
  int nothing = 0;
  meet_warpgroup("wgmma_fence", 0, nothing, [](int**) { warpgroup_products().is_fenced = true; });
}

inline void wgmma_commit() {
  int nothing = 0;
  meet_warpgroup("wgmma_commit", 0, nothing, [](int**) {
    warpgroup_products().is_fenced = false;
    ++warpgroup_products().groups;
  });
}

inline void wgmma_wait(int groups_left) {
  int nothing = 0;
  meet_warpgroup("wgmma_wait", groups_left, nothing, [groups_left](int**) {
    WarpgroupProducts& products = warpgroup_products();
    while (!products.queue.empty() && products.queue.front().group < products.groups - groups_left) {
      execute(products.queue.front());
      Accumulator& d = *products.queue.front().accumulator;
      if (--d.in_flight == 0) {
        for (int thread = 0; thread < 128; ++thread)
          memcpy(d.d[thread], &d.values[thread * d.count], d.count * sizeof(float));
      }
      products.queue.pop_front();
      --current_block().products_in_flight[current().thread / 128];
    }
  });
}

// setmaxnreg moves registers between warpgroups; here it only has to be executed by a whole one.
inline void set_registers(const char* what, int count) {
  int nothing = 0;
  meet_warpgroup(what, count, nothing, [](int**) {});
}

}  // namespace emulator
