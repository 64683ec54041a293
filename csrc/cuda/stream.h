// The CUDA device and stream a call runs on. For the ends of device files, not for kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace dlkernels {

// While it lives, the tensor's device is the current one; `stream` is torch's current stream there.
class CurrentStream {
 public:
  template <class Tensor>
  explicit CurrentStream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle));
    stream_ = static_cast<cudaStream_t>(handle);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace dlkernels
