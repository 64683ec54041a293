// Sums over the threads of a block and down the columns of a matrix, in a fixed order: the same bits on every run.
#pragma once

#include <cuda_runtime.h>

#include "launch.cuh"

namespace dlkernels {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kColumns = 32, kGroups = 16;  // of a block: a group of threads takes every kGroups-th row

// The sum of `value` over the warp, in lane 0.
template <class T>
__device__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kAllLanes, value, distance);
  }
  return value;
}

// The sum of `value` over a block of THREADS, in thread 0. All threads of the block must call it.
template <int THREADS, class T>
__device__ T block_sum(T value) {
  constexpr int kWarps = THREADS / kWarp;
  static_assert(THREADS % kWarp == 0 && kWarps <= kWarp);
  __shared__ T sums[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  value = warp_sum(value);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < kWarps ? sums[lane] : T(0));
  __syncthreads();  // sums may be used again by the next call
  return value;
}

// kernel(count, args...) in blocks of (kColumns, kGroups) threads, which share own_column() of `count` columns.
template <class... Params, class... Args>
void launch_for_columns(cudaStream_t stream, const char* name, int64_t count, void (*kernel)(int64_t, Params...),
                        const Args&... args) {
  if (count == 0) return;
  kernel<<<ceil_div(count, kColumns), dim3(kColumns, kGroups), 0, stream>>>(count, args...);
  check_cuda(cudaGetLastError(), name);
}

__device__ inline int64_t own_column() { return int64_t(blockIdx.x) * kColumns + threadIdx.x; }

// The sum of values[row][own_column()] over the rows, summed as Sum: in the threads of the first group. Those of the
// others must call it too.
template <class Sum, class A>
__device__ Sum column_sum(int64_t rows, int64_t columns, const A* values, int64_t stride) {
  __shared__ Sum sums[kGroups][kColumns];
  const int64_t column = own_column();
  Sum sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < rows; row += kGroups) sum += values[row * stride + column];
  }
  __syncthreads();  // the last call's readers are done
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int group = 1; group < kGroups && threadIdx.y == 0; ++group) sum += sums[group][threadIdx.x];
  return sum;
}

}  // namespace dlkernels
