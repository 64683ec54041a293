// Strategy `winograd`: 3 x 3 kernels, stride 1, with 16 multiplications where the definition has 36.
#pragma once

#include "../../conv2d.h"

namespace dlkernels {

// The interface is Direct's.
struct Winograd {
  static bool can(const Conv2dShape& shape) {
    return shape.C > 0 && shape.R == 3 && shape.S == 3 && shape.stride_h == 1 && shape.stride_w == 1 &&
           shape.dilation_h == 1 && shape.dilation_w == 1;
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
