// Launching kernels: grid sizes, grid-stride loops, errors.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "../common.h"

namespace dlkernels {

constexpr int kThreads = 256;              // of a block: 8 warps, a size every kernel here can fill
constexpr int64_t kMostBlocks = 132 * 64;  // of a grid: some 64 waves on a large GPU; grid-stride loops do the rest

inline void check_cuda(cudaError_t status, const char* what) {
  check(status == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(status),
        status == cudaErrorNoKernelImageForDevice
            ? " (rebuild dlkernels on this machine, or with TORCH_CUDA_ARCH_LIST naming this GPU)"
            : "");
}

// kernel(count, args...) with a thread for every one of `count` items, as far as the grid goes.
template <class... Params, class... Args>
void launch_for_items(cudaStream_t stream, const char* name, int64_t count, void (*kernel)(int64_t, Params...),
                      const Args&... args) {
  if (count == 0) return;
  kernel<<<std::min(ceil_div(count, kThreads), kMostBlocks), kThreads, 0, stream>>>(count, args...);
  check_cuda(cudaGetLastError(), name);
}

// kernel(count, args...) with a block for every one of `count` items, as far as the grid goes.
template <class... Params, class... Args>
void launch_block_per_item(cudaStream_t stream, const char* name, int64_t count, void (*kernel)(int64_t, Params...),
                           const Args&... args) {
  if (count == 0) return;
  kernel<<<std::min(count, kMostBlocks), kThreads, 0, stream>>>(count, args...);
  check_cuda(cudaGetLastError(), name);
}

__device__ inline int64_t first_item() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t item_stride() { return int64_t(gridDim.x) * blockDim.x; }

}  // namespace dlkernels
