// conv2d and conv_transpose2d on the CPU: which strategy runs, and the operators' registration.
#include "../../conv2d.h"

#include "../pool.h"
#include "direct.h"

namespace dlkernels {
namespace {

struct CpuConv2d : CpuKernels {
  using CpuKernels::CpuKernels;

  template <class T>
  void forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
               int64_t bias_stride, Strided4d<T> output) const {
    conv2d_direct(shape, input, weight, bias, bias_stride, output);
  }
  template <class T>
  void grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                  int64_t bias_stride, Strided4d<T> grad_input) const {
    conv2d_direct_grad_input(shape, grad, weight, bias, bias_stride, grad_input);
  }
  template <class T>
  void grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                   Strided4d<T> grad_weight) const {
    conv2d_direct_grad_weight(shape, grad, input, grad_weight);
  }
  template <class T>
  void grad_bias(const Conv2dShape& shape, Strided4d<const T> grad, T* grad_bias) const {
    conv2d_direct_grad_bias(shape, grad, grad_bias);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, library) {
  library.impl("conv2d", TORCH_BOX((&conv2d<CpuConv2d, torch::stable::Tensor>)));
  library.impl("conv2d_backward", TORCH_BOX((&conv2d_backward<CpuConv2d, torch::stable::Tensor>)));
  library.impl("conv_transpose2d", TORCH_BOX((&conv_transpose2d<CpuConv2d, torch::stable::Tensor>)));
  library.impl("conv_transpose2d_backward", TORCH_BOX((&conv_transpose2d_backward<CpuConv2d, torch::stable::Tensor>)));
}

}  // namespace dlkernels
