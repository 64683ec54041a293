// Results on the CPU.
#pragma once

#include "../tensor.h"

namespace dlkernels {

// As empty_strided; large tensors come from the pool of blocks.
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
