// conv2d and conv_transpose2d on CUDA: the sums of conv2d.h as they stand, right for every argument.
//
// Who owns what: forward and grad_input have a thread for each result; grad_weight and grad_bias have a block for each
// result, whose threads share the sum over pixels and add their parts in a fixed order. No atomics: the same bits on
// every run. Passes over memory: every factor is read from cache once for each product it is in.
#include "../../conv2d.h"

#include "../../tensor.h"
#include "../launch.cuh"
#include "../reduce.cuh"
#include "../stream.h"

namespace dlkernels {
namespace {

// ---- kernels -------------------------------------------------------------------------------------

// output[n, k, p, q] = bias[k] + sum over c, r, s of weight[k, c, r, s] * input[n, g*C/G + c, h, w]
// input (N, C, H, W), weight (K, C/G, R, S), bias (K) or null -> output (N, K, P, Q); count = N*K*P*Q
template <class T>
__global__ void conv2d_forward(int64_t count, Conv2dShape shape, Strided4d<const T> input, Strided4d<const T> weight,
                               const T* bias, int64_t bias_stride, Strided4d<T> output) {
  const int64_t channels = shape.C / shape.G;
  for (int64_t item = first_item(); item < count; item += item_stride()) {
    const int64_t q = item % shape.Q, p = item / shape.Q % shape.P;
    const int64_t k = item / shape.Q / shape.P % shape.K, n = item / shape.Q / shape.P / shape.K;
    const int64_t g = k / (shape.K / shape.G);
    Accumulate<T> sum = 0;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t r = 0; r < shape.R; ++r) {
        const int64_t h = p * shape.stride_h - shape.pad_top + r * shape.dilation_h;
        if (h < 0 || h >= shape.H) continue;
        for (int64_t s = 0; s < shape.S; ++s) {
          const int64_t w = q * shape.stride_w - shape.pad_left + s * shape.dilation_w;
          if (w < 0 || w >= shape.W) continue;
          sum += load(weight.at(k, c, r, s)) * load(input.at(n, g * channels + c, h, w));
        }
      }
    }
    if (bias != nullptr) sum += load(bias[k * bias_stride]);
    output.at(n, k, p, q) = store<T>(sum);
  }
}

// grad_input[n, c, h, w] = bias[c] + sum over k, r, s with p*stride_h = h + pad_top - r*dilation_h (q alike) of
//                                    weight[k, c, r, s] * grad[n, k, p, q]
// grad (N, K, P, Q), weight (K, C/G, R, S), bias (C) or null -> grad_input (N, C, H, W); count = N*C*H*W
template <class T>
__global__ void conv2d_grad_input(int64_t count, Conv2dShape shape, Strided4d<const T> grad, Strided4d<const T> weight,
                                  const T* bias, int64_t bias_stride, Strided4d<T> grad_input) {
  const int64_t channels = shape.C / shape.G, kernels = shape.K / shape.G;
  for (int64_t item = first_item(); item < count; item += item_stride()) {
    const int64_t w = item % shape.W, h = item / shape.W % shape.H;
    const int64_t c = item / shape.W / shape.H % shape.C, n = item / shape.W / shape.H / shape.C;
    const int64_t g = c / channels;
    Accumulate<T> sum = 0;
    for (int64_t r = 0; r < shape.R; ++r) {
      const int64_t above = h + shape.pad_top - r * shape.dilation_h, p = above / shape.stride_h;
      if (above < 0 || above % shape.stride_h != 0 || p >= shape.P) continue;
      for (int64_t s = 0; s < shape.S; ++s) {
        const int64_t left = w + shape.pad_left - s * shape.dilation_w, q = left / shape.stride_w;
        if (left < 0 || left % shape.stride_w != 0 || q >= shape.Q) continue;
        for (int64_t k = g * kernels; k < (g + 1) * kernels; ++k) {
          sum += load(weight.at(k, c - g * channels, r, s)) * load(grad.at(n, k, p, q));
        }
      }
    }
    if (bias != nullptr) sum += load(bias[c * bias_stride]);
    grad_input.at(n, c, h, w) = store<T>(sum);
  }
}

// grad_weight[k, c, r, s] = sum over n, p, q of grad[n, k, p, q] * input[n, g*C/G + c, h, w]
// grad (N, K, P, Q), input (N, C, H, W) -> grad_weight (K, C/G, R, S); count = K*(C/G)*R*S
template <class T>
__global__ void conv2d_grad_weight(int64_t count, Conv2dShape shape, Strided4d<const T> grad, Strided4d<const T> input,
                                   Strided4d<T> grad_weight) {
  const int64_t channels = shape.C / shape.G, pixels = shape.N * shape.P * shape.Q;
  for (int64_t item = blockIdx.x; item < count; item += gridDim.x) {
    const int64_t s = item % shape.S, r = item / shape.S % shape.R;
    const int64_t c = item / shape.S / shape.R % channels, k = item / shape.S / shape.R / channels;
    const int64_t g = k / (shape.K / shape.G);
    Accumulate<T> sum = 0;
    for (int64_t pixel = threadIdx.x; pixel < pixels; pixel += kThreads) {
      const int64_t q = pixel % shape.Q, p = pixel / shape.Q % shape.P, n = pixel / shape.Q / shape.P;
      const int64_t h = p * shape.stride_h - shape.pad_top + r * shape.dilation_h;
      const int64_t w = q * shape.stride_w - shape.pad_left + s * shape.dilation_w;
      if (h < 0 || h >= shape.H || w < 0 || w >= shape.W) continue;
      sum += load(grad.at(n, k, p, q)) * load(input.at(n, g * channels + c, h, w));
    }
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) grad_weight.at(k, c, r, s) = store<T>(sum);
  }
}

// grad_bias[k] = sum over n, p, q of grad[n, k, p, q]
// grad (N, K, P, Q) -> grad_bias (K); count = K
template <class T>
__global__ void conv2d_grad_bias(int64_t count, Conv2dShape shape, Strided4d<const T> grad, T* grad_bias) {
  const int64_t pixels = shape.N * shape.P * shape.Q;
  for (int64_t k = blockIdx.x; k < count; k += gridDim.x) {
    Accumulate<T> sum = 0;
    for (int64_t pixel = threadIdx.x; pixel < pixels; pixel += kThreads) {
      const int64_t q = pixel % shape.Q, p = pixel / shape.Q % shape.P, n = pixel / shape.Q / shape.P;
      sum += load(grad.at(n, k, p, q));
    }
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) grad_bias[k] = store<T>(sum);
  }
}

// ---- launchers -----------------------------------------------------------------------------------

struct CudaConv2d : CudaKernels {
  using CudaKernels::CudaKernels;

  template <class T>
  void forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
               int64_t bias_stride, Strided4d<T> output) const {
    launch_for_items(stream(), "conv2d", shape.N * shape.K * shape.P * shape.Q, conv2d_forward<T>, shape, input, weight,
                     bias, bias_stride, output);
  }
  template <class T>
  void grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                  int64_t bias_stride, Strided4d<T> grad_input) const {
    launch_for_items(stream(), "conv2d_backward", shape.N * shape.C * shape.H * shape.W, conv2d_grad_input<T>, shape,
                     grad, weight, bias, bias_stride, grad_input);
  }
  template <class T>
  void grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                   Strided4d<T> grad_weight) const {
    launch_block_per_item(stream(), "conv2d_backward", shape.K * (shape.C / shape.G) * shape.R * shape.S,
                          conv2d_grad_weight<T>, shape, grad, input, grad_weight);
  }
  template <class T>
  void grad_bias(const Conv2dShape& shape, Strided4d<const T> grad, T* grad_bias) const {
    launch_block_per_item(stream(), "conv2d_backward", shape.K, conv2d_grad_bias<T>, shape, grad, grad_bias);
  }
};

}  // namespace

// ---- registration --------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CUDA, library) {
  library.impl("conv2d", TORCH_BOX((&conv2d<CudaConv2d, torch::stable::Tensor>)));
  library.impl("conv2d_backward", TORCH_BOX((&conv2d_backward<CudaConv2d, torch::stable::Tensor>)));
  library.impl("conv_transpose2d", TORCH_BOX((&conv_transpose2d<CudaConv2d, torch::stable::Tensor>)));
  library.impl("conv_transpose2d_backward", TORCH_BOX((&conv_transpose2d_backward<CudaConv2d, torch::stable::Tensor>)));
}

}  // namespace dlkernels
