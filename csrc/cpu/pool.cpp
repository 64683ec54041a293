#include "pool.h"

#include "blocks.h"

namespace dlkernels {

torch::stable::Tensor pooled_empty_strided(const torch::stable::Tensor& input, const Ints& sizes, const Ints& strides) {
  int64_t bytes = input.element_size();
  for (int64_t size : sizes) bytes *= size;
  if (bytes < kPooledBytes) return empty_strided(input, sizes, strides);
  return torch::stable::from_blob(take_block(bytes), sizes, strides, input.device(), input.scalar_type(),
                                  [bytes](void* block) { give_block(block, bytes); });
}

}  // namespace dlkernels
