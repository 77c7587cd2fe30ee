// Decode for any CPU: no instruction beyond the compiler's baseline (SSE2 or NEON through the compiler's own 4-wide
// vectors).
#include "cpu/masked.h"
#include "cpu/positions.h"

namespace cpu {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t Bits4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

struct Four {
  float sums[4];
};

template <class Element>
struct Scalar : Packed<Scalar<Element>, 4> {
  static constexpr int kRows = 4, kTokens = 2, kTogether = 1, kStep = 4, kParts = 1;
  using Weight = Element;
  struct Wide {
    Float4 part[1];
  };
  using Sum = Float4;

  static Sum zero() { return Float4{}; }
  static Float4 load4(const float* p) {
    Float4 wide;
    __builtin_memcpy(&wide, p, sizeof(wide));
    return wide;
  }
  static Float4 load4(const uint16_t* p) {
    Half4 half;
    __builtin_memcpy(&half, p, sizeof(half));
    return reinterpret_cast<Float4>(__builtin_convertvector(half, Bits4) << 16);
  }
  static Wide load(const Element* p) { return {{load4(p)}}; }
  static Wide load_tail(const Element* p, int64_t count) {
    Element padded[kStep] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
    return load(padded);
  }
  template <int>
  static Float4 load_x(const float* p, int64_t) { return load4(p); }
  static Float4 load_part(const float* from) { return load4(from); }
  static void store_part(float* to, Float4 part) { __builtin_memcpy(to, &part, sizeof(part)); }
  static Sum multiply_add(Float4 w, Float4 x, Sum sum) { return sum + w * x; }
  template <int>
  static Four reduce(const Sum (*tokens)[4]) {
    const Sum(&v)[4] = *tokens;
    Four all;
    for (int i = 0; i < 4; ++i) all.sums[i] = (v[i][0] + v[i][1]) + (v[i][2] + v[i][3]);
    return all;
  }
  static Four scaled(const Four& all, float scale) {
    Four product;
    for (int i = 0; i < 4; ++i) product.sums[i] = scale * all.sums[i];
    return product;
  }
  static Four add_partial(const Four& all, const float* partial) {
    Four total;
    for (int i = 0; i < 4; ++i) total.sums[i] = all.sums[i] + partial[i];
    return total;
  }
  static void keep_partial(float* partial, const Four& all) { __builtin_memcpy(partial, all.sums, sizeof(all.sums)); }
  static void store(Element* y, int64_t, const Four& all, const Element* bias, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) store_one(y + i, all.sums[i], bias ? bias + i : nullptr);
  }
};

template <class Element>
struct Expand {
  static int count(uint32_t bits) { return 0x4332322132212110 >> (4 * bits) & 15; }  // of four bits: a digit for each of 16
  static typename Scalar<Element>::Wide expand(uint32_t bits, const Element* values) {
    Element spread[4];
    for (uint32_t lane = 0, next = 0; lane < 4; ++lane) {
      spread[lane] = bits >> lane & 1 ? values[next] : Element{0};
      next += bits >> lane & 1;
    }
    return Scalar<Element>::load(spread);
  }
};

}  // namespace

Kernel masked_kernel_scalar(Dtype dtype, int64_t m) {
  return dtype == Dtype::float32 ? masked_kernel_of<Scalar<float>, Expand<float>>(m)
                                 : masked_kernel_of<Scalar<uint16_t>, Expand<uint16_t>>(m);
}

Kernel kernel_scalar(Dtype dtype) {
  return dtype == Dtype::float32 ? kernel_of<Scalar<float>>() : kernel_of<Scalar<uint16_t>>();
}

Kernel positions_kernel_scalar(Dtype dtype, int64_t m) {
  return dtype == Dtype::float32 ? positions_kernel_of<float>(m) : positions_kernel_of<uint16_t>(m);
}

}  // namespace cpu
