// The CUDA device and stream a call runs on. For the ends of device files, not for kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensor.h"

namespace dlkernels {

// What the kernels of every operator on CUDA have in common. While it lives, the tensor's device is the current one;
// `stream` is torch's current stream there.
class CudaKernels {
 public:
  explicit CudaKernels(const torch::stable::Tensor& tensor) : tensor_(tensor), guard_(tensor.get_device_index()) {
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
    stream_ = static_cast<cudaStream_t>(handle);
  }

  torch::stable::Tensor empty_strided(const torch::stable::Tensor& input, const Ints& sizes,
                                      const Ints& strides) const {
    return dlkernels::empty_strided(input, sizes, strides);
  }

 protected:
  cudaStream_t stream() const { return stream_; }

  int device() const { return tensor_.get_device_index(); }

  // Multiprocessors of the device.
  int64_t processors() const {
    int count = 1;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device());
    return count;
  }

  // Memory for `count` intermediate results; free again when the tensor goes.
  template <class A>
  torch::stable::Tensor workspace(int64_t count) const {
    return empty_of<A>(tensor_, {count});
  }

 private:
  torch::stable::Tensor tensor_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace dlkernels
