// Strategy `depthwise`: every output channel reads one input channel of its own.
#pragma once

#include "../../conv2d.h"

namespace dlkernels {

// The functions are as direct.h says.
struct Depthwise {
  static bool can(const Conv2dShape& shape) { return shape.G == shape.C && shape.G == shape.K; }

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
