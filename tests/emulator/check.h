// Cases of a test executable: each runs once per seed, prints one line, and passes unless it throws.
#pragma once

#include <chrono>
#include <initializer_list>

#include "emulator.h"

namespace check {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Case {
  const char* name;
  void (*run)(uint64_t seed);
};

inline void equal(double found, double expected, const char* what, long long index = 0) {
  if (found == expected || (found != found && expected != expected)) return;
  throw Failure(emulator::text("%s [%lld] is %.9g, expected %.9g", what, index, found, expected));
}

inline void that(bool holds, const char* what, long long index = 0) {
  if (!holds) throw Failure(emulator::text("not true: %s [%lld]", what, index));
}

// The emulator must stop `run` with a report that contains `words`.
template <class Run>
void reports(const char* words, const Run& run) {
  try {
    run();
  } catch (const emulator::Report& report) {
    if (strstr(report.what(), words)) return;
    throw Failure(emulator::text("expected a report of '%s', found: %s", words, report.what()));
  }
  throw Failure(emulator::text("no report of '%s'", words));
}

// main() of a test: --kernels also prints the mangled names of the kernels that ran, --until-failure ends with the first.
inline int run(int count, char** arguments, std::initializer_list<Case> cases, uint64_t seeds = 3) {
  const auto is_asked = [&](const char* option) { return count > 1 && !strcmp(arguments[1], option); };
  int failures = 0;
  for (const Case& one : cases) {
    for (uint64_t seed = 1; seed <= seeds; ++seed) {
      if (failures && is_asked("--until-failure")) return 1;
      const auto start = std::chrono::steady_clock::now();
      std::string error;
      try {
        one.run(seed);
      } catch (const std::exception& exception) {
        error = exception.what();
        ++failures;
      }
      const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
      printf("%s %s, seed %llu, %.1f ms%s%s\n", error.empty() ? "pass" : "FAIL", one.name, (unsigned long long)seed, ms,
             error.empty() ? "" : ": ", error.c_str());
    }
  }
  if (is_asked("--kernels")) {
    for (const std::string& name : emulator::machine.kernels_run) printf("kernel %s\n", name.c_str());
  }
  return failures ? 1 : 0;
}

}  // namespace check
