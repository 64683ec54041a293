// reset_gate_rnn on the CPU: from tensors to the kernels in sequence.cpp.
#include "../../reset_gate_rnn.h"

#include "../../tensor.h"
#include "../pool.h"
#include "sequence.h"

namespace dlkernels {
namespace {

struct CpuResetGateRnn : CpuKernels {
  using CpuKernels::CpuKernels;

  template <class T>
  void forward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in,
               const ResetGateRnnResult<T>& result) const {
    reset_gate_rnn_forward(shape, in, result);
  }

  template <class T>
  void backward(const ResetGateRnnShape& shape, const ResetGateRnnInput<T>& in, const ResetGateRnnGrad<T>& grad,
                const ResetGateRnnGradients<T>& wanted) const {
    reset_gate_rnn_backward(shape, in, grad, wanted);
  }
};

}  // namespace

// ---- registration --------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, library) {
  using torch::stable::Tensor;
  library.impl("reset_gate_rnn", TORCH_BOX((&reset_gate_rnn<CpuResetGateRnn, Tensor>)));
  library.impl("reset_gate_rnn_backward", TORCH_BOX((&reset_gate_rnn_backward<CpuResetGateRnn, Tensor>)));
}

}  // namespace dlkernels
