// Faults that a sanitizer must find: shows, in the run that finds none in our kernels, that the tool works on this machine.
//
//   planted_faults out-of-bounds | race
#include <cstdio>
#include <cstring>

__global__ void write_past_the_end(int* values, int count) { values[count + threadIdx.x] = 1; }

__global__ void read_before_a_barrier(int* values) {
  __shared__ int shared[64];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  values[threadIdx.x] = shared[63 - threadIdx.x];  // of another warp: needs __syncthreads()
}

int main(int count, char** arguments) {
  int* values = nullptr;
  if (count != 2 || cudaMalloc(&values, 64 * sizeof(int)) != cudaSuccess) return 2;
  if (!strcmp(arguments[1], "race")) {
    read_before_a_barrier<<<1, 64>>>(values);
  } else {
    write_past_the_end<<<1, 64>>>(values, 64);
  }
  printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
