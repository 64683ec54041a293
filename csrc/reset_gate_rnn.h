// The contract of reset_gate_rnn, shared by every device.
//
// One layer, one direction; T time steps, B sequences, I input features, H hidden features. Weights hold the gate r
// above the candidate n. With a_r = W_ir x_t + b_ir and a_n = W_in x_t + b_in, and h' for h_{t-1}:
//   r = sigmoid(a_r + W_hr h' + b_hr)
//   after:   h_t = n,      n = tanh(a_n + r * g),          g = W_hn h' + b_hn
//   before:  h_t = n,      n = tanh(a_n + W_hn q + b_hn),  q = r * h'
//   output:  h_t = r * n,  n = tanh(a_n + W_hn h' + b_hn)
// Packed sequences: step t has the first batch_sizes[t] of the B sequences, a number that never grows; their rows
// follow those of step t-1. In reverse, time runs from T-1 to 0, and a sequence starts with h0 at its own last step.
// h_n is the h of a sequence's last step in that order; h_t is rounded to the dtype at every step.
//
// Its backward walks the steps from the last to the first with dh, the gradient of h_t: what output and h_n ask for,
// and what the step after, which was computed from h_t, asks for. u_r, u_n, u_g are the gradients of what goes into
// sigmoid, into tanh, and of g. sigmoid' = r (1 - r) and tanh' = 1 - n^2, so
//   after:   u_n = dh (1 - n^2),    u_r = u_n g r (1 - r),  u_g = u_n r,      dh' = W_hr^T u_r + W_hn^T u_g
//   before:  u_n = dh (1 - n^2),    dq = W_hn^T u_n,        u_r = dq h' r (1 - r),  dh' = W_hr^T u_r + dq r
//   output:  u_n = dh r (1 - n^2),  u_r = dh n r (1 - r),   dh' = W_hr^T u_r + W_hn^T u_n
// dh' of the first step is the gradient of h0. With u_h = u_g in "after" and u_n else, sums going over all rows:
//   grad_x = W_ir^T u_r + W_in^T u_n     grad_W_ir = sum u_r x^T      grad_W_in = sum u_n x^T
//   grad_W_hr = sum u_r h'^T             grad_W_hn = sum u_h h'^T (q instead of h' in "before")
//   grad_b_ih = sum [u_r | u_n]          grad_b_hh = sum [u_r | u_h]
// n is h_t but in "output". What else it takes is kept by the forward, the "gates": r and g (after), r (before), r and
// n (output).
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common.h"

namespace dlkernels {

enum class Reset : int64_t { after, before, output };

struct ResetGateRnnShape {
  int64_t T, B, I, H;
  Reset reset;
  bool reverse;
  Ints first;  // (T + 1): the rows of step t are first[t] .. first[t + 1]

  int64_t rows() const { return first[T]; }
  int64_t rows(int64_t t) const { return first[t + 1] - first[t]; }
  int64_t time(int64_t step) const { return reverse ? T - 1 - step : step; }  // of the step-th step to be computed
  int64_t saved() const { return reset == Reset::before ? 1 : 2; }  // gates kept for the backward, H wide each

  // The row of sequence b's last h in `output`, -1: it has none.
  int64_t last_row(int64_t b) const {
    int64_t t = T - 1;
    if (reverse) t = std::min<int64_t>(t, 0);
    while (t >= 0 && rows(t) <= b) --t;
    return t < 0 ? -1 : first[t] + b;
  }
};

// A tensor (T, B, W), or (rows, W) with packed sequences: the features of a row lie side by side.
template <class T>
struct Sequence {
  const T* data;
  int64_t step_stride, row_stride;
  const int64_t* first;  // the shape's where sequences are packed, else null

  const T* row(int64_t t, int64_t b) const {
    return data + (first == nullptr ? t * step_stride : first[t] * row_stride) + b * row_stride;
  }
};

template <class T>
struct ResetGateRnnInput {
  Sequence<T> input;               // (T, B, I)
  const T* h0;                     // (B, H)
  const T *weight_ih, *weight_hh;  // (2H, I), (2H, H)
  const T *bias_ih, *bias_hh;      // (2H) or null
};

template <class T>
struct ResetGateRnnResult {
  T* output;  // (rows, H)
  T* h_n;     // (B, H)
  T* gates;   // (rows, saved * H), or null: no backward will follow
};

// What the backward starts from, besides the forward's input.
template <class T>
struct ResetGateRnnGrad {
  Sequence<T> grad_output;  // (T, B, H); its data may be null: zeros
  const T* grad_h_n;        // (B, H), or null: zeros
  const T* output;          // (rows, H)
  const T* gates;           // (rows, saved * H)
};

// The gradients, null where not wanted.
template <class T>
struct ResetGateRnnGradients {
  T* input;  // (rows, I)
  T* h0;
  T *weight_ih, *weight_hh;
  T *bias_ih, *bias_hh;
};

// ---- checks and sizes ------------------------------------------------------------------------------

template <class Tensor>
void check_reset_gate_rnn_tensor(const char* name, const std::optional<Tensor>& tensor, const Tensor& input,
                                 const Ints& sizes) {
  if (!tensor) return;
  check(tensor->defined(), "reset_gate_rnn: ", name, " must be a tensor, got None");
  const bool same = std::equal(tensor->sizes().begin(), tensor->sizes().end(), sizes.begin(), sizes.end());
  check(same, "reset_gate_rnn: ", name, " must have shape ", to_text(sizes), ", got ", to_text(tensor->sizes()));
  check_like_input("reset_gate_rnn", name, *tensor, input);
}

template <class Tensor>
Ints first_rows(const Tensor& input, const Tensor& h0, const std::optional<Tensor>& batch_sizes) {
  const char* op = "reset_gate_rnn: ";
  Ints first{0};
  if (!batch_sizes) {
    for (int64_t t = 0; t < input.size(0); ++t) first.push_back(first.back() + input.size(1));
    return first;
  }
  check(has_type<int64_t>(*batch_sizes) && batch_sizes->dim() == 1 && batch_sizes->is_cpu(), op,
        "batch_sizes must be 1-D int64 on the CPU");
  const Tensor sizes = to_contiguous(*batch_sizes);
  const int64_t* rows = (const int64_t*)sizes.const_data_ptr();
  for (int64_t t = 0, most = h0.size(0); t < sizes.size(0); most = rows[t++]) {
    check(rows[t] > 0 && rows[t] <= most && (t > 0 || rows[t] == most), op,
          "batch_sizes must start with the rows of h0 (", h0.size(0), "), never grow and be positive; got ", rows[t],
          " at step ", t);
    first.push_back(first.back() + rows[t]);
  }
  check(first.back() == input.size(0), op, "batch_sizes must sum up to the rows of input (", input.size(0), "), got ",
        first.back());
  return first;
}

// The only checks of reset_gate_rnn's arguments, and the only place where its sizes are worked out.
template <class Tensor>
ResetGateRnnShape check_reset_gate_rnn(const Tensor& input, const Tensor& h0, const Tensor& weight_ih,
                                       const Tensor& weight_hh, const std::optional<Tensor>& bias_ih,
                                       const std::optional<Tensor>& bias_hh, const std::optional<Tensor>& batch_sizes,
                                       int64_t reset, bool reverse) {
  const char* op = "reset_gate_rnn: ";
  check(input.defined() && h0.defined(), op, "input and h0 must be tensors, got None");
  check(input.dim() == (batch_sizes ? 2 : 3), op, "input must be ",
        batch_sizes ? "(sum of batch_sizes, I)" : "(T, B, I)", ", got ", to_text(input.sizes()));
  check(h0.dim() == 2, op, "h0 must be (B, H), got ", to_text(h0.sizes()));
  check(reset >= 0 && reset <= int64_t(Reset::output), op, "reset must be 0, 1 or 2, got ", reset);
  const int64_t B = batch_sizes ? h0.size(0) : input.size(1), I = input.size(input.dim() - 1), H = h0.size(1);
  using Optional = std::optional<Tensor>;
  check_reset_gate_rnn_tensor("h0", Optional(h0), input, {B, H});
  check_reset_gate_rnn_tensor("weight_ih", Optional(weight_ih), input, {2 * H, I});
  check_reset_gate_rnn_tensor("weight_hh", Optional(weight_hh), input, {2 * H, H});
  check_reset_gate_rnn_tensor("bias_ih", bias_ih, input, {2 * H});
  check_reset_gate_rnn_tensor("bias_hh", bias_hh, input, {2 * H});
  Ints first = first_rows(input, h0, batch_sizes);
  return {int64_t(first.size()) - 1, B, I, H, Reset(reset), reverse, std::move(first)};
}

// ---- from tensors to kernels, the same on every device -----------------------------------------------
//
// Kernels is the device's: constructed from a tensor, with members empty_strided, forward and backward.

// A tensor as a Sequence: itself where the features of a row lie side by side, else a contiguous copy.
template <class Tensor>
struct SequenceTensor {
  Tensor tensor;

  explicit SequenceTensor(const Tensor& source) : tensor(source) {
    const int64_t last = source.dim() - 1;
    if (source.stride(last) != 1 && source.size(last) > 1) tensor = to_contiguous(source);
  }

  template <class T>
  Sequence<T> rows(const ResetGateRnnShape& shape) const {
    const int64_t rows_dim = tensor.dim() - 2;
    return {(const T*)tensor.const_data_ptr(), rows_dim == 0 ? 0 : tensor.stride(0), tensor.stride(rows_dim),
            rows_dim == 0 ? shape.first.data() : nullptr};
  }
};

// The forward's input as contiguous tensors, kept alive.
template <class Tensor>
struct ResetGateRnnTensors {
  SequenceTensor<Tensor> input;
  Tensor h0, weight_ih, weight_hh;
  std::optional<Tensor> bias_ih, bias_hh;

  ResetGateRnnTensors(const Tensor& input, const Tensor& h0, const Tensor& weight_ih, const Tensor& weight_hh,
                      const std::optional<Tensor>& bias_ih, const std::optional<Tensor>& bias_hh)
      : input(input),
        h0(to_contiguous(h0)),
        weight_ih(to_contiguous(weight_ih)),
        weight_hh(to_contiguous(weight_hh)),
        bias_ih(contiguous_or_none(bias_ih)),
        bias_hh(contiguous_or_none(bias_hh)) {}

  template <class T>
  ResetGateRnnInput<T> as(const ResetGateRnnShape& shape) const {
    return {input.template rows<T>(shape),        (const T*)h0.const_data_ptr(), (const T*)weight_ih.const_data_ptr(),
            (const T*)weight_hh.const_data_ptr(), data_or_null<T>(bias_ih),      data_or_null<T>(bias_hh)};
  }
};

// An uninitialised contiguous tensor of the device's.
template <class Kernels, class Tensor>
Tensor empty_like_input(const Kernels& kernels, const Tensor& input, const Ints& sizes) {
  return kernels.empty_strided(input, sizes, contiguous_strides(sizes));
}

// input (T, B, I) or (rows, I), h0 (B, H) -> output (T, B, H) or (rows, H), h_n (B, H), gates (rows, saved * H), which
// has no rows unless `save`
template <class Kernels, class Tensor>
std::tuple<Tensor, Tensor, Tensor> reset_gate_rnn(const Tensor& input, const Tensor& h0, const Tensor& weight_ih,
                                                  const Tensor& weight_hh, const std::optional<Tensor>& bias_ih,
                                                  const std::optional<Tensor>& bias_hh,
                                                  const std::optional<Tensor>& batch_sizes, int64_t reset, bool reverse,
                                                  bool save) {
  const ResetGateRnnShape shape =
      check_reset_gate_rnn(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reset, reverse);
  const Kernels kernels(input);
  const ResetGateRnnTensors<Tensor> tensors(input, h0, weight_ih, weight_hh, bias_ih, bias_hh);
  const Ints packed{shape.rows(), shape.H}, padded{shape.T, shape.B, shape.H};
  Tensor output = empty_like_input(kernels, input, batch_sizes ? packed : padded);
  Tensor h_n = empty_like_input(kernels, input, {shape.B, shape.H});
  Tensor gates = empty_like_input(kernels, input, {save ? shape.rows() : 0, shape.saved() * shape.H});
  for_floating_type("reset_gate_rnn", input, [&](auto type) {
    using T = decltype(type);
    const ResetGateRnnResult<T> result{(T*)output.mutable_data_ptr(), (T*)h_n.mutable_data_ptr(),
                                       save ? (T*)gates.mutable_data_ptr() : nullptr};
    kernels.forward(shape, tensors.template as<T>(shape), result);
  });
  return {output, h_n, gates};
}

// grad_output (T, B, H) or (rows, H), grad_h_n (B, H), either None for zeros; output and gates as the forward gave them
// -> gradients of input, h0, weight_ih, weight_hh, bias_ih, bias_hh; None where output_mask is false. The biases are
// not looked at: the derivative of this operator needs them.
template <class Kernels, class Tensor>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> reset_gate_rnn_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n, const Tensor& input,
    const Tensor& h0, const Tensor& weight_ih, const Tensor& weight_hh, const std::optional<Tensor>& bias_ih,
    const std::optional<Tensor>& bias_hh, const Tensor& output, const Tensor& gates,
    const std::optional<Tensor>& batch_sizes, int64_t reset, bool reverse, std::vector<bool> output_mask) {
  const ResetGateRnnShape shape =
      check_reset_gate_rnn(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, reset, reverse);
  const int64_t H = shape.H;
  const Ints output_sizes = batch_sizes ? Ints{shape.rows(), H} : Ints{shape.T, shape.B, H};
  check_reset_gate_rnn_tensor("output", std::optional<Tensor>(output), input, output_sizes);
  check_reset_gate_rnn_tensor("grad_output", grad_output, input, output_sizes);
  check_reset_gate_rnn_tensor("grad_h_n", grad_h_n, input, {shape.B, H});
  check_reset_gate_rnn_tensor("gates", std::optional<Tensor>(gates), input, {shape.rows(), shape.saved() * H});
  const Kernels kernels(input);
  const ResetGateRnnTensors<Tensor> tensors(input, h0, weight_ih, weight_hh, {}, {});
  const SequenceTensor<Tensor> grad_rows(grad_output ? *grad_output : output);
  const std::optional<Tensor> grad_last = contiguous_or_none(grad_h_n);
  const Tensor output_rows = to_contiguous(output), gates_rows = to_contiguous(gates);
  const Ints sizes[] = {
      Ints(input.sizes().begin(), input.sizes().end()), {shape.B, H}, {2 * H, shape.I}, {2 * H, H}, {2 * H}, {2 * H}};
  Tensor grads[6];
  for (int i = 0; i < 6; ++i) {
    if (output_mask[i]) grads[i] = empty_like_input(kernels, input, sizes[i]);
  }
  for_floating_type("reset_gate_rnn_backward", input, [&](auto type) {
    using T = decltype(type);
    const auto data = [&](int i) { return output_mask[i] ? (T*)grads[i].mutable_data_ptr() : nullptr; };
    const ResetGateRnnGrad<T> grad{grad_output ? grad_rows.template rows<T>(shape) : Sequence<T>{},
                                   data_or_null<T>(grad_last), (const T*)output_rows.const_data_ptr(),
                                   (const T*)gates_rows.const_data_ptr()};
    kernels.backward(shape, tensors.template as<T>(shape), grad,
                     ResetGateRnnGradients<T>{data(0), data(1), data(2), data(3), data(4), data(5)});
  });
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

}  // namespace dlkernels
