// Sums over the threads of a block, in a fixed order: the same bits on every run.
#pragma once

#include <cuda_runtime.h>

namespace dlkernels {

constexpr int kWarp = 32;

// The sum of `value` over the warp, in lane 0.
template <class T>
__device__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
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

}  // namespace dlkernels
