// Memory for large outputs: blocks that were freed are used again.
#pragma once

#include "../tensor.h"

namespace dlkernels {

// As empty_strided, on the CPU. The C library gives large blocks back to the operating system when they are freed, and
// gets them anew for the next call, page by page, every page cleared by the kernel at its first touch: several times
// the cost of writing the results. So large tensors come from a pool of at most kPoolBytes of freed blocks.
torch::stable::Tensor pooled_empty_strided(const torch::stable::Tensor& input, const Ints& sizes, const Ints& strides);

// What the kernels of every operator on the CPU have in common: how to allocate results.
struct CpuKernels {
  explicit CpuKernels(const torch::stable::Tensor&) {}

  torch::stable::Tensor empty_strided(const torch::stable::Tensor& input, const Ints& sizes,
                                      const Ints& strides) const {
    return pooled_empty_strided(input, sizes, strides);
  }
};

}  // namespace dlkernels
