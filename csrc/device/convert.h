// Element types of 16 bits as kernels hold them: a tag, and the bits in a uint16_t, two in a uint32_t (the lower one first).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device/simt.h"

namespace device {

struct Bf16 {};
struct Fp16 {};

// One element to float, exactly.
template <class T>
LOWFAT_DEVICE float widen(uint16_t bits);

template <>
LOWFAT_DEVICE float widen<Bf16>(uint16_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(uint32_t{bits} << 16);
#else
  const uint32_t shifted = uint32_t{bits} << 16;
  float value;
  memcpy(&value, &shifted, 4);
  return value;
#endif
}

template <>
LOWFAT_DEVICE float widen<Fp16>(uint16_t bits) {
#ifdef __CUDACC__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float value = std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
  if (exponent == 31) value = fraction ? NAN : INFINITY;
  return bits >> 15 ? -value : value;
#endif
}

// A float to the nearest element, ties to even; NaN becomes the one NaN 0x7fff.
template <class T>
LOWFAT_DEVICE uint16_t narrow(float value);

template <>
LOWFAT_DEVICE uint16_t narrow<Bf16>(float value) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  if (value != value) return 0x7fff;
  uint32_t wide;
  memcpy(&wide, &value, 4);
  return static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
#endif
}

template <>
LOWFAT_DEVICE uint16_t narrow<Fp16>(float value) {
#ifdef __CUDACC__
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  if (value != value) return 0x7fff;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size >= 65520.f) return sign | 0x7c00;  // halfway between the largest element and the next power of two
  int exponent;
  std::frexp(size, &exponent);  // size = [0.5, 1) 2^exponent
  if (exponent < -13 || size == 0) exponent = -13;  // zero and the subnormals share the smallest exponent
  const int fraction =
      static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 1024..2048, or less if subnormal
  return sign | static_cast<uint16_t>((exponent + 13) * 1024 + fraction);  // a fraction of 2048 carries into the exponent
#endif
}

// Two floats to two elements in one register, lo in the lower half: one instruction on the GPU.
template <class T>
LOWFAT_DEVICE uint32_t pack2(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t bits;
  if constexpr (std::is_same<T, Bf16>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  }
  return bits;
#else
  return narrow<T>(lo) | uint32_t{narrow<T>(hi)} << 16;
#endif
}

// The two elements of a register; x is the lower one.
template <class T>
LOWFAT_DEVICE float2 unpack2(uint32_t bits) {
  return make_float2(widen<T>(static_cast<uint16_t>(bits)), widen<T>(static_cast<uint16_t>(bits >> 16)));
}

}  // namespace device
