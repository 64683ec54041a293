// The contract of conv2d and conv_transpose2d, shared by every device.
//
//   output[n, k, p, q] = bias[k] + sum over c, r, s of
//                        weight[k, c, r, s] * input[n, g*(C/G) + c, p*stride_h - pad_top + r*dilation_h,
//                                                                   q*stride_w - pad_left + s*dilation_w]
//
// with g = k / (K/G), the group of output channel k, and input read as zero outside its H x W.
//
//   N images    C H W  input channels, height, width     K  output channels    G  groups
//   R S  kernel height and width                         P Q  output height and width
//
// Its backward, for grad = d loss / d output (N, K, P, Q): each product above hands grad[n, k, p, q] times its one
// factor to its other factor.
//   grad_input [n, c, h, w] = sum over k, r, s with h = p*stride_h - pad_top + r*dilation_h (w alike) of
//                             weight[k, c, r, s] * grad[n, k, p, q]
//   grad_weight[k, c, r, s] = sum over n, p, q of grad[n, k, p, q] * input[n, c, h, w]
//   grad_bias[k]            = sum over n, p, q of grad[n, k, p, q]
//
// conv_transpose2d is that grad_input as a layer of its own: it goes the way back from K P Q to C H W. The letters stay
// those of the convolution, so its input is (N, K, P, Q), its weight (K, C/G, R, S), its output (N, C, H, W), and
//   output[n, c, h, w] = bias[c] + sum over k, r, s with h = p*stride_h - pad_top + r*dilation_h (w alike) of
//                                  weight[k, c, r, s] * input[n, k, p, q]
// Its backward needs nothing new. Each product hands grad[n, c, h, w] times one factor to the other, so that
//   grad_input  = conv2d(grad, weight)
//   grad_weight = conv2d's grad_weight, with input in the place of its grad, and grad in the place of its input
//   grad_bias[c] = sum over n, h, w of grad[n, c, h, w]
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

namespace dlkernels {

struct Conv2dShape {
  int64_t N, C, H, W;
  int64_t K, R, S;
  int64_t P, Q;  // not to be worked out from H and W: conv_transpose2d's output_padding leaves some of these unread
  int64_t G;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;  // padding after the last row and column shows only in P and Q
  int64_t dilation_h, dilation_w;
};

// A 4-D tensor as kernels see it: (n, c, h, w) lies at data[n*stride_n + c*stride_c + h*stride_h + w*stride_w].
template <class T>
struct Strided4d {
  T* data;
  int64_t stride_n, stride_c, stride_h, stride_w;

  DLKERNELS_HOST_DEVICE T* at(int64_t n, int64_t c) const { return data + n * stride_n + c * stride_c; }
  DLKERNELS_HOST_DEVICE T& at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return at(n, c)[h * stride_h + w * stride_w];
  }
};

template <class T, class Tensor>
Strided4d<T> strided_4d(T* data, const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {data, strides[0], strides[1], strides[2], strides[3]};
}

// Whether the innermost dimension in memory is the channels, as torch judges it: strides ascend in the order C, W, H,
// N. A tensor that is both (C = 1, or H = W = 1 with N = 1) counts as not.
template <class Tensor>
bool is_channels_last(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (strides[1] == 0) return false;
  int64_t smallest = 0;
  for (int dim : {1, 3, 2, 0}) {
    if (sizes[dim] == 0 || strides[dim] < smallest) return false;
    if (dim == 0 && smallest == strides[1]) return false;
    smallest = strides[dim] * (sizes[dim] > 1 ? sizes[dim] : 1);
  }
  return true;
}

inline Ints strides_4d(const Ints& sizes, bool channels_last) {
  const int64_t C = sizes[1], H = sizes[2], W = sizes[3];
  if (channels_last) return {H * W * C, 1, W * C, C};
  return {C * H * W, H * W, W, 1};
}

// ---- checks and sizes ------------------------------------------------------------------------------

// Output size along one dimension; `axis` is "height" or "width".
inline int64_t conv2d_output_size(const char* axis, int64_t size, int64_t kernel, int64_t stride, int64_t before,
                                  int64_t after, int64_t dilation) {
  check(kernel > 0, "conv2d: weight must have a kernel ", axis, " of at least 1, got ", kernel);
  check(stride > 0, "conv2d: stride must be positive, got ", stride);
  check(before >= 0 && after >= 0, "conv2d: padding must not be negative, got ", before < 0 ? before : after);
  check(dilation > 0, "conv2d: dilation must be positive, got ", dilation);
  check(size > 0, "conv2d: input must have a positive ", axis, ", got ", size);
  const int64_t room = size + before + after - (dilation * (kernel - 1) + 1);
  check(room >= 0, "conv2d: weight must not be larger than the padded input: ", axis, " ", size + before + after,
        ", kernel ", kernel, ", dilation ", dilation);
  return room / stride + 1;
}

// The only checks of conv2d's arguments, and the only place where its sizes are worked out.
// padding is (top, bottom, left, right).
template <class Tensor>
Conv2dShape check_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                         const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups) {
  check(input.defined() && weight.defined(), "conv2d: input and weight must be tensors, got None");
  check(input.dim() == 4, "conv2d: input must be 4-D (N, C, H, W), got ", to_text(input.sizes()));
  check(weight.dim() == 4, "conv2d: weight must be 4-D (K, C/groups, R, S), got ", to_text(weight.sizes()));
  check(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
        "conv2d: expected stride (2), padding (4) and dilation (2), got ", to_text(stride), ", ", to_text(padding),
        ", ", to_text(dilation));
  check_like_input("conv2d", "weight", weight, input);

  const auto x = input.sizes();
  const auto w = weight.sizes();
  check(groups > 0, "conv2d: groups must be positive, got ", groups);
  check(w[0] > 0 && w[0] % groups == 0, "conv2d: weight must have a multiple of groups (", groups,
        ") output channels, got ", to_text(w));
  check(x[1] == w[1] * groups, "conv2d: input must have ", w[1] * groups, " channels for weight ", to_text(w),
        " and groups ", groups, ", got ", to_text(x));
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == w[0], "conv2d: bias must have shape [", w[0], "], got ",
          to_text(bias->sizes()));
    check_like_input("conv2d", "bias", *bias, input);
  }

  Conv2dShape shape{};
  shape.N = x[0], shape.C = x[1], shape.H = x[2], shape.W = x[3];
  shape.K = w[0], shape.R = w[2], shape.S = w[3];
  shape.G = groups;
  shape.stride_h = stride[0], shape.stride_w = stride[1];
  shape.pad_top = padding[0], shape.pad_left = padding[2];
  shape.dilation_h = dilation[0], shape.dilation_w = dilation[1];
  shape.P = conv2d_output_size("height", x[2], w[2], stride[0], padding[0], padding[1], dilation[0]);
  shape.Q = conv2d_output_size("width", x[3], w[3], stride[1], padding[2], padding[3], dilation[1]);
  return shape;
}

// The same for the backward: grad must be shaped as the output.
template <class Tensor>
Conv2dShape check_conv2d_backward(const Tensor& grad, const Tensor& input, const Tensor& weight, const Ints& stride,
                                  const Ints& padding, const Ints& dilation, int64_t groups) {
  const Conv2dShape shape = check_conv2d(input, weight, std::optional<Tensor>(), stride, padding, dilation, groups);
  const Ints expected = {shape.N, shape.K, shape.P, shape.Q};
  check(grad.defined(), "conv2d_backward: grad must be a tensor, got None");
  check(grad.dim() == 4 && std::equal(expected.begin(), expected.end(), grad.sizes().begin()),
        "conv2d_backward: grad must have the output's shape ", to_text(expected), ", got ", to_text(grad.sizes()));
  check_like_input("conv2d_backward", "grad", grad, input);
  return shape;
}

// Output size of conv_transpose2d along one dimension: what conv2d turns into `size` again. A stride above 1 leaves
// several such sizes, from which output_padding chooses.
inline int64_t conv_transpose2d_output_size(const char* axis, int64_t size, int64_t kernel, int64_t stride,
                                            int64_t padding, int64_t output_padding, int64_t dilation) {
  check(kernel > 0, "conv_transpose2d: weight must have a kernel ", axis, " of at least 1, got ", kernel);
  check(stride > 0, "conv_transpose2d: stride must be positive, got ", stride);
  check(padding >= 0, "conv_transpose2d: padding must not be negative, got ", padding);
  check(dilation > 0, "conv_transpose2d: dilation must be positive, got ", dilation);
  check(output_padding >= 0 && output_padding < std::max(stride, dilation),
        "conv_transpose2d: output_padding must be at least 0 and smaller than stride (", stride, ") or dilation (",
        dilation, "), got ", output_padding);
  check(size > 0, "conv_transpose2d: input must have a positive ", axis, ", got ", size);
  const int64_t output = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1;
  check(output > 0, "conv_transpose2d: padding must leave an output of positive ", axis, ", got ", axis, " ", output,
        " for input ", size, ", kernel ", kernel, ", stride ", stride, ", padding ", padding);
  return output;
}

// The only checks of conv_transpose2d's arguments; the shape is that of the convolution it transposes.
template <class Tensor>
Conv2dShape check_conv_transpose2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                   const Ints& stride, const Ints& padding, const Ints& output_padding,
                                   const Ints& dilation, int64_t groups) {
  check(input.defined() && weight.defined(), "conv_transpose2d: input and weight must be tensors, got None");
  check(input.dim() == 4, "conv_transpose2d: input must be 4-D (N, K, P, Q), got ", to_text(input.sizes()));
  check(weight.dim() == 4, "conv_transpose2d: weight must be 4-D (K, C/groups, R, S), got ", to_text(weight.sizes()));
  check(stride.size() == 2 && padding.size() == 2 && output_padding.size() == 2 && dilation.size() == 2,
        "conv_transpose2d: expected two numbers for stride, padding, output_padding and dilation, got ",
        to_text(stride), ", ", to_text(padding), ", ", to_text(output_padding), ", ", to_text(dilation));
  check_like_input("conv_transpose2d", "weight", weight, input);

  const auto x = input.sizes();
  const auto w = weight.sizes();
  check(groups > 0, "conv_transpose2d: groups must be positive, got ", groups);
  check(w[0] > 0 && w[0] % groups == 0, "conv_transpose2d: weight must have a multiple of groups (", groups,
        ") input channels, got ", to_text(w));
  check(w[1] > 0, "conv_transpose2d: weight must have output channels, got ", to_text(w));
  check(x[1] == w[0], "conv_transpose2d: input must have ", w[0], " channels for weight ", to_text(w), ", got ",
        to_text(x));
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == w[1] * groups, "conv_transpose2d: bias must have shape [", w[1] * groups,
          "], got ", to_text(bias->sizes()));
    check_like_input("conv_transpose2d", "bias", *bias, input);
  }

  Conv2dShape shape{};
  shape.N = x[0], shape.K = x[1], shape.P = x[2], shape.Q = x[3];
  shape.C = w[1] * groups, shape.R = w[2], shape.S = w[3];
  shape.G = groups;
  shape.stride_h = stride[0], shape.stride_w = stride[1];
  shape.pad_top = padding[0], shape.pad_left = padding[1];
  shape.dilation_h = dilation[0], shape.dilation_w = dilation[1];
  shape.H = conv_transpose2d_output_size("height", x[2], w[2], stride[0], padding[0], output_padding[0], dilation[0]);
  shape.W = conv_transpose2d_output_size("width", x[3], w[3], stride[1], padding[1], output_padding[1], dilation[1]);
  return shape;
}

// The same for the backward: grad must be shaped as the output.
template <class Tensor>
Conv2dShape check_conv_transpose2d_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                            const Ints& stride, const Ints& padding, const Ints& output_padding,
                                            const Ints& dilation, int64_t groups) {
  const Conv2dShape shape =
      check_conv_transpose2d(input, weight, std::optional<Tensor>(), stride, padding, output_padding, dilation, groups);
  const Ints expected = {shape.N, shape.C, shape.H, shape.W};
  check(grad.defined(), "conv_transpose2d_backward: grad must be a tensor, got None");
  check(grad.dim() == 4 && std::equal(expected.begin(), expected.end(), grad.sizes().begin()),
        "conv_transpose2d_backward: grad must have the output's shape ", to_text(expected), ", got ",
        to_text(grad.sizes()));
  check_like_input("conv_transpose2d_backward", "grad", grad, input);
  return shape;
}

// ---- from tensors to kernels, the same on every device ---------------------------------------------
//
// Kernels is the device's: constructed from a tensor (to take its device and stream), with members empty_strided,
// forward, grad_input (which adds a bias (C) for conv_transpose2d), grad_weight and grad_bias.

// input (N, C, H, W), weight (K, C/G, R, S), bias (K) -> output (N, K, P, Q)
template <class Kernels, class Tensor>
Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride, Ints padding,
              Ints dilation, int64_t groups) {
  const Conv2dShape shape = check_conv2d(input, weight, bias, stride, padding, dilation, groups);
  const Kernels kernels(input);
  const Ints sizes = {shape.N, shape.K, shape.P, shape.Q};
  Tensor output =
      kernels.empty_strided(input, sizes, strides_4d(sizes, is_channels_last(input) || is_channels_last(weight)));
  for_floating_type("conv2d", input, [&](auto type) {
    using T = decltype(type);
    const T* no_bias = nullptr;
    kernels.forward(shape, strided_4d((const T*)input.const_data_ptr(), input),
                    strided_4d((const T*)weight.const_data_ptr(), weight),
                    bias ? (const T*)bias->const_data_ptr() : no_bias, bias ? bias->stride(0) : 0,
                    strided_4d((T*)output.mutable_data_ptr(), output));
  });
  return output;
}

// grad (N, K, P, Q) -> grad_input (N, C, H, W), grad_weight (K, C/G, R, S), grad_bias (K); None where output_mask is
// false
template <class Kernels, class Tensor>
std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                   Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                   std::vector<bool> output_mask) {
  const Conv2dShape shape = check_conv2d_backward(grad, input, weight, stride, padding, dilation, groups);
  const Kernels kernels(input);
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  Tensor grad_input, grad_weight, grad_bias;
  for_floating_type("conv2d_backward", input, [&](auto type) {
    using T = decltype(type);
    const auto grad_view = strided_4d((const T*)grad.const_data_ptr(), grad);
    if (output_mask[0]) {
      const Ints sizes = {shape.N, shape.C, shape.H, shape.W};
      grad_input = kernels.empty_strided(input, sizes, strides_4d(sizes, channels_last));
      const T* no_bias = nullptr;
      kernels.grad_input(shape, grad_view, strided_4d((const T*)weight.const_data_ptr(), weight), no_bias, 0,
                         strided_4d((T*)grad_input.mutable_data_ptr(), grad_input));
    }
    if (output_mask[1]) {
      const Ints sizes = {shape.K, shape.C / shape.G, shape.R, shape.S};
      grad_weight = kernels.empty_strided(weight, sizes, strides_4d(sizes, channels_last));
      kernels.grad_weight(shape, grad_view, strided_4d((const T*)input.const_data_ptr(), input),
                          strided_4d((T*)grad_weight.mutable_data_ptr(), grad_weight));
    }
    if (output_mask[2]) {
      grad_bias = kernels.empty_strided(weight, {shape.K}, {1});
      kernels.grad_bias(shape, grad_view, (T*)grad_bias.mutable_data_ptr());
    }
  });
  return {grad_input, grad_weight, grad_bias};
}

// input (N, K, P, Q), weight (K, C/G, R, S), bias (C) -> output (N, C, H, W)
template <class Kernels, class Tensor>
Tensor conv_transpose2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                        Ints padding, Ints output_padding, Ints dilation, int64_t groups) {
  const Conv2dShape shape =
      check_conv_transpose2d(input, weight, bias, stride, padding, output_padding, dilation, groups);
  const Kernels kernels(input);
  const Ints sizes = {shape.N, shape.C, shape.H, shape.W};
  Tensor output =
      kernels.empty_strided(input, sizes, strides_4d(sizes, is_channels_last(input) || is_channels_last(weight)));
  for_floating_type("conv_transpose2d", input, [&](auto type) {
    using T = decltype(type);
    const T* no_bias = nullptr;
    kernels.grad_input(shape, strided_4d((const T*)input.const_data_ptr(), input),
                       strided_4d((const T*)weight.const_data_ptr(), weight),
                       bias ? (const T*)bias->const_data_ptr() : no_bias, bias ? bias->stride(0) : 0,
                       strided_4d((T*)output.mutable_data_ptr(), output));
  });
  return output;
}

// grad (N, C, H, W) -> grad_input (N, K, P, Q), grad_weight (K, C/G, R, S), grad_bias (C); None where output_mask is
// false
template <class Kernels, class Tensor>
std::tuple<Tensor, Tensor, Tensor> conv_transpose2d_backward(const Tensor& grad, const Tensor& input,
                                                             const Tensor& weight, Ints stride, Ints padding,
                                                             Ints output_padding, Ints dilation, int64_t groups,
                                                             std::vector<bool> output_mask) {
  const Conv2dShape shape =
      check_conv_transpose2d_backward(grad, input, weight, stride, padding, output_padding, dilation, groups);
  const Kernels kernels(input);
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  Tensor grad_input, grad_weight, grad_bias;
  for_floating_type("conv_transpose2d_backward", input, [&](auto type) {
    using T = decltype(type);
    const T* no_bias = nullptr;
    const auto grad_view = strided_4d((const T*)grad.const_data_ptr(), grad);
    if (output_mask[0]) {
      const Ints sizes = {shape.N, shape.K, shape.P, shape.Q};
      grad_input = kernels.empty_strided(input, sizes, strides_4d(sizes, channels_last));
      kernels.forward(shape, grad_view, strided_4d((const T*)weight.const_data_ptr(), weight), no_bias, 0,
                      strided_4d((T*)grad_input.mutable_data_ptr(), grad_input));
    }
    if (output_mask[1]) {
      const Ints sizes = {shape.K, shape.C / shape.G, shape.R, shape.S};
      grad_weight = kernels.empty_strided(weight, sizes, strides_4d(sizes, channels_last));
      kernels.grad_weight(shape, strided_4d((const T*)input.const_data_ptr(), input), grad_view,
                          strided_4d((T*)grad_weight.mutable_data_ptr(), grad_weight));
    }
    if (output_mask[2]) {
      Conv2dShape sums = shape;  // of a grad (N, K, P, Q)
      sums.K = shape.C, sums.P = shape.H, sums.Q = shape.W;
      grad_bias = kernels.empty_strided(weight, {shape.C}, {1});
      kernels.grad_bias(sums, grad_view, (T*)grad_bias.mutable_data_ptr());
    }
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace dlkernels
