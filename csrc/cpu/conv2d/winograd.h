// Strategy `winograd`: 3 x 3 kernels, stride 1, with 16 multiplications where the definition has 36.
#pragma once

#include "../../conv2d.h"

namespace dlkernels {

// The interface is Direct's. float64 is left to Direct.
struct Winograd {
  static bool can(const Conv2dShape& shape) {
    return shape.R == 3 && shape.S == 3 && shape.stride_h == 1 && shape.stride_w == 1 && shape.dilation_h == 1 &&
           shape.dilation_w == 1;
  }

  // Whether it is faster than Direct. In multiply-adds for each pair of channels: 16 for a tile and a fifth more for
  // its transforms, which many channels share, and what transforming a kernel costs more than packing it.
  static bool pays(const Conv2dShape& shape) {
    constexpr int64_t kFewChannels = 24, kKernelCost = 136;
    const int64_t tiles = shape.N * ceil_div(shape.P, 2) * ceil_div(shape.Q, 2), pixels = shape.N * shape.P * shape.Q;
    return shape.C / shape.G >= kFewChannels && shape.K / shape.G >= kFewChannels &&
           16 * tiles * 6 / 5 + kKernelCost < 9 * pixels;
  }

  template <class T>
  static void forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                      int64_t bias_stride, Strided4d<T> output);
  template <class T>
  static void grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                         int64_t bias_stride, Strided4d<T> grad_input);
  template <class T>
  static void grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                          Strided4d<T> grad_weight);
};

}  // namespace dlkernels
