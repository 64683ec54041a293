// conv2d and conv_transpose2d on the CPU: which strategy runs, and the operators' registration.
#include "../../conv2d.h"

#include <utility>

#include "../pool.h"
#include "depthwise.h"
#include "direct.h"
#include "pointwise.h"
#include "winograd.h"

namespace dlkernels {
namespace {

// In the order that `conv2d_by` counts them in.
enum class Strategy { kDirect, kPointwise, kDepthwise, kWinograd, kCount };

template <class Run>
void with_strategy(Strategy strategy, const Run& run) {
  switch (strategy) {
    case Strategy::kCount:
    case Strategy::kDirect:
      return run(Direct{});
    case Strategy::kPointwise:
      return run(Pointwise{});
    case Strategy::kDepthwise:
      return run(Depthwise{});
    case Strategy::kWinograd:
      return run(Winograd{});
  }
}

enum class Pass { kForward, kGradInput, kGradWeight };

// In multiply-adds for each pair of channels: 16 for a tile and a fifth more for its transforms, which many channels
// share, and what transforming a kernel costs more than packing it. Measured, as the constants.
bool winograd_pays(const Conv2dShape& shape, Pass pass) {
  constexpr int64_t kKernelCost = 128, kManyProducts = 256 * 256, kManyProductsTiles = 32;
  const bool grad_weight = pass == Pass::kGradWeight;
  const int64_t least_channels = grad_weight ? 16 : 24;
  const int64_t tiles = shape.N * ceil_div(shape.P, 2) * ceil_div(shape.Q, 2), pixels = shape.N * shape.P * shape.Q;
  const int64_t C = shape.C / shape.G, K = shape.K / shape.G;
  if (!Winograd::can(shape) || std::min(C, K) < least_channels) return false;
  // sums of many products leave the cache before they are transformed back
  if (grad_weight && C * K > kManyProducts && tiles < kManyProductsTiles) return false;
  return 16 * tiles * 6 / 5 + kKernelCost < 9 * pixels;
}

// The one chooser: by shape and memory format, never by thread count or alignment, so that the bits stay the same.
Strategy choose(const Conv2dShape& shape, Pass pass, bool channels_last) {
  if (Depthwise::can(shape)) return Strategy::kDepthwise;
  if (Pointwise::can(shape) && !channels_last) return Strategy::kPointwise;
  if (winograd_pays(shape, pass)) return Strategy::kWinograd;
  return Strategy::kDirect;
}

struct CpuConv2d : CpuKernels {
  explicit CpuConv2d(const torch::stable::Tensor& input, Strategy forced = Strategy::kCount)
      : CpuKernels(input), forced_(forced) {}

  template <class T>
  void forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
               int64_t bias_stride, Strided4d<T> output) const {
    run(shape, Pass::kForward, output,
        [&](auto strategy) { strategy.forward(shape, input, weight, bias, bias_stride, output); });
  }
  template <class T>
  void grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                  int64_t bias_stride, Strided4d<T> grad_input) const {
    run(shape, Pass::kGradInput, grad_input,
        [&](auto strategy) { strategy.grad_input(shape, grad, weight, bias, bias_stride, grad_input); });
  }
  template <class T>
  void grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                   Strided4d<T> grad_weight) const {
    run(shape, Pass::kGradWeight, input, [&](auto strategy) { strategy.grad_weight(shape, grad, input, grad_weight); });
  }
  template <class T>
  void grad_bias(const Conv2dShape& shape, Strided4d<const T> grad, T* grad_bias) const {
    conv2d_grad_bias(shape, grad, grad_bias);
  }

 private:
  template <class T, class Run>
  void run(const Conv2dShape& shape, Pass pass, const Strided4d<T>& images, const Run& run) const {
    const Strategy strategy = forced_ != Strategy::kCount ? forced_ : choose(shape, pass, images.stride_c == 1);
    with_strategy(strategy, [&](auto chosen) {
      check(chosen.can(shape), "conv2d: this strategy cannot do this shape");
      run(chosen);
    });
  }

  Strategy forced_;
};

// ---- one strategy, whatever the chooser says: for tests ------------------------------------------

template <Strategy STRATEGY>
struct Forced : CpuConv2d {
  explicit Forced(const torch::stable::Tensor& input) : CpuConv2d(input, STRATEGY) {}
};

// Calls run(Forced<strategy>'s type) for the strategy of that number.
template <class Result, class Run>
Result with_forced(int64_t strategy, const Run& run) {
  return [&]<int... I>(std::integer_sequence<int, I...>) {
    Result result;
    const bool known = ((strategy == I && (result = run(std::type_identity<Forced<Strategy(I)>>{}), true)) || ...);
    check(known, "conv2d_by: strategy must be below ", int(Strategy::kCount), ", got ", strategy);
    return result;
  }(std::make_integer_sequence<int, int(Strategy::kCount)>{});
}

using Tensor = torch::stable::Tensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Tensor conv2d_by(int64_t strategy, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 Ints stride, Ints padding, Ints dilation, int64_t groups) {
  return with_forced<Tensor>(strategy, [&](auto forced) {
    return conv2d<typename decltype(forced)::type>(input, weight, bias, stride, padding, dilation, groups);
  });
}

Gradients conv2d_backward_by(int64_t strategy, const Tensor& grad, const Tensor& input, const Tensor& weight,
                             Ints stride, Ints padding, Ints dilation, int64_t groups, std::vector<bool> output_mask) {
  return with_forced<Gradients>(strategy, [&](auto forced) {
    return conv2d_backward<typename decltype(forced)::type>(grad, input, weight, stride, padding, dilation, groups,
                                                            output_mask);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, library) {
  library.impl("conv2d", TORCH_BOX((&conv2d<CpuConv2d, Tensor>)));
  library.impl("conv2d_backward", TORCH_BOX((&conv2d_backward<CpuConv2d, Tensor>)));
  library.impl("conv_transpose2d", TORCH_BOX((&conv_transpose2d<CpuConv2d, Tensor>)));
  library.impl("conv_transpose2d_backward", TORCH_BOX((&conv_transpose2d_backward<CpuConv2d, Tensor>)));
  library.impl("conv2d_by", TORCH_BOX(&conv2d_by));
  library.impl("conv2d_backward_by", TORCH_BOX(&conv2d_backward_by));
}

}  // namespace dlkernels
