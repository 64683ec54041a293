// Copies from global into shared memory that go on while the thread works. A thread sees its own after it has waited;
// other threads see them after a barrier behind that.
#pragma once

#include <cuda_runtime.h>

namespace dlkernels {

constexpr int kCopyBytes = 16;  // of one copy, aligned alike on both sides

__device__ inline void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
  *(int4*)shared = *(const int4*)global;
#endif
}

// Ends a group of copies, which may be empty.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all groups but the last PENDING have arrived.
template <int PENDING>
__device__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

}  // namespace dlkernels
