// Strategy `across_images`: for batches of small images, each lane of a vector has an image of its own.
#pragma once

#include "../../conv2d.h"

namespace dlkernels {

// As Direct in direct.h, for float. Tensors whose images are not dense are left to `direct`.
struct AcrossImages {
  static constexpr int64_t kMostChannels = 64;  // input or output

  static bool can(const Conv2dShape& shape) {
    return shape.G == 1 && shape.stride_h == 1 && shape.stride_w == 1 && shape.C <= kMostChannels &&
           shape.K <= kMostChannels && shape.C * shape.K * shape.N * shape.H * shape.W * shape.P * shape.Q > 0;
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
