// The contract of drop_norm, shared by every device.
//
// N rows of M features; keep says which features count, the same for all rows; K of them do.
//   mean = sum over kept i of x[i] / K         var = sum over kept i of (x[i] - mean)^2 / K
//   y[i] = s * (weight[i] * (x[i] - mean) / sqrt(var + eps) + bias[i])   where i is kept, 0 where it is dropped
// with s = M/K when `rescale`, else 1. Dropped features take no part in anything, whatever their value.
//
// Its backward, with r = 1 / sqrt(var + eps), h[i] = (x[i] - mean) * r and g[i] = s * weight[i] * dy[i]: moving x[i]
// moves h[i] itself, and through mean and var every kept h[j]; the derivative is dh[j]/dx[i] = r * ((i == j) - (1 +
// h[i]*h[j])/K).
//   grad_x[i]      = r * (g[i] - (sum over kept j of g[j]) / K - h[i] * (sum over kept j of g[j] * h[j]) / K)
//   grad_weight[i] = s * sum over rows of dy[i] * h[i]
//   grad_bias[i]   = s * sum over rows of dy[i]
// where i is kept, 0 where it is dropped. mean and r are taken from x again: the row has to be read anyway.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common.h"

namespace dlkernels {

struct DropNormShape {
  int64_t N, M;
  double eps;
  bool rescale;
};

// T holds rows, P parameters: weight and bias are P[M] or null, keep is bool[M] or null (all are kept).
template <class T, class P>
struct DropNormInput {
  const T* input;  // (N, M), rows row_stride apart
  int64_t row_stride;
  const bool* keep;
  const P* weight;
  const P* bias;
};

// ---- checks and sizes ------------------------------------------------------------------------------

template <class Tensor>
void check_drop_norm_parameter(const char* name, const std::optional<Tensor>& tensor, const Tensor& input,
                               const Ints& normalized_shape) {
  if (!tensor) return;
  const auto sizes = tensor->sizes();
  check(sizes.size() == normalized_shape.size() &&
            std::equal(normalized_shape.begin(), normalized_shape.end(), sizes.begin()),
        "drop_norm: ", name, " must have the normalized shape ", to_text(normalized_shape), ", got ", to_text(sizes));
  check(tensor->device() == input.device(), "drop_norm: ", name, " must be on the device of input");
}

// The only checks of drop_norm's arguments, and the only place where its sizes are worked out.
template <class Tensor>
DropNormShape check_drop_norm(const Tensor& input, const std::optional<Tensor>& keep,
                              const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                              const Ints& normalized_shape, double eps, bool rescale) {
  check(input.defined(), "drop_norm: input must be a tensor, got None");
  const auto sizes = input.sizes();
  const int64_t features = normalized_shape.size(), rows = int64_t(sizes.size()) - features;
  check(features > 0, "drop_norm: normalized_shape must not be empty");
  check(rows >= 0 && std::equal(normalized_shape.begin(), normalized_shape.end(), sizes.end() - features),
        "drop_norm: input must end with the normalized shape ", to_text(normalized_shape), ", got ", to_text(sizes));
  check_drop_norm_parameter("keep", keep, input, normalized_shape);
  check(!keep || has_type<bool>(*keep), "drop_norm: keep must be bool, got ",
        keep ? keep->scalar_type() : input.scalar_type());
  check_drop_norm_parameter("weight", weight, input, normalized_shape);
  check_drop_norm_parameter("bias", bias, input, normalized_shape);
  if (weight && bias) {
    check(weight->scalar_type() == bias->scalar_type(), "drop_norm: bias must have the dtype of weight (",
          weight->scalar_type(), "), got ", bias->scalar_type());
  }
  DropNormShape shape{1, 1, eps, rescale};
  for (int64_t i = 0; i < rows; ++i) shape.N *= sizes[i];
  for (int64_t size : normalized_shape) shape.M *= size;
  return shape;
}

// ---- from tensors to kernels, the same on every device -----------------------------------------------
//
// Kernels is the device's: constructed from a tensor, with members empty_strided, forward, backward and select.

// Rows of a tensor as kernels take them: the tensor itself where its features lie side by side and its rows at one
// distance, else a contiguous copy.
template <class Tensor>
struct Rows {
  Tensor tensor;
  int64_t stride;

  Rows(const Tensor& source, int64_t features, int64_t M) : tensor(source), stride(M) {
    const auto sizes = source.sizes(), strides = source.strides();
    int64_t expected = 1, dim = int64_t(sizes.size()) - 1;
    bool regular = true;
    for (; dim >= int64_t(sizes.size()) - features; --dim) {
      regular = regular && (strides[dim] == expected || sizes[dim] == 1);
      expected *= sizes[dim];
    }
    for (bool first = true; dim >= 0; --dim) {
      if (sizes[dim] == 1) continue;
      if (first) stride = strides[dim], expected = strides[dim], first = false;
      regular = regular && strides[dim] == expected;
      expected *= sizes[dim];
    }
    if (regular) return;
    tensor = to_contiguous(source);
    stride = M;
  }
};

// Calls run(T{}, P{}) with the types of rows and parameters: the same, or 16-bit rows with float parameters.
template <class Tensor, class Run>
void for_row_and_parameter_type(const char* op, const Tensor& input, const std::optional<Tensor>& parameter,
                                const Run& run) {
  for_floating_type(op, input, [&](auto row) {
    using T = decltype(row);
    if constexpr (sizeof(T) == 2) {
      if (parameter && parameter->element_size() == sizeof(float)) return run(row, float{});
    }
    check(!parameter || parameter->scalar_type() == input.scalar_type(), op,
          ": weight and bias must have the dtype of input (", input.scalar_type(),
          ") or, beside 16-bit input, float32; got ", parameter ? parameter->scalar_type() : input.scalar_type());
    run(row, row);
  });
}

// input (..., M), keep, weight, bias (M) -> output (..., M)
template <class Kernels, class Tensor>
Tensor drop_norm(const Tensor& input, const std::optional<Tensor>& keep, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, Ints normalized_shape, double eps, bool rescale) {
  const DropNormShape shape = check_drop_norm(input, keep, weight, bias, normalized_shape, eps, rescale);
  const Kernels kernels(input);
  const Ints sizes(input.sizes().begin(), input.sizes().end());
  const Rows<Tensor> rows(input, normalized_shape.size(), shape.M);
  const auto keep_row = contiguous_or_none(keep), weight_row = contiguous_or_none(weight);
  const auto bias_row = contiguous_or_none(bias);
  Tensor output = kernels.empty_strided(input, sizes, contiguous_strides(sizes));
  for_row_and_parameter_type("drop_norm", input, weight ? weight : bias, [&](auto row, auto parameter) {
    using T = decltype(row);
    using P = decltype(parameter);
    const DropNormInput<T, P> in{(const T*)rows.tensor.const_data_ptr(), rows.stride, data_or_null<bool>(keep_row),
                                 data_or_null<P>(weight_row), data_or_null<P>(bias_row)};
    kernels.forward(shape, in, (T*)output.mutable_data_ptr());
  });
  return output;
}

// grad (..., M) -> gradients of input (..., M), weight (M), bias (M); None where output_mask is false
template <class Kernels, class Tensor>
std::tuple<Tensor, Tensor, Tensor> drop_norm_backward(const Tensor& grad, const Tensor& input,
                                                      const std::optional<Tensor>& keep,
                                                      const std::optional<Tensor>& weight, Ints normalized_shape,
                                                      double eps, bool rescale, std::vector<bool> output_mask) {
  const DropNormShape shape = check_drop_norm(input, keep, weight, {}, normalized_shape, eps, rescale);
  check(grad.defined() &&
            std::equal(grad.sizes().begin(), grad.sizes().end(), input.sizes().begin(), input.sizes().end()),
        "drop_norm_backward: grad must have the input's shape ", to_text(input.sizes()));
  check_like_input("drop_norm_backward", "grad", grad, input);
  const Kernels kernels(input);
  const Ints sizes(input.sizes().begin(), input.sizes().end());
  const int64_t features = normalized_shape.size();
  const Rows<Tensor> rows(input, features, shape.M), grad_rows(grad, features, shape.M);
  const auto keep_row = contiguous_or_none(keep), weight_row = contiguous_or_none(weight);
  const Tensor& parameter_like = weight ? *weight : input;
  const Ints strides = contiguous_strides(normalized_shape);
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) grad_input = kernels.empty_strided(input, sizes, contiguous_strides(sizes));
  if (output_mask[1]) grad_weight = kernels.empty_strided(parameter_like, normalized_shape, strides);
  if (output_mask[2]) grad_bias = kernels.empty_strided(parameter_like, normalized_shape, strides);
  for_row_and_parameter_type("drop_norm_backward", input, weight, [&](auto row, auto parameter) {
    using T = decltype(row);
    using P = decltype(parameter);
    const DropNormInput<T, P> in{(const T*)rows.tensor.const_data_ptr(), rows.stride, data_or_null<bool>(keep_row),
                                 data_or_null<P>(weight_row), nullptr};
    kernels.backward(shape, in, (const T*)grad_rows.tensor.const_data_ptr(), grad_rows.stride,
                     output_mask[0] ? (T*)grad_input.mutable_data_ptr() : nullptr,
                     output_mask[1] ? (P*)grad_weight.mutable_data_ptr() : nullptr,
                     output_mask[2] ? (P*)grad_bias.mutable_data_ptr() : nullptr);
  });
  return {grad_input, grad_weight, grad_bias};
}

// keys (M) int32 -> bool (M): false exactly at the `dropped` smallest keys, of equal keys at those with lower index
template <class Kernels, class Tensor>
Tensor drop_mask(const Tensor& keys, int64_t dropped) {
  check(has_type<int32_t>(keys), "drop_mask: keys must be int32, got ", keys.scalar_type());
  check(keys.dim() == 1, "drop_mask: keys must be 1-D, got ", to_text(keys.sizes()));
  const int64_t M = keys.size(0);
  check(dropped >= 0 && dropped <= M, "drop_mask: dropped must lie in [0, ", M, "], got ", dropped);
  const Kernels kernels(keys);
  const Tensor row = to_contiguous(keys);
  Tensor keep = empty_of<bool>(keys, {M});
  kernels.select(M, dropped, (const int32_t*)row.const_data_ptr(), (bool*)keep.mutable_data_ptr());
  return keep;
}

}  // namespace dlkernels
