// The race that decides between low_rank decode's two ways to launch: one cooperative grid, or two of which the second starts
// early. Calls in CUDA graphs, 32 in each, on weights that come from memory; the two take turns, and must agree to the bit.
//
//   decode_variants FILE      writes one JSON row for each shape and m, and prints them
//   decode_variants --once    a few calls of one shape, checked and not timed: for a sanitizer
#include "low_rank/decode.cu"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

using namespace low_rank;

constexpr int kCalls = 32, kWarmup = 3, kMostTokens = 16;
constexpr int kTokens[] = {1, 4, 8, 16};

struct Shape {
  int k, n, r;
};
constexpr Shape kShapes[] = {{4096, 4096, 512},    {4096, 4096, 1024},  {4096, 1024, 408}, {4096, 14336, 1024},
                             {14336, 4096, 1024}, {4096, 14336, 1592}, {768, 768, 192},   {768, 3072, 192},
                             {3072, 768, 192},    {384, 384, 96}};

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  fprintf(stderr, "decode_variants: %s: %s\n", what, cudaGetErrorString(code));
  exit(3);
}

template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

// Roughly normal bf16 numbers of this scale, another for every index and seed.
__global__ void fill_random(uint16_t* values, size_t count, float scale, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    uint32_t bits = static_cast<uint32_t>(i) * 2654435761u ^ seed;
    float sum = 0;
    for (int turn = 0; turn < 4; ++turn) {
      bits ^= bits << 13, bits ^= bits >> 17, bits ^= bits << 5;
      sum += static_cast<float>(bits >> 8) / (1 << 24) - 0.5f;
    }
    values[i] = device::narrow<device::Bf16>(sum * 1.732f * scale);
  }
}

// Keeps the GPU busy while the host queues what is timed.
__global__ void spin(long long cycles) {
  for (const long long start = clock64(); clock64() - start < cycles;) {
  }
}

// Everything that calls share. Weights go around in a pool; each call of each graph has a y of its own.
struct Memory {
  uint16_t *x, *pool, *y;
  float* partials;
  uint64_t* counter;
  size_t pool_count, y_count;
};

struct Graphs {
  DecodePlan plan;
  std::vector<cudaGraphExec_t> every;
};

// Where call `call` of graph `graph` has its weights; v, and behind it u.
size_t weights_at(const Memory& memory, const Shape& s, int graph, int call) {
  const size_t count = size_t{static_cast<size_t>(s.r)} * (s.k + s.n), slots = memory.pool_count / count;
  return (static_cast<size_t>(graph) * kCalls + call) % slots * count;
}

DecodePlan plan_for(const Shape& s, int m, const cudaDeviceProp& gpu, bool is_two_launches) {
  const int smem_limit = static_cast<int>(gpu.sharedMemPerBlockOptin);
  return plan_decode(m, s.n, s.k, s.r, gpu.multiProcessorCount, smem_limit, is_two_launches);
}

Graphs record(const Memory& memory, const Shape& s, int m, int graphs, bool is_two_launches, const cudaDeviceProp& gpu,
              cudaStream_t stream) {
  Graphs recorded;
  recorded.plan = plan_for(s, m, gpu, is_two_launches);
  if (recorded.plan.token_tiles == 0) return recorded;
  for (int graph = 0; graph < graphs; ++graph) {
    cudaGraph_t captured;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int call = 0; call < kCalls; ++call) {
      DecodeParams p{};
      p.x = memory.x, p.partials = memory.partials, p.counter = memory.counter;
      p.v = memory.pool + weights_at(memory, s, graph, call), p.u = p.v + size_t{static_cast<size_t>(s.r)} * s.k;
      p.y = memory.y + (static_cast<size_t>(graph) * kCalls + call) * m * s.n;
      p.m = m, p.n = s.n, p.k = s.k, p.r = s.r;
      if (const char* error = launch_decode(recorded.plan, p, Dtype::bfloat16, stream)) {
        fprintf(stderr, "decode_variants: launch: %s\n", error);
        exit(3);
      }
    }
    check(cudaStreamEndCapture(stream, &captured), "end of capture");
    cudaGraphExec_t ready;
    check(cudaGraphInstantiate(&ready, captured, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(captured), "cudaGraphDestroy");
    recorded.every.push_back(ready);
  }
  return recorded;
}

double us_of_call(cudaGraphExec_t graph, const Memory& memory, cudaStream_t stream, cudaEvent_t start, cudaEvent_t end) {
  check(cudaMemsetAsync(memory.y, 0xff, memory.y_count * 2, stream), "poison");
  spin<<<1, 1, 0, stream>>>(200000);
  check(cudaEventRecord(start, stream), "event");
  check(cudaGraphLaunch(graph, stream), "replay");
  check(cudaEventRecord(end, stream), "event");
  check(cudaEventSynchronize(end), "replay");
  float ms = 0;
  check(cudaEventElapsedTime(&ms, start, end), "event");
  return ms * 1e3 / kCalls;
}

std::vector<uint16_t> outputs(cudaGraphExec_t graph, const Memory& memory, size_t first, size_t count, cudaStream_t stream) {
  std::vector<uint16_t> y(count);
  check(cudaMemsetAsync(memory.y, 0xff, memory.y_count * 2, stream), "poison");
  check(cudaGraphLaunch(graph, stream), "replay");
  check(cudaStreamSynchronize(stream), "replay");
  check(cudaMemcpy(y.data(), memory.y + first, count * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return y;
}

double value_of(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// Elements of call 0 of graph 0 that lie outside the bound of the tests' gate G3: y in double, h and y rounded once.
int wrong_elements(const Memory& memory, const Shape& s, int m, const std::vector<uint16_t>& y) {
  std::vector<uint16_t> x(static_cast<size_t>(m) * s.k), weights(static_cast<size_t>(s.r) * (s.k + s.n));
  check(cudaMemcpy(x.data(), memory.x, x.size() * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
  check(cudaMemcpy(weights.data(), memory.pool, weights.size() * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
  const uint16_t *v = weights.data(), *u = v + static_cast<size_t>(s.r) * s.k;
  int wrong = 0;
  for (int token : {0, m - 1}) {
    std::vector<double> h(s.r);
    for (int row = 0; row < s.r; ++row) {
      const uint16_t *of_token = &x[static_cast<size_t>(token) * s.k], *of_row = v + static_cast<size_t>(row) * s.k;
      for (int i = 0; i < s.k; ++i) h[row] += value_of(of_token[i]) * value_of(of_row[i]);
    }
    for (int column = 0; column < s.n; column += 7) {
      double sum = 0, spread = 0;
      for (int i = 0; i < s.r; ++i) {
        const double term = h[i] * value_of(u[static_cast<size_t>(column) * s.r + i]);
        sum += term, spread += term * term;
      }
      const double bound = (std::fabs(sum) + 6 * std::sqrt(spread)) / 256;
      wrong += !(std::fabs(value_of(y[static_cast<size_t>(token) * s.n + column]) - sum) <= bound);  // NaN is wrong
    }
  }
  return wrong;
}

double part_of(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(share * (values.size() - 1) + 0.5)];
}

struct Race {
  double one_us, two_us, low, middle, high;
  int wrong;
  bool is_same;
};

Race race(const Memory& memory, const Shape& s, int m, int repeats, const cudaDeviceProp& gpu, cudaStream_t stream) {
  const double bytes = 2. * s.r * (s.k + s.n) * kCalls;
  const int graphs = std::max(2, static_cast<int>(std::ceil(4. * gpu.l2CacheSize / bytes)));
  const Graphs one = record(memory, s, m, graphs, false, gpu, stream), two = record(memory, s, m, graphs, true, gpu, stream);
  Race found{};
  if (one.every.empty() || two.every.empty()) return found;

  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<double> one_us, two_us, ratios;
  for (int i = -kWarmup; i < repeats; ++i) {
    // half a round apart: neither finds in the L2 cache what the other has just read
    const cudaGraphExec_t a = one.every[(i + kWarmup) % graphs], b = two.every[(i + kWarmup + graphs / 2) % graphs];
    double us[2];
    for (int turn : {0, 1}) {
      const int which = (turn + i + kWarmup) % 2;
      us[which] = us_of_call(which ? b : a, memory, stream, start, end);
    }
    if (i < 0) continue;
    one_us.push_back(us[0]), two_us.push_back(us[1]), ratios.push_back(us[1] / us[0]);
  }
  found.one_us = part_of(one_us, 0.5), found.two_us = part_of(two_us, 0.5), found.is_same = true;
  found.low = part_of(ratios, 0.25), found.middle = part_of(ratios, 0.5), found.high = part_of(ratios, 0.75);

  const size_t count = static_cast<size_t>(kCalls) * m * s.n;
  for (int graph = 0; graph < graphs; ++graph) {
    const std::vector<uint16_t> y = outputs(one.every[graph], memory, graph * count, count, stream);
    found.is_same = found.is_same && y == outputs(two.every[graph], memory, graph * count, count, stream);
    if (graph == 0) found.wrong = wrong_elements(memory, s, m, y);
  }
  for (const Graphs* all : {&one, &two}) {
    for (cudaGraphExec_t graph : all->every) check(cudaGraphExecDestroy(graph), "cudaGraphExecDestroy");
  }
  check(cudaEventDestroy(start), "event");
  check(cudaEventDestroy(end), "event");
  return found;
}

Memory allocate_all(const cudaDeviceProp& gpu) {
  Memory memory{};
  size_t most_weights = 0, most_y = 0, most_partials = 0;
  for (const Shape& s : kShapes) {
    const size_t weights = static_cast<size_t>(s.r) * (s.k + s.n);
    const double graphs = std::max(2., std::ceil(4. * gpu.l2CacheSize / (2. * weights * kCalls)));
    most_weights = std::max(most_weights, weights);
    most_y = std::max(most_y, static_cast<size_t>(graphs) * kCalls * kMostTokens * s.n);
    const size_t splits = plan_for(s, kMostTokens, gpu, false).splits;
    most_partials = std::max(most_partials, splits * kMostTokens * s.r);
  }
  memory.pool_count = std::max(most_weights * kCalls, size_t{4} * gpu.l2CacheSize), memory.y_count = most_y;
  memory.pool = allocate<uint16_t>(memory.pool_count);
  memory.x = allocate<uint16_t>(kMostTokens * 14336);
  memory.y = allocate<uint16_t>(most_y);
  memory.partials = allocate<float>(most_partials);
  memory.counter = allocate<uint64_t>(1);
  fill_random<<<1024, 256>>>(memory.pool, memory.pool_count, 0.02f, 17);
  fill_random<<<1024, 256>>>(memory.x, kMostTokens * 14336, 1, 23);
  check(cudaDeviceSynchronize(), "fill_random");
  return memory;
}

cudaStream_t new_stream() {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  return stream;
}

int run_once(const cudaDeviceProp& gpu) {
  const cudaStream_t stream = new_stream();
  const Memory memory = allocate_all(gpu);
  check(cudaMemset(memory.counter, 0, 8), "counter");
  check(cudaDeviceSynchronize(), "counter");
  const Race found = race(memory, {768, 768, 192}, 16, 1, gpu, stream);
  printf("one launch and two: %s, %d wrong elements\n", found.is_same ? "the same bits" : "BITS DIFFER", found.wrong);
  return found.is_same && found.wrong == 0 ? 0 : 1;
}

int race_all(const char* path, const cudaDeviceProp& gpu) {
  FILE* file = fopen(path, "w");
  if (!file) return perror(path), 2;
  const cudaStream_t stream = new_stream();
  const Memory memory = allocate_all(gpu);
  double logs = 0;
  int rows = 0, bad = 0;
  fprintf(file, "[");
  printf("%-20s %2s %9s %9s %s\n", "k -> n, rank", "m", "one us", "two us", "two / one (quartiles)");
  for (const Shape& s : kShapes) {
    for (int m : kTokens) {
      check(cudaMemset(memory.counter, 0, 8), "counter");  // grids of another size come now
      check(cudaDeviceSynchronize(), "counter");
      const Race found = race(memory, s, m, 101, gpu, stream);
      if (found.one_us == 0) continue;
      const bool is_good = found.is_same && found.wrong == 0;
      bad += !is_good;
      logs += std::log(found.middle);
      fprintf(file,
              "%s\n{\"k\": %d, \"n\": %d, \"r\": %d, \"m\": %d, \"one_launch_us\": %.3f, \"two_launches_us\": %.3f, "
              "\"two_over_one\": %.4f, \"low\": %.4f, \"high\": %.4f, \"same_bits\": %s, \"wrong_elements\": %d}",
              rows++ ? "," : "", s.k, s.n, s.r, m, found.one_us, found.two_us, found.middle, found.low, found.high,
              found.is_same ? "true" : "false", found.wrong);
      char name[32];
      snprintf(name, sizeof name, "%d -> %d, %d", s.k, s.n, s.r);
      printf("%-20s %2d %9.2f %9.2f %.3f (%.3f to %.3f)%s\n", name, m, found.one_us, found.two_us, found.middle, found.low,
             found.high, is_good ? "" : found.wrong ? "  WRONG" : "  BITS DIFFER");
    }
  }
  fprintf(file, "\n]\n");
  if (rows) printf("two launches take %.3f of one launch's time, geometric mean of %d\n", std::exp(logs / rows), rows);
  return fclose(file) == 0 && rows && !bad ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return fprintf(stderr, "usage: decode_variants FILE or --once\n"), 2;
  cudaDeviceProp gpu;
  check(cudaGetDeviceProperties(&gpu, 0), "device 0");
  return strcmp(arguments[1], "--once") ? race_all(arguments[1], gpu) : run_once(gpu);
}
