// Whole sequences of reset_gate_rnn on the CPU, forward and backward, for T = double, float, BFloat16 and Half.
#pragma once

#include "../../reset_gate_rnn.h"

namespace dlkernels {

// input, h0, weights, biases -> output, h_n and, unless null, gates
template <class T>
void reset_gate_rnn_forward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in,
                            const ResetGateRnnResult<T>& result);

// the gradients of output and h_n, and what the forward kept -> the gradients that are wanted
template <class T>
void reset_gate_rnn_backward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in,
                             const ResetGateRnnGrad<T>& grad, const ResetGateRnnGradients<T>& wanted);

}  // namespace dlkernels
