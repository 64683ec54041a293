// conv2d and conv_transpose2d on the CPU: which strategy runs, and the operators' registration.
#include "../../conv2d.h"

#include <utility>
#include <vector>

#include "../parallel.h"
#include "../pool.h"
#include "../simd.h"
#include "across_images.h"
#include "depthwise.h"
#include "direct.h"
#include "panels.h"
#include "pointwise.h"
#include "small_channels.h"
#include "unfold.h"
#include "winograd.h"

namespace dlkernels {
namespace {

// In the order that `conv2d_by` counts them in.
enum class Strategy { kDirect, kPointwise, kDepthwise, kWinograd, kSmallChannels, kUnfold, kAcrossImages, kCount };

// The strategy that conv2d_by asks for, on this thread while it runs.
thread_local Strategy forced = Strategy::kCount;

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
    case Strategy::kSmallChannels:
      return run(SmallChannels{});
    case Strategy::kUnfold:
      return run(Unfold{});
    case Strategy::kAcrossImages:
      return run(AcrossImages{});
  }
}

enum class Pass { kForward, kGradInput, kGradWeight };

constexpr bool kFewRegisters = kVectorRegisters < 32;

// In multiply-adds for each pair of channels: 16 for a tile and a fifth more for its transforms, which many channels
// share, and what transforming a kernel costs more than packing it. Few channels share too little: 16 in and out, which
// leave no lane of `direct` empty, are faster there. Measured, as the constants.
bool winograd_pays(const Conv2dShape& shape, Pass pass) {
  constexpr int64_t kKernelCost = 136, kFewProducts = 16 * 16, kManyProducts = 256 * 256;
  constexpr int64_t kManyProductsTiles = 32;
  const bool grad_weight = pass == Pass::kGradWeight;
  const int64_t least_channels = grad_weight ? 8 : kFewRegisters ? 24 : 16;
  const int64_t tiles = shape.N * ceil_div(shape.P, 2) * ceil_div(shape.Q, 2), pixels = shape.N * shape.P * shape.Q;
  const int64_t C = shape.C / shape.G, K = shape.K / shape.G;
  if (!Winograd::can(shape) || std::min(C, K) < least_channels) return false;
  if (!grad_weight && C * K <= kFewProducts) return false;
  // sums of many products leave the cache before they are transformed back
  if (grad_weight && C * K > kManyProducts && tiles < kManyProductsTiles) return false;
  return 16 * tiles * 6 / 5 + kKernelCost < 9 * pixels;
}

// Where output channels or input channels as vectors would be mostly padding. Measured, as the constants: where the
// strategy has to transpose its output, for channels_last, `direct` is faster as soon as output channels fill a vector,
// and with several input channels; so it is for grad_weight. In planes, 8 channels pay, or 16 in and out, where rows
// leave hardly a lane empty; and pairs of rows where output channels leave a quarter of their vectors empty.
// grad_weight has a vector of sums for each weight, and they come from cache and go there for each block of rows.
//
// 16 registers hold few sums beside a kernel's rows, and `direct` is faster sooner: where there is no loop for the
// rows; for more output channels than fill a vector, with 5 input channels or more, and for grad_weight with kernels of
// 4 rows or more or a stride; where output channels fill their vectors, for such kernels on several input channels, and
// for a stride on many output channels.
bool small_channels_pay(const Conv2dShape& shape, Pass pass, bool channels_last) {
  constexpr int64_t kFew = 4, kMore = 8, kMost = SmallChannels::kMostChannels, kFewTaps = 100, kFewColumns = 16;
  constexpr int64_t kManyPixels = 512, kManyVectors = 4, L = kLanes<float>;
  const int64_t C = shape.C / shape.G, K = shape.K / shape.G;
  if (!SmallChannels::can(shape)) return false;
  if (pass == Pass::kGradWeight) {
    if (channels_last || shape.Q < kFewColumns || C * shape.R * shape.S > kFewTaps) return false;
    if (kFewRegisters && K > L && (shape.R > 3 || shape.stride_w > 1)) return false;
    return C <= kFew || (C <= kMore && K <= L);
  }
  if (shape.G > 1) return std::max(C, K) < L;
  const bool many_pixels = shape.N * shape.P * shape.Q >= kManyPixels;
  const auto planes_fill_lanes = [&](int64_t columns) {
    const bool fills = 8 * columns >= 7 * ceil_div(columns, L) * L;
    return fills && many_pixels && !channels_last && SmallChannels::knows_rows(shape);
  };
  if (pass == Pass::kGradInput) {
    return C <= std::max<int64_t>(kFew, L * 2 / 3) || (!kFewRegisters && K <= kMost && planes_fill_lanes(shape.W));
  }
  if (channels_last) return C == 1 && K < L;
  const bool fills_vectors = 4 * K > 3 * ceil_div(K, L) * L;
  if (kFewRegisters && fills_vectors) {
    if ((shape.R > 3 && C > 1) || (shape.stride_w > 1 && K >= kManyVectors * L)) return false;
  }
  if (C <= kFew && (!kFewRegisters || SmallChannels::knows_rows(shape))) return true;
  if ((!kFewRegisters || K <= L) && (C <= kMore || K <= kMost) && planes_fill_lanes(shape.Q)) return true;
  return !fills_vectors && SmallChannels::pairs_rows(shape);
}

// In planes, where the pixels of a channel fill vectors as they lie. In channels_last they have to be transposed, which
// costs less than packing weights that few pixels use, as long as a panel of pixels stays in the first cache. Measured,
// as the constants, with 16 registers.
bool pointwise_pays(const Conv2dShape& shape, Pass pass, bool channels_last) {
  constexpr int64_t kFewPixels = 64, kManyChannels = 1024;
  if (!Pointwise::can(shape)) return false;
  if (!channels_last) return true;
  const bool few_pixels = shape.N * shape.P * shape.Q <= kFewPixels && shape.C < kManyChannels;
  return kFewRegisters && pass == Pass::kForward && shape.G == 1 && few_pixels;
}

// Where each weight is used so few times that packing it costs more. Measured, as the constants: the gradients pay for
// a panel of pixels, and where there are no more input channels, which are unfolded or folded, than output channels.
bool unfold_pays(const Conv2dShape& shape, Pass pass) {
  constexpr int64_t kFewPixels = 16, kPanelPixels = kPanelVectors * kLanes<float>, kManyWeights = 1 << 14;
  const int64_t pixels = shape.N * shape.P * shape.Q, weights = shape.K * shape.C * shape.R * shape.S;
  if (!Unfold::can(shape) || shape.G > 1 || weights < kManyWeights) return false;
  if (pass == Pass::kForward) return pixels <= kFewPixels;
  const bool winograd = pass == Pass::kGradInput && winograd_pays(shape, pass);
  return shape.C <= shape.K && pixels <= (winograd ? kFewPixels : kPanelPixels);
}

// For whole vectors of images, where target channels leave a quarter of their vectors or more empty: there it is faster
// than what fills them with channels or with narrow rows, 3 x 3 of `winograd` included, while the turned images stay in
// the second cache. Measured, as the constants, with 32 registers.
bool across_images_pay(const Conv2dShape& shape, Pass pass) {
  constexpr int64_t L = kLanes<float>, kFewChannels = 3, kMostBytes = 1 << 20;
  if (kFewRegisters || !AcrossImages::can(shape) || shape.R * shape.S == 1) return false;
  const int64_t M = pass == Pass::kGradInput ? shape.C : shape.K;
  const int64_t elements = shape.C * shape.H * shape.W + shape.K * shape.P * shape.Q;
  const bool fills_lanes = shape.N >= 2 * L && 4 * shape.N >= 3 * ceil_div(shape.N, L) * L;
  const bool fills_vectors = 4 * M > 3 * ceil_div(M, L) * L;
  return fills_lanes && !fills_vectors && std::min(shape.C, shape.K) >= kFewChannels &&
         elements * kVectorBytes <= kMostBytes;
}

// The one chooser: by shape and memory format, never by thread count or alignment, so that the bits stay the same.
Strategy choose(const Conv2dShape& shape, Pass pass, bool channels_last) {
  if (Depthwise::can(shape)) return Strategy::kDepthwise;
  if (pass == Pass::kGradWeight && unfold_pays(shape, pass)) return Strategy::kUnfold;
  if (pointwise_pays(shape, pass, channels_last)) return Strategy::kPointwise;
  if (across_images_pay(shape, pass)) return Strategy::kAcrossImages;
  if (small_channels_pay(shape, pass, channels_last)) return Strategy::kSmallChannels;
  if (unfold_pays(shape, pass)) return Strategy::kUnfold;
  if (winograd_pays(shape, pass)) return Strategy::kWinograd;
  return Strategy::kDirect;
}

// 16-bit images, kernels and gradients as the strategies take them, in float: all of a tensor, in its own memory order.
template <class T>
class InFloat {
 public:
  InFloat(const Strided4d<T>& images, int64_t N, int64_t C, int64_t H, int64_t W)
      : images_(images), data_(N * C * H * W) {
    const bool channels_last = images.stride_c == 1;
    const Ints strides = strides_4d({N, C, H, W}, channels_last);
    view_ = {data_.data(), strides[0], strides[1], strides[2], strides[3]};
    if (channels_last) order_ = {N, H, W, C, images.stride_h, images.stride_w, 1};
    if (!channels_last) order_ = {N, C, H, W, images.stride_c, images.stride_h, images.stride_w};
  }

  Strided4d<const float> load() {
    for_each_row([&](T* row, int64_t stride, float* copy, int64_t count) {
      if (stride == 1) return convert_row(row, count, copy);
      for (int64_t x = 0; x < count; ++x) copy[x] = dlkernels::load(row[x * stride]);
    });
    return {view_.data, view_.stride_n, view_.stride_c, view_.stride_h, view_.stride_w};
  }
  Strided4d<float> view() const { return view_; }
  void store() const {
    for_each_row([&](T* row, int64_t stride, const float* copy, int64_t count) {
      if (stride == 1) return convert_row(copy, count, row);
      for (int64_t x = 0; x < count; ++x) row[x * stride] = dlkernels::store<T>(copy[x]);
    });
  }

 private:
  // Images, and the three dimensions of an image in the order of the copy's memory; strides are the tensor's.
  struct Order {
    int64_t N, outer, middle, inner;
    int64_t stride_outer, stride_middle, stride_inner;
  };

  template <class Run>
  void for_each_row(const Run& run) const {
    constexpr int64_t kTaskElements = 1 << 14;
    const int64_t inner = order_.inner, rows = order_.N * order_.outer * order_.middle;
    parallel_for(
        rows, std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, inner)), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            const int64_t middle = row % order_.middle, outer = row / order_.middle % order_.outer;
            const int64_t n = row / order_.middle / order_.outer;
            T* from = images_.data + n * images_.stride_n + outer * order_.stride_outer + middle * order_.stride_middle;
            run(from, order_.stride_inner, view_.data + row * inner, inner);
          }
        });
  }

  Strided4d<T> images_;
  Scratch<float> data_;
  Strided4d<float> view_;
  Order order_;
};

template <class T>
constexpr bool kIs16Bit = !std::is_same_v<T, Accumulate<T>>;

struct CpuConv2d : CpuKernels {
  using CpuKernels::CpuKernels;

  template <class T>
  void forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
               int64_t bias_stride, Strided4d<T> output) const {
    if constexpr (kIs16Bit<T>) {
      const std::vector<float> offsets = in_float(bias, bias_stride, shape.K);
      InFloat<const T> x(input, shape.N, shape.C, shape.H, shape.W),
          w(weight, shape.K, shape.C / shape.G, shape.R, shape.S);
      InFloat<T> y(output, shape.N, shape.K, shape.P, shape.Q);
      forward(shape, x.load(), w.load(), bias == nullptr ? nullptr : offsets.data(), 1, y.view());
      y.store();
    } else {
      run(shape, Pass::kForward, output,
          [&](auto strategy) { strategy.forward(shape, input, weight, bias, bias_stride, output); });
    }
  }
  template <class T>
  void grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                  int64_t bias_stride, Strided4d<T> grad_input) const {
    if constexpr (kIs16Bit<T>) {
      const std::vector<float> offsets = in_float(bias, bias_stride, shape.C);
      InFloat<const T> dy(grad, shape.N, shape.K, shape.P, shape.Q),
          w(weight, shape.K, shape.C / shape.G, shape.R, shape.S);
      InFloat<T> dx(grad_input, shape.N, shape.C, shape.H, shape.W);
      this->grad_input(shape, dy.load(), w.load(), bias == nullptr ? nullptr : offsets.data(), 1, dx.view());
      dx.store();
    } else {
      run(shape, Pass::kGradInput, grad_input,
          [&](auto strategy) { strategy.grad_input(shape, grad, weight, bias, bias_stride, grad_input); });
    }
  }
  template <class T>
  void grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                   Strided4d<T> grad_weight) const {
    if constexpr (kIs16Bit<T>) {
      InFloat<const T> dy(grad, shape.N, shape.K, shape.P, shape.Q), x(input, shape.N, shape.C, shape.H, shape.W);
      InFloat<T> dw(grad_weight, shape.K, shape.C / shape.G, shape.R, shape.S);
      this->grad_weight(shape, dy.load(), x.load(), dw.view());
      dw.store();
    } else {
      run(shape, Pass::kGradWeight, input,
          [&](auto strategy) { strategy.grad_weight(shape, grad, input, grad_weight); });
    }
  }
  template <class T>
  void grad_bias(const Conv2dShape& shape, Strided4d<const T> grad, T* grad_bias) const {
    conv2d_grad_bias(shape, grad, grad_bias);
  }

 private:
  template <class T>
  static std::vector<float> in_float(const T* bias, int64_t stride, int64_t count) {
    std::vector<float> values(bias == nullptr ? 0 : count);
    for (size_t i = 0; i < values.size(); ++i) values[i] = load(bias[int64_t(i) * stride]);
    return values;
  }

  template <class T, class Run>
  void run(const Conv2dShape& shape, Pass pass, const Strided4d<T>& images, const Run& run) const {
    if constexpr (std::is_same_v<std::remove_const_t<T>, double>) {  // to check derivatives with: right, not fast
      run(Direct{});
    } else {
      const Strategy strategy = forced != Strategy::kCount ? forced : choose(shape, pass, images.stride_c == 1);
      with_strategy(strategy, [&](auto chosen) {
        check(chosen.can(shape), "conv2d: this strategy cannot do this shape");
        run(chosen);
      });
    }
  }
};

// ---- one strategy, whatever the chooser says: for tests ------------------------------------------

using Tensor = torch::stable::Tensor;

// Calls run() with `forced` set.
template <class Run>
auto with_forced(int64_t strategy, const Run& run) {
  check(strategy >= 0 && strategy < int(Strategy::kCount), "conv2d_by: strategy must be below ", int(Strategy::kCount),
        ", got ", strategy);
  struct Restore {
    ~Restore() { forced = Strategy::kCount; }
  } restore;
  forced = Strategy(strategy);
  return run();
}

Tensor conv2d_by(int64_t strategy, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 Ints stride, Ints padding, Ints dilation, int64_t groups) {
  return with_forced(strategy,
                     [&] { return conv2d<CpuConv2d, Tensor>(input, weight, bias, stride, padding, dilation, groups); });
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward_by(int64_t strategy, const Tensor& grad, const Tensor& input,
                                                      const Tensor& weight, Ints stride, Ints padding, Ints dilation,
                                                      int64_t groups, std::vector<bool> output_mask) {
  return with_forced(strategy, [&] {
    return conv2d_backward<CpuConv2d, Tensor>(grad, input, weight, stride, padding, dilation, groups, output_mask);
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
