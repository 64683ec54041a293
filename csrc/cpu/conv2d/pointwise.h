// Strategy `pointwise`: kernels of 1 x 1 without padding are matrix products, read and written as planes (NCHW).
#pragma once

#include "../../conv2d.h"

namespace dlkernels {

// As Direct in direct.h; grad_weight is Direct's.
struct Pointwise {
  static bool can(const Conv2dShape& shape) {
    const auto unpadded = [](int64_t kernel, int64_t pad, int64_t size, int64_t step, int64_t out) {
      return kernel == 1 && pad == 0 && (out - 1) * step < size;
    };
    return unpadded(shape.R, shape.pad_top, shape.H, shape.stride_h, shape.P) &&
           unpadded(shape.S, shape.pad_left, shape.W, shape.stride_w, shape.Q);
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
