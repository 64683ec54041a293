// Strategy `direct`: right for every argument of conv2d.
#pragma once

#include "../../conv2d.h"

namespace dlkernels {

// Every strategy has these four. T is float, and for Direct also double; bias (K) has stride bias_stride and may be
// null; the rest is as in conv2d.h. A strategy is called only with a shape that it `can` do.
struct Direct {
  static bool can(const Conv2dShape&) { return true; }

  template <class T>
  static void forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                      int64_t bias_stride, Strided4d<T> output);

  // grad (N, K, P, Q), weight (K, C/G, R, S), bias (C) as above -> grad_input (N, C, H, W)
  template <class T>
  static void grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                         int64_t bias_stride, Strided4d<T> grad_input);

  // grad (N, K, P, Q), input (N, C, H, W) -> grad_weight (K, C/G, R, S)
  template <class T>
  static void grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                          Strided4d<T> grad_weight);
};

// grad (N, K, P, Q) -> grad_bias (K), contiguous; the same for every strategy, of any floating type
template <class T>
void conv2d_grad_bias(const Conv2dShape& shape, Strided4d<const T> grad, T* grad_bias);

}  // namespace dlkernels
