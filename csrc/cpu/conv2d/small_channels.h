// Strategy `small_channels`: few channels of a group, where the pixels of a row fill the vectors.
#pragma once

#include "../../conv2d.h"

namespace dlkernels {

struct SmallChannels {
  static constexpr int64_t kMostChannels = 16;  // of a group: beyond, output channels fill vectors as well

  static bool can(const Conv2dShape& shape) { return shape.C <= kMostChannels * shape.G; }

  // Whether forward has a loop of its own for the kernel's rows; and whether rows are so narrow that two of them, of
  // few enough taps, share a vector.
  static bool knows_rows(const Conv2dShape& shape);
  static bool pairs_rows(const Conv2dShape& shape);

  // As in direct.h, for float.
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
