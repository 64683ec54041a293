// Runs conv2d's CPU kernels on random shapes, layouts and small integers, in buffers of the exact size, and compares
// them with the sums of csrc/conv2d.h. Built with the address and undefined-behaviour, or the thread sanitizer.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cpu/conv2d/across_images.h"
#include "../../csrc/cpu/conv2d/depthwise.h"
#include "../../csrc/cpu/conv2d/direct.h"
#include "../../csrc/cpu/conv2d/pointwise.h"
#include "../../csrc/cpu/conv2d/small_channels.h"
#include "../../csrc/cpu/conv2d/unfold.h"
#include "../../csrc/cpu/conv2d/winograd.h"

using namespace dlkernels;

namespace {

std::mt19937 generator(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// A 4-D tensor of small integers in a buffer that ends with its last element.
template <class T>
struct Image {
  std::vector<int64_t> sizes;
  Ints strides;
  std::vector<T> values;

  explicit Image(std::vector<int64_t> sizes)
      : sizes(sizes), strides(strides_4d(sizes, draw(0, 1))), values(sizes[0] * sizes[1] * sizes[2] * sizes[3]) {
    for (T& value : values) value = store<T>(Accumulate<T>(draw(-2, 2)));
  }
  template <class U>
  Strided4d<U> view() {
    return {values.data(), strides[0], strides[1], strides[2], strides[3]};
  }
  double at(int64_t n, int64_t c, int64_t h, int64_t w) { return load(view<T>().at(n, c, h, w)); }
};

Conv2dShape random_shape() {
  while (true) {
    Conv2dShape s{};
    s.G = draw(1, 3);
    s.N = draw(0, 3), s.C = s.G * draw(0, 9), s.H = draw(1, 21), s.W = draw(1, 21);
    s.K = s.G * draw(1, 20), s.R = draw(1, 4), s.S = draw(1, 4);
    s.stride_h = draw(1, 3), s.stride_w = draw(1, 3);
    s.pad_top = draw(0, 3), s.pad_left = draw(0, 3);
    s.dilation_h = draw(1, 3), s.dilation_w = draw(1, 3);
    switch (draw(0, 3)) {  // what a strategy is made for
      case 0:
        s.G = s.C = s.K = draw(1, 40);
        break;
      case 1:
        s.R = s.S = 1, s.pad_top = s.pad_left = 0;
        break;
      case 2:
        s.R = s.S = 3, s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    }
    const int64_t room_h = s.H + s.pad_top + draw(0, 2) - s.dilation_h * (s.R - 1) - 1;
    const int64_t room_w = s.W + s.pad_left + draw(0, 2) - s.dilation_w * (s.S - 1) - 1;
    s.P = room_h / s.stride_h + 1, s.Q = room_w / s.stride_w + 1;
    s.H += draw(0, 2), s.W += draw(0, 2);  // as conv_transpose2d's output_padding makes it
    if (room_h >= 0 && room_w >= 0) return s;
  }
}

template <class T>
void expect(double got, double expected, const char* what) {
  if (got == load(store<T>(Accumulate<T>(expected)))) return;
  std::printf("%s: got %g, expected %g\n", what, got, expected);
  std::exit(1);
}

// Whether the strategy can do the shape; then its results are right.
template <class Strategy, class T>
bool check(const Conv2dShape& s) {
  if (!Strategy::can(s)) return false;
  const int64_t channels = s.C / s.G, kernels = s.K / s.G;
  Image<T> input({s.N, s.C, s.H, s.W}), weight({s.K, channels, s.R, s.S}), grad({s.N, s.K, s.P, s.Q});
  Image<T> output({s.N, s.K, s.P, s.Q}), grad_input(input), grad_weight(weight);
  std::vector<T> bias(s.K, store<T>(1)), bias_of_input(s.C, store<T>(2)), grad_bias(s.K);
  Strategy::template forward<T>(s, input.template view<const T>(), weight.template view<const T>(), bias.data(), 1,
                                output.template view<T>());
  Strategy::template grad_input<T>(s, grad.template view<const T>(), weight.template view<const T>(),
                                   bias_of_input.data(), 1, grad_input.template view<T>());
  Strategy::template grad_weight<T>(s, grad.template view<const T>(), input.template view<const T>(),
                                    grad_weight.template view<T>());
  conv2d_grad_bias<T>(s, grad.template view<const T>(), grad_bias.data());

  // every product of the definition, added where it belongs
  std::vector<double> y(output.values.size(), 1.0), dx(input.values.size(), 2.0), dw(weight.values.size()), db(s.K);
  const auto index = [](const auto& sizes, int64_t a, int64_t b, int64_t c, int64_t d) {
    return ((a * sizes[1] + b) * sizes[2] + c) * sizes[3] + d;
  };
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t k = 0; k < s.K; ++k)
      for (int64_t p = 0; p < s.P; ++p)
        for (int64_t q = 0; q < s.Q; ++q) {
          db[k] += grad.at(n, k, p, q);
          for (int64_t d = 0; d < channels; ++d)
            for (int64_t r = 0; r < s.R; ++r)
              for (int64_t t = 0; t < s.S; ++t) {
                const int64_t c = k / kernels * channels + d;
                const int64_t h = p * s.stride_h - s.pad_top + r * s.dilation_h;
                const int64_t w = q * s.stride_w - s.pad_left + t * s.dilation_w;
                if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
                y[index(output.sizes, n, k, p, q)] += weight.at(k, d, r, t) * input.at(n, c, h, w);
                dx[index(input.sizes, n, c, h, w)] += weight.at(k, d, r, t) * grad.at(n, k, p, q);
                dw[index(weight.sizes, k, d, r, t)] += input.at(n, c, h, w) * grad.at(n, k, p, q);
              }
        }
  const auto compare = [&](Image<T>& image, const std::vector<double>& expected, const char* what) {
    const auto& z = image.sizes;
    for (int64_t i = 0; i < int64_t(expected.size()); ++i) {
      expect<T>(image.at(i / z[3] / z[2] / z[1], i / z[3] / z[2] % z[1], i / z[3] % z[2], i % z[3]), expected[i], what);
    }
  };
  compare(output, y, "output");
  compare(grad_input, dx, "grad_input");
  compare(grad_weight, dw, "grad_weight");
  for (int64_t k = 0; k < s.K; ++k) expect<T>(load(grad_bias[k]), db[k], "grad_bias");
  return true;
}

// No images, or images without channels, whose tensors have no memory. (No output channels are refused before.)
template <class Strategy>
void check_empty_shapes() {
  Conv2dShape full{};
  full.G = 1, full.N = 2, full.C = 3, full.H = full.W = full.P = full.Q = 5, full.K = 4, full.R = full.S = 1;
  full.stride_h = full.stride_w = full.dilation_h = full.dilation_w = 1;
  for (int64_t Conv2dShape::* size : {&Conv2dShape::N, &Conv2dShape::C}) {
    for (int64_t kernel : {1, 3}) {
      Conv2dShape s = full;
      s.*size = 0;
      s.R = s.S = kernel, s.pad_top = s.pad_left = kernel / 2;
      check<Strategy, float>(s);
    }
  }
}

}  // namespace

int main() {
  check_empty_shapes<Direct>();
  check_empty_shapes<Pointwise>();
  check_empty_shapes<Depthwise>();
  check_empty_shapes<Winograd>();
  check_empty_shapes<SmallChannels>();
  check_empty_shapes<Unfold>();
  check_empty_shapes<AcrossImages>();
  int direct = 0, pointwise = 0, depthwise = 0, winograd = 0, small_channels = 0, unfold = 0, across_images = 0;
  for (int round = 0; round < 120; ++round) {
    direct += check<Direct, double>(random_shape()) + check<Direct, float>(random_shape());
    pointwise += check<Pointwise, float>(random_shape());
    depthwise += check<Depthwise, float>(random_shape());
    winograd += check<Winograd, float>(random_shape());
    small_channels += check<SmallChannels, float>(random_shape());
    unfold += check<Unfold, float>(random_shape());
    across_images += check<AcrossImages, float>(random_shape());
  }
  std::printf(
      "conv2d: right for so many random shapes: direct %d, pointwise %d, depthwise %d, winograd %d, small_channels %d, "
      "unfold %d, across_images %d\n",
      direct, pointwise, depthwise, winograd, small_channels, unfold, across_images);
  const auto counts = {direct, pointwise, depthwise, winograd, small_channels, unfold, across_images};
  return std::all_of(counts.begin(), counts.end(), [](int count) { return count > 0; }) ? 0 : 1;
}
