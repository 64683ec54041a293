// conv2d with kernels of 1 x 1 as a matrix product whose columns are pixels.
//
//   output    [k, x] = bias[k] + sum over c of weight[k, c] * input[c, x]     x: n, p, q
//   grad_input[c, x] =           sum over k of weight[k, c] * grad [k, x]
//
// In planes (NCHW) the pixels of a channel lie side by side: they fill the vectors, and nothing is transposed, neither
// read nor written. Who owns what: a task owns a panel of pixels, of any number of images, and some of the channels.
// Passes over memory: the pixels are copied once per task, into a panel that stays in cache; results are written once.
#include "pointwise.h"

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "direct.h"
#include "panels.h"
#include "slab.h"

namespace dlkernels {
namespace {

// ---- kernels -------------------------------------------------------------------------------------

// columns[d][lane] = pixel panel.first + lane of channel d, 0 for the padding; columns (D, panel.width)
//
// In planes each channel's pixels lie on a page of their own, and the processor foresees none of them: the next
// panel's, which lie behind this one's, are asked for here, and arrive while this one is multiplied.
template <class T>
void pack_pixels(const Pixels<const T>& pixels, int64_t channel, int64_t D, const Panel& panel, T* columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (panel.count < panel.width) std::fill_n(columns, D * panel.width, T(0));
  if (D == 0) return;  // there is no memory to point into
  pixels.for_each_run(panel.first, panel.count, [&](const T* first, int64_t lane, int64_t length) {
    const bool next_lies_behind = pixels.stride_w() == 1 && lane + length == panel.count;
    const int64_t fetched = next_lies_behind ? panel.width : 0;
    for (int64_t d = 0; d < D; ++d) {
      const T* from = first + (channel + d) * pixels.image.stride_c;
      for (int64_t i = 0; i < fetched; i += kLine) __builtin_prefetch(from + length + i, 0, 2);
      copy_pixels(from, pixels.stride_w(), 1, length, 1, columns + d * panel.width + lane, 1);
    }
  });
}

// weight[m, d] of group g lies at data[g*stride_g + m*stride_m + d*stride_d].
template <class T>
struct Matrix {
  const T* data;
  int64_t stride_g, stride_m, stride_d;
};

// Where the sums of a panel are made, rows[m]: in the target where all its pixels lie there side by side (true), else
// in `sums` (M, panel.width).
template <class T>
bool rows_of_sums(const Pixels<T>& target, int64_t channel, const Panel& panel, T* sums, std::vector<T*>& rows) {
  bool in_place = false;
  target.for_each_run(panel.first, panel.count, [&](T* first, int64_t, int64_t length) {
    in_place = length == panel.width && target.stride_w() == 1;
    for (size_t m = 0; m < rows.size(); ++m) rows[m] = first + (channel + int64_t(m)) * target.image.stride_c;
  });
  if (in_place) return true;
  for (size_t m = 0; m < rows.size(); ++m) rows[m] = sums + int64_t(m) * panel.width;
  return false;
}

// ---- launchers -----------------------------------------------------------------------------------

// target[g*M + m, x] = bias[g*M + m] + sum over d of weight[m, d] * source[g*D + d, x]
template <class T>
void multiply_pixels(int64_t pixels, int64_t G, int64_t M, int64_t D, const Pixels<const T>& source,
                     const Matrix<T>& matrix, const T* bias, int64_t bias_stride, const Pixels<T>& target) {
  if (pixels == 0 || M == 0) return;
  std::vector<std::vector<int64_t>> depth;
  const Pieces cuts(D, kBlockTerms);
  for (int64_t b = 0; b < cuts.count; ++b) {
    depth.emplace_back();
    for (int64_t d = cuts.begin(b); d < cuts.begin(b + 1); ++d) depth.back().push_back(d * matrix.stride_d);
  }
  const PanelCuts<T> panels(pixels);
  const int64_t most_width = std::min<int64_t>(kPanelVectors * kLanes<T>, panels.padded());
  const Pieces splits = split_evenly(M, G * panels.count());
  const int64_t products = splits.most() * D * most_width;
  parallel_for(G * panels.count() * splits.count, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<T> columns(D * most_width), sums(splits.most() * most_width);
    std::vector<int64_t> offsets(splits.most());
    for (int64_t m = 0; m < splits.most(); ++m) offsets[m] = m * matrix.stride_m;
    std::vector<T*> rows;
    const T zeros[kPanelVectors * kLanes<T>] = {};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % splits.count, g = task / splits.count / panels.count();
      const Panel panel = panels[task / splits.count % panels.count()];
      const int64_t channel = g * M + splits.begin(split), channels = splits.length(split);
      pack_pixels(source, g * D, D, panel, columns.data());
      rows.resize(channels);
      const bool in_place = rows_of_sums(target, channel, panel, sums.data(), rows);
      const bool begun = bias != nullptr || D == 0;  // else the first block writes sums instead of adding to them
      for (int64_t m = 0; begun && m < channels; ++m) {
        std::fill_n(rows[m], panel.width, bias != nullptr ? bias[(channel + m) * bias_stride] : T(0));
      }
      const T* from = matrix.data + g * matrix.stride_g + splits.begin(split) * matrix.stride_m;
      const T* block = columns.data();
      for (size_t b = 0; b < depth.size(); ++b) {
        multiply<T>(channels, from, offsets.data(), depth[b], block, panel.width, panel.width,
                    b == 0 && !begun ? zeros : nullptr, rows.data(), {.sums = b == 0 && in_place});
        block += cuts.length(b) * panel.width;
      }
      if (!in_place) unpack_pixels(sums.data(), channel, channels, panel, target);
    }
  });
}

}  // namespace

// ---- entry points --------------------------------------------------------------------------------

template <class T>
void Pointwise::forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                        int64_t bias_stride, Strided4d<T> output) {
  const int64_t M = shape.K / shape.G, D = shape.C / shape.G;
  const Pixels<const T> source = {input, shape.P, shape.Q, shape.stride_h, shape.stride_w};
  const Pixels<T> target = {output, shape.P, shape.Q, 1, 1};
  const Matrix<T> matrix = {weight.data, M * weight.stride_n, weight.stride_n, weight.stride_c};
  multiply_pixels(shape.N * shape.P * shape.Q, shape.G, M, D, source, matrix, bias, bias_stride, target);
}

// Pixels that no output reads have no gradient but the bias.
template <class T>
void Pointwise::grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                           int64_t bias_stride, Strided4d<T> grad_input) {
  const int64_t M = shape.C / shape.G, D = shape.K / shape.G;
  if (shape.N == 0 || shape.C == 0) return;
  if (shape.P < shape.H || shape.Q < shape.W) {
    fill_with_bias(shape, bias, bias_stride, grad_input);
  }
  const Pixels<const T> source = {grad, shape.P, shape.Q, 1, 1};
  const Pixels<T> target = {grad_input, shape.P, shape.Q, shape.stride_h, shape.stride_w};
  const Matrix<T> matrix = {weight.data, D * weight.stride_n, weight.stride_c, weight.stride_n};
  multiply_pixels(shape.N * shape.P * shape.Q, shape.G, M, D, source, matrix, bias, bias_stride, target);
}

template <class T>
void Pointwise::grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                            Strided4d<T> grad_weight) {
  Direct::grad_weight(shape, grad, input, grad_weight);
}

template void Pointwise::forward(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                 int64_t, Strided4d<float>);
template void Pointwise::grad_input(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                    int64_t, Strided4d<float>);
template void Pointwise::grad_weight(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>,
                                     Strided4d<float>);

}  // namespace dlkernels
