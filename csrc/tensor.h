// The torch side of common.h: how contracts allocate tensors and choose types. For device files, not for kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common.h"

namespace dlkernels {

template <class T>
struct TorchType;  // T's dtype in torch: as an enum, and as the C shim's number
#define DLKERNELS_TORCH_TYPE(T, Name, name)                                  \
  template <>                                                                \
  struct TorchType<T> {                                                      \
    static constexpr auto scalar_type = torch::headeronly::ScalarType::Name; \
    static int32_t shim_number() { return aoti_torch_dtype_##name(); }       \
  };
DLKERNELS_TORCH_TYPE(double, Double, float64)
DLKERNELS_TORCH_TYPE(float, Float, float32)
DLKERNELS_TORCH_TYPE(BFloat16, BFloat16, bfloat16)
DLKERNELS_TORCH_TYPE(Half, Half, float16)
DLKERNELS_TORCH_TYPE(int64_t, Long, int64)
DLKERNELS_TORCH_TYPE(int32_t, Int, int32)
DLKERNELS_TORCH_TYPE(bool, Bool, bool)
#undef DLKERNELS_TORCH_TYPE

template <class Tensor>
Tensor to_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

template <class T, class Tensor>
bool has_type(const Tensor& tensor) {
  return tensor.scalar_type() == TorchType<T>::scalar_type;
}

template <class T, class Tensor>
Tensor empty_of(const Tensor& input, const Ints& sizes) {
  int32_t device_type;
  AtenTensorHandle handle;
  const Ints strides = contiguous_strides(sizes);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(input.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                         TorchType<T>::shim_number(), device_type,
                                                         input.get_device_index(), &handle));
  return Tensor(handle);
}

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
