// The torch side of common.h: how contracts allocate tensors and choose types. For device files, not for kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common.h"

namespace dlkernels {

template <class Tensor>
Tensor empty_strided(const Tensor& input, const Ints& sizes, const Ints& strides) {
  int32_t dtype, device_type;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(input.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device_type,
                                                         input.get_device_index(), &handle));
  return Tensor(handle);
}

template <class Tensor, class Run>
void for_floating_type(const char* op, const Tensor& input, const Run& run) {
  using torch::headeronly::ScalarType;
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return run(double{});
    case ScalarType::Float:
      return run(float{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    case ScalarType::Half:
      return run(Half{});
    default:
      fail(op, ": input must be float64, float32, bfloat16 or float16, got ", input.scalar_type());
  }
}

}  // namespace dlkernels
