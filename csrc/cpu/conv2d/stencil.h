// What strategies without a matrix product share: the sums of conv2d seen one dimension at a time, and rows that lie
// padded in cache, so that the loops over them know no borders.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../../conv2d.h"
#include "../parallel.h"
#include "../simd.h"

namespace dlkernels {

// ---- one dimension -------------------------------------------------------------------------------

// Output i sums over taps t what the source has at i*step + first + t*spacing (zero outside [0, source)), times the
// weight at kernel position weight_first + t*weight_step, and lies at place_first + i*place_step.
struct Axis {
  int64_t outputs, source;
  int64_t step, first, spacing, taps;
  int64_t weight_first, weight_step;
  int64_t place_first, place_step;

  int64_t weight(int64_t t) const { return weight_first + t * weight_step; }
  int64_t place(int64_t i) const { return place_first + i * place_step; }
  // How many source positions, from the first to the last, `count` outputs in a row read.
  int64_t reach(int64_t count) const { return (count - 1) * step + (std::max<int64_t>(taps, 1) - 1) * spacing + 1; }
};

inline Axis forward_axis(int64_t source, int64_t outputs, int64_t kernel, int64_t stride, int64_t padding,
                         int64_t dilation) {
  return {outputs, source, stride, -padding, dilation, kernel, 0, 1, 0, 1};
}

// grad_input as such sums over grad. Input h takes part in output p through tap r when p*stride - padding + r*dilation
// = h. For the inputs h = phase + i*stride that asks for phase + padding - r*dilation to be a multiple of stride, which
// holds for every (stride / gcd(stride, dilation))-th r, and then p = i + (phase + padding - r*dilation) / stride. So a
// phase is a convolution with stride 1, whose taps are those r in falling order. One axis for each phase.
inline std::vector<Axis> gradient_axes(int64_t input, int64_t outputs, int64_t kernel, int64_t stride, int64_t padding,
                                       int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation), r_step = stride / common;
  std::vector<Axis> axes;
  for (int64_t phase = 0; phase < std::min(stride, input); ++phase) {
    Axis axis{ceil_div(input - phase, stride), outputs, 1, 0, dilation / common, 0, 0, -r_step, phase, stride};
    for (int64_t r = 0; r < kernel; ++r) {
      const int64_t offset = phase + padding - r * dilation;
      if (floor_mod(offset, stride) != 0) continue;
      axis.first = floor_div(offset, stride);
      axis.weight_first = r;
      ++axis.taps;
    }
    axes.push_back(axis);
  }
  return axes;
}

inline std::vector<Axis> forward_axes_h(const Conv2dShape& shape) {
  return {forward_axis(shape.H, shape.P, shape.R, shape.stride_h, shape.pad_top, shape.dilation_h)};
}
inline std::vector<Axis> forward_axes_w(const Conv2dShape& shape) {
  return {forward_axis(shape.W, shape.Q, shape.S, shape.stride_w, shape.pad_left, shape.dilation_w)};
}
inline std::vector<Axis> gradient_axes_h(const Conv2dShape& shape) {
  return gradient_axes(shape.H, shape.P, shape.R, shape.stride_h, shape.pad_top, shape.dilation_h);
}
inline std::vector<Axis> gradient_axes_w(const Conv2dShape& shape) {
  return gradient_axes(shape.W, shape.Q, shape.S, shape.stride_w, shape.pad_left, shape.dilation_w);
}

// ---- rows in cache -------------------------------------------------------------------------------

// How rows of one plane lie in cache: row y is the source's row origin_h + y, its column x the source's origin_w + x.
// Zero outside the source, and for a vector's width behind.
struct PaddedRows {
  int64_t origin_w, columns, pitch;

  template <class A>
  static PaddedRows of(int64_t origin_w, int64_t columns) {
    return {origin_w, columns, columns + kLanes<A>};
  }
};

// Fills the row at `to` from a source row (W), unit stride. Its columns outside the source stay: zeros, from before.
template <class T>
void pack_row(const PaddedRows& slab, const T* row, int64_t W, Accumulate<T>* to) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t begin = std::max<int64_t>(0, slab.origin_w), end = std::min(W, slab.origin_w + slab.columns);
  row += begin;
  to += begin - slab.origin_w;
  int64_t i = 0;
  for (; i + L <= end - begin; i += L) store_vector(to + i, load_as<A>(row + i));
  if (i < end - begin) store_vector(to + i, load_first_as<A>(row + i, end - begin - i));  // zeros behind the end
}

// Fills `rows` rows at `to` from the plane's rows origin_h, origin_h + 1, ...
template <class T>
void pack_rows(const PaddedRows& slab, const T* plane, int64_t stride_h, int64_t H, int64_t W, int64_t origin_h,
               int64_t rows, Accumulate<T>* to) {
  for (int64_t h = origin_h; h < origin_h + rows; ++h, to += slab.pitch) {
    if (h >= 0 && h < H) {
      pack_row(slab, plane + h * stride_h, W, to);
    } else {
      std::fill_n(to, slab.pitch, Accumulate<T>(0));
    }
  }
}

// ---- images whose innermost stride is not 1 ------------------------------------------------------

// The images themselves where their channels (channels_last) or columns lie side by side, else a copy where they do.
template <class T>
class Unstrided {
 public:
  Unstrided(const Strided4d<const T>& images, int64_t N, int64_t C, int64_t H, int64_t W, bool channels_last)
      : view_(images), copy_(fits(images, C, W, channels_last) ? 0 : N * C * H * W) {
    if (fits(images, C, W, channels_last)) return;
    T* to = copy_.data();
    const Strided4d<T> copy =
        channels_last ? Strided4d<T>{to, H * W * C, 1, W * C, C} : Strided4d<T>{to, C * H * W, H * W, W, 1};
    parallel_for(N * H, 1 + kElements / (C * W + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t n = row / H, h = row % H;
        const int64_t outer = channels_last ? W : C, inner = channels_last ? C : W;
        for (int64_t a = 0; a < outer; ++a) {
          for (int64_t b = 0; b < inner; ++b) {
            const int64_t c = channels_last ? b : a, w = channels_last ? a : b;
            copy.at(n, c, h, w) = images.at(n, c, h, w);
          }
        }
      }
    });
    view_ = {copy.data, copy.stride_n, copy.stride_c, copy.stride_h, copy.stride_w};
  }

  const Strided4d<const T>& view() const { return view_; }

 private:
  static constexpr int64_t kElements = 1 << 14;  // copied by a thread before a second one pays

  static bool fits(const Strided4d<const T>& images, int64_t C, int64_t W, bool channels_last) {
    return channels_last ? images.stride_c == 1 || C == 1 : images.stride_w == 1 || W == 1;
  }

  Strided4d<const T> view_;
  Scratch<T> copy_;
};

}  // namespace dlkernels
