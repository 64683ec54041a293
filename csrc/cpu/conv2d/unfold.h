// Strategy `unfold`: for few pixels and many weights, matrix products that read the weights as they lie.
#pragma once

#include "../../conv2d.h"

namespace dlkernels {

// As Direct in direct.h.
struct Unfold {
  static bool can(const Conv2dShape& shape) { return shape.N > 0 && shape.C > 0; }

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
