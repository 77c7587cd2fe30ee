// What the backward kernels' tests share: gradients in double, and how near the kernels' have to be.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"
#include "device/convert.h"

namespace gradient_truth {

using Bits = std::vector<uint16_t>;
using Wide = std::vector<double>;

// In double: what the kernels wrote, or ought to have written. dx, dv, du, db; empty where not wanted.
struct Gradients {
  Wide dx, dv, du, db;
  std::vector<std::pair<const char*, Wide*>> all() { return {{"dx", &dx}, {"dv", &dv}, {"du", &du}, {"db", &db}}; }
};

template <class T>
Wide wide(const Bits& bits) {
  Wide values(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) values[i] = device::widen<T>(bits[i]);
  return values;
}

template <class T>
Bits narrowed(const Wide& values) {
  Bits bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) bits[i] = device::narrow<T>(static_cast<float>(values[i]));
  return bits;
}

template <class T>
Wide rounded(const Wide& values) {
  return wide<T>(narrowed<T>(values));
}

inline Wide mapped(Wide values, double (*f)(double)) {
  for (double& one : values) one = f(one);
  return values;
}
inline Wide absolute(const Wide& values) { return mapped(values, [](double v) { return std::fabs(v); }); }
inline Wide squared(const Wide& values) { return mapped(values, [](double v) { return v * v; }); }

// The norm of the error, relative to what it is of, over many shapes: ours may be a quarter above that of two plain steps.
struct Errors {
  double ours = 0, plain = 0;
  void add(const Wide& found, const Wide& plainly, const Wide& exact) {
    double size = 0, mine = 0, theirs = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      size += exact[i] * exact[i];
      mine += (found[i] - exact[i]) * (found[i] - exact[i]);
      theirs += (plainly[i] - exact[i]) * (plainly[i] - exact[i]);
    }
    ours += mine / size, plain += theirs / size;
  }
  void pass(const char* what) const {
    if (!(std::sqrt(ours) <= 1.25 * std::sqrt(plain))) check::equal(std::sqrt(ours), std::sqrt(plain), what);
  }
};

constexpr int kAll = 15;

inline bool is_same(Gradients a, Gradients b) {  // also NaN
  for (size_t which = 0; which < 4; ++which) {
    const Wide &one = *a.all()[which].second, &other = *b.all()[which].second;
    if (one.size() != other.size()) return false;
    if (!one.empty() && memcmp(one.data(), other.data(), one.size() * 8)) return false;
  }
  return true;
}

// fp16 differs in an instruction and in how it is rounded: it runs once. So does all under AddressSanitizer.
template <class T>
bool has_run(uint64_t seed) {
#ifdef __SANITIZE_ADDRESS__
  return seed > 1;
#endif
  return std::is_same<T, device::Fp16>::value && seed > 1;
}

}  // namespace gradient_truth
