// conv2d of a batch of small images: each lane of a vector computes an image of its own.
//
//   output     [k, i, j] = bias[k] + sum over c, r, s of input[c, i + r, j + s] * weight[k, c, r, s]
//   grad_input [c, i, j] =           sum over k, r, s of grad [k, i - r, j - s] * weight[k, c, r, s]
//   grad_weight[k, c, r, s] =        sum over i, j, n of grad [k, i, j] * input[c, i + r, j + s]
//
// where every input, output and gradient is a vector of as many images. Rows of 8 or 10 pixels, or 10 channels, leave a
// part of each vector empty elsewhere; here no lane is empty, and what lies outside an image is not summed but for a
// few columns. It costs turning the images: input[c, i, j] of L images, which lie an image apart, becomes a vector, and
// the results come back the same way, blocks of L x L elements at a time.
//
// Who owns what: a task owns L images and a slice of their results (of grad_weight: a stretch of images, and some
// output channels); what it turns stays in the second cache. The stretches' sums are added in order. Passes over
// memory: each image is read and written once.
#include "across_images.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "../gemm.h"
#include "../parallel.h"
#include "direct.h"
#include "panels.h"
#include "stencil.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

// A tile of sums, the pixels' vectors and a broadcast weight fill the 32 (6*4 + 4 + 1) or 16 (4*3 + 3 + 1) registers.
constexpr int kTileChannels = kVectorRegisters == 32 ? 6 : 4;
constexpr int kTilePixels = kVectorRegisters == 32 ? 4 : 3;

// Of grad_weight, as many sums as lanes, which are then summed over the lanes all at once.
constexpr int kGradTerms = 4;
template <class T>
constexpr int kGradChannels = kLanes<T> / kGradTerms;

constexpr int64_t kGradPixels = 128;    // summed before a sum goes to memory: long sums are made of short ones
constexpr int64_t kMostStretches = 16;  // of images, each with sums of its own

// ---- kernels: turning images ---------------------------------------------------------------------

// Whether an image's elements fill its memory, channel by channel or pixel by pixel.
template <class T>
bool is_dense(const Strided4d<T>& images, int64_t C, int64_t H, int64_t W) {
  const auto has = [&](int64_t c, int64_t h, int64_t w) {
    return (images.stride_c == c || C == 1) && (images.stride_h == h || H == 1) && (images.stride_w == w || W == 1);
  };
  return has(H * W, W, 1) || has(1, W * C, C);
}

// Where the elements of a dense image, in the order of its memory, lie in planes of rows `pitch` apart.
template <class T>
std::vector<int64_t> places_of(const Strided4d<T>& images, int64_t C, int64_t H, int64_t W, int64_t plane,
                               int64_t pitch) {
  std::vector<int64_t> places(C * H * W);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t w = 0; w < W; ++w) {
        places[c * images.stride_c + h * images.stride_h + w * images.stride_w] = c * plane + h * pitch + w;
      }
    }
  }
  return places;
}

// planes[places[e]] = element e of `count` <= L images, zeros in the lanes behind them
template <class T>
void turn(const T* images, int64_t stride_n, int64_t count, const std::vector<int64_t>& places, T* planes) {
  constexpr int64_t L = kLanes<T>;
  const int64_t elements = places.size();
  for (int64_t e = 0; e < elements; e += L) {
    const int64_t width = std::min(L, elements - e);
    Vector<T> block[L] = {};
    if (count == L && width == L) {
      for (int64_t n = 0; n < L; ++n) block[n] = load_vector(images + n * stride_n + e);
    } else {
      for (int64_t n = 0; n < count; ++n) block[n] = load_as<T>(images + n * stride_n + e, width);
    }
    transpose<T>(block);
    for (int64_t i = 0; i < width; ++i) store_vector(planes + places[e + i] * L, block[i]);
  }
}

// ... and back: elements [begin, end) of the images
template <class T>
void turn_back(const T* planes, const std::vector<int64_t>& places, int64_t begin, int64_t end, int64_t count,
               int64_t stride_n, T* images) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t e = begin; e < end; e += L) {
    const int64_t width = std::min(L, end - e);
    Vector<T> block[L] = {};
    for (int64_t i = 0; i < width; ++i) block[i] = load_vector(planes + places[e + i] * L);
    transpose<T>(block);
    if (count == L && width == L) {
      for (int64_t n = 0; n < L; ++n) store_vector(images + n * stride_n + e, block[n]);
    } else {
      for (int64_t n = 0; n < count; ++n) store_as<T>(images + n * stride_n + e, width, block[n]);
    }
  }
}

// The source of a sum in planes: rows as they are, columns padded with zeros to what the outputs read.
struct Planes {
  int64_t rows, pitch, first;

  Planes(const Axis& h, const Axis& w)
      : rows(h.source),
        pitch(std::max(w.first + w.reach(w.outputs), w.source) - std::min<int64_t>(w.first, 0)),
        first(std::min<int64_t>(w.first, 0)) {}

  int64_t plane() const { return rows * pitch; }
  // of column w
  int64_t place(int64_t w) const { return w - first; }
};

// Taps [begin, end) of those that any of the outputs [first, first + count) reads inside the source.
struct Taps {
  int64_t begin, end;

  Taps(const Axis& axis, int64_t first, int64_t count)
      : begin(std::clamp<int64_t>(ceil_div(1 - first - count - axis.first, axis.spacing), 0, axis.taps)),
        end(std::clamp(floor_div(axis.source - 1 - first - axis.first, axis.spacing) + 1, begin, axis.taps)) {}

  int64_t count() const { return end - begin; }
};

// ---- kernels: sums over terms --------------------------------------------------------------------

// The terms of a tile: for each of `rows` of the kernel, `count` of source + offsets[l], times a weight for each
// channel.
template <class T>
struct Terms {
  const T* source;
  int64_t rows, row_step;
  const int64_t* offsets;
  int64_t count;
  const T* weights;
  int64_t weights_step;  // from one row of the kernel to the next
};

// results[m][x] = bias[m] + sum over the terms, or += where there is no bias; `plane` elements from one channel to the
// next
template <int CHANNELS, int PIXELS, class T>
void sum_terms(Terms<T> terms, const T* bias, T* results, int64_t plane) {
  constexpr int L = kLanes<T>;
  Vector<T> sums[CHANNELS][PIXELS];
  clear_tile(sums);
  for (int64_t r = 0; r < terms.rows; ++r, terms.source += terms.row_step, terms.weights += terms.weights_step) {
    const T* weights = terms.weights;
    for (int64_t l = 0; l < terms.count; ++l, weights += CHANNELS) {
      const T* source = terms.source + terms.offsets[l];
      Vector<T> pixels[PIXELS];
      for (int x = 0; x < PIXELS; ++x) pixels[x] = load_vector(source + x * L);
#pragma GCC unroll 8
      for (int m = 0; m < CHANNELS; ++m) {
#pragma GCC unroll 8
        for (int x = 0; x < PIXELS; ++x) sums[m][x] += weights[m] * pixels[x];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < CHANNELS; ++m) {
#pragma GCC unroll 8
    for (int x = 0; x < PIXELS; ++x) {
      T* to = results + m * plane + x * L;
      store_vector(to, sums[m][x] + (bias != nullptr ? Vector<T>{} + bias[m] : load_vector(to)));
    }
  }
}

template <class T>
using SumTerms = void (*)(Terms<T> terms, const T* bias, T* results, int64_t plane);

template <int CHANNELS, class T, int... PIXEL>
SumTerms<T> sum_terms_of(int64_t pixels, std::integer_sequence<int, PIXEL...>) {
  static constexpr SumTerms<T> kTiles[] = {&sum_terms<CHANNELS, PIXEL + 1, T>...};
  return kTiles[pixels - 1];
}

// sum_terms for `channels` <= kTileChannels and `pixels` <= kTilePixels.
template <class T, int CHANNELS = kTileChannels>
SumTerms<T> sum_terms_of(int64_t channels, int64_t pixels) {
  if constexpr (CHANNELS > 1) {
    if (channels < CHANNELS) return sum_terms_of<T, CHANNELS - 1>(channels, pixels);
  }
  return sum_terms_of<CHANNELS, T>(pixels, std::make_integer_sequence<int, kTilePixels>{});
}

// ---- kernels: sums over pixels -------------------------------------------------------------------

// Rows of pixels of grad, and what a term reads there.
struct Rows {
  int64_t count, columns;
  int64_t grad_plane, grad_pitch, source_pitch;
};

// sums[m * kGradTerms + t] += sum over rows, columns and lanes of grad[m] * (source + offsets[t])
template <int CHANNELS, int TERMS, class T>
void sum_pixels(const Rows& rows, const T* grad, const T* source, const int64_t* offsets, T* to) {
  constexpr int L = kLanes<T>;
  Vector<T> sums[CHANNELS][TERMS];
  clear_tile(sums);
  int64_t offset[TERMS];
  for (int t = 0; t < TERMS; ++t) offset[t] = offsets[t];
  for (int64_t i = 0; i < rows.count; ++i, grad += rows.grad_pitch, source += rows.source_pitch) {
    for (int64_t j = 0; j < rows.columns * L; j += L) {
      Vector<T> terms[TERMS];
      for (int t = 0; t < TERMS; ++t) terms[t] = load_vector(source + offset[t] + j);
#pragma GCC unroll 4
      for (int m = 0; m < CHANNELS; ++m) {
        const Vector<T> pixel = load_vector(grad + m * rows.grad_plane + j);
        for (int t = 0; t < TERMS; ++t) sums[m][t] += pixel * terms[t];
      }
    }
  }
  Vector<T> block[L] = {};
#pragma GCC unroll 4
  for (int m = 0; m < CHANNELS; ++m) {
#pragma GCC unroll 4
    for (int t = 0; t < TERMS; ++t) block[m * kGradTerms + t] = sums[m][t];
  }
  transpose<T>(block);
  Vector<T> all = load_vector(to);
  for (int n = 0; n < L; ++n) all += block[n];
  store_vector(to, all);
}

template <class T>
using SumPixels = void (*)(const Rows& rows, const T* grad, const T* source, const int64_t* offsets, T* to);

// sum_pixels for `channels` <= kGradChannels and `terms` <= kGradTerms.
template <class T, int CHANNELS = kGradChannels<T>, int TERMS = kGradTerms>
SumPixels<T> sum_pixels_of(int64_t channels, int64_t terms) {
  if constexpr (CHANNELS > 1) {
    if (channels < CHANNELS) return sum_pixels_of<T, CHANNELS - 1, TERMS>(channels, terms);
  }
  if constexpr (TERMS > 1) {
    if (terms < TERMS) return sum_pixels_of<T, CHANNELS, TERMS - 1>(channels, terms);
  }
  return &sum_pixels<CHANNELS, TERMS, T>;
}

// ---- launchers: forward and grad_input -----------------------------------------------------------

// target[n, m, i, j] = bias[m] + sum over d and the taps of h and w of source[n, d, ...] * weight[m, d, ...]
template <class T>
struct Sums {
  int64_t N, M, D;
  Strided4d<const T> source, weight;  // weight (m, d, r, s)
  const T* bias;
  int64_t bias_stride;
  Strided4d<T> target;
  Axis h, w;

  int64_t terms() const { return D * h.taps * w.taps; }
};

// weights[tile's first channel * terms ...] = (r, s, d, channel of the tile)
template <class T>
void pack_weights(const Sums<T>& sums, const Pieces& tiles, T* packed) {
  parallel_for(tiles.count, grain_of(kMoveProducts * tiles.most() * sums.terms()), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      T* to = packed + tiles.begin(tile) * sums.terms();
      for (int64_t r = 0; r < sums.h.taps; ++r) {
        for (int64_t s = 0; s < sums.w.taps; ++s) {
          for (int64_t d = 0; d < sums.D; ++d) {
            for (int64_t m = tiles.begin(tile); m < tiles.begin(tile + 1); ++m) {
              *to++ = sums.weight.at(m, d, sums.h.weight(r), sums.w.weight(s));
            }
          }
        }
      }
    }
  });
}

// A part of the results that lies in one piece in an image's memory: channels of planes, or rows of pixels.
struct Slice {
  int64_t first_tile, last_tile;  // of channels
  int64_t first_row, last_row;
};

// The sums of a slice, in planes of vectors: source as `planes` says, results (M, outputs of h, outputs of w).
template <class T>
void sum_slice(const Sums<T>& sums, const Slice& slice, const Pieces& tiles, const Planes& planes, const T* source,
               const std::vector<int64_t>& offsets, const T* weights, const T* bias, T* results) {
  constexpr int64_t L = kLanes<T>;
  const Axis &h = sums.h, &w = sums.w;
  const int64_t plane = h.outputs * w.outputs, terms_of_row = sums.D * w.taps;
  const Pieces columns(w.outputs, kTilePixels);
  const int64_t most_rows = std::max<int64_t>(1, kTileDepth / terms_of_row);  // of the kernel, summed in registers
  for (int64_t i = slice.first_row; i < slice.last_row; ++i) {
    const Taps r(h, i, 1);
    for (int64_t c = 0; c < columns.count; ++c) {
      const int64_t j = columns.begin(c), pixels = columns.length(c);
      const Taps s(w, j, pixels);
      for (int64_t tile = slice.first_tile; tile < slice.last_tile; ++tile) {
        const int64_t m = tiles.begin(tile), channels = tiles.length(tile);
        T* to = results + (m * plane + i * w.outputs + j) * L;
        int64_t row = r.begin;
        do {
          const int64_t rows = std::min(most_rows, r.end - row), y = i + h.first + row * h.spacing;
          const T* of_tile = weights + m * sums.terms() + (row * terms_of_row + s.begin * sums.D) * channels;
          sum_terms_of<T>(channels, pixels)(
              {source + (y * planes.pitch + planes.place(j + w.first)) * L, rows, h.spacing * planes.pitch * L,
               offsets.data() + s.begin * sums.D, s.count() * sums.D, of_tile, terms_of_row * channels},
              row == r.begin ? bias + m : nullptr, to, plane * L);
          row += rows;
        } while (row < r.end);  // without a row to sum, too: the bias
      }
    }
  }
}

template <class T>
void sum_images(const Sums<T>& sums) {
  constexpr int64_t L = kLanes<T>;
  const Axis &h = sums.h, &w = sums.w;
  const Planes planes(h, w);
  const Pieces tiles(sums.M, kTileChannels);
  Scratch<T> weights(sums.M * sums.terms()), bias(sums.M);
  pack_weights(sums, tiles, weights.data());
  for (int64_t m = 0; m < sums.M; ++m) bias.data()[m] = sums.bias == nullptr ? T(0) : sums.bias[m * sums.bias_stride];
  std::vector<int64_t> offsets;
  for (int64_t s = 0; s < w.taps; ++s) {
    for (int64_t d = 0; d < sums.D; ++d) offsets.push_back((d * planes.plane() + s * w.spacing) * L);
  }
  const int64_t plane = h.outputs * w.outputs, elements = sums.M * plane, groups = ceil_div(sums.N, L);
  const std::vector<int64_t> from = places_of(sums.source, sums.D, h.source, w.source, planes.plane(), planes.pitch);
  const std::vector<int64_t> to = places_of(sums.target, sums.M, h.outputs, w.outputs, plane, w.outputs);
  const bool by_rows = sums.target.stride_c == 1 && sums.M > 1;
  const Pieces slices = split_evenly(by_rows ? h.outputs : tiles.count, groups);
  const int64_t products = L * elements / slices.count * sums.terms();
  parallel_for(groups * slices.count, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<T> source(sums.D * planes.plane() * L), results(elements * L);
    std::fill_n(source.data(), sums.D * planes.plane() * L, T(0));
    for (int64_t task = begin, last = -1; task < end; ++task) {
      const int64_t group = task / slices.count, part = task % slices.count;
      const int64_t n = group * L, count = std::min(L, sums.N - n);
      if (group != last)
        turn(sums.source.at(n, 0), sums.source.stride_n, count, from, source.data() - planes.first * L);
      last = group;
      Slice slice = {0, tiles.count, 0, h.outputs};
      (by_rows ? slice.first_row : slice.first_tile) = slices.begin(part);
      (by_rows ? slice.last_row : slice.last_tile) = slices.begin(part + 1);
      sum_slice(sums, slice, tiles, planes, source.data(), offsets, weights.data(), bias.data(), results.data());
      const int64_t step = by_rows ? w.outputs * sums.M : plane;
      const int64_t first = by_rows ? slice.first_row : tiles.begin(slice.first_tile);
      const int64_t stop = by_rows ? slice.last_row : tiles.begin(slice.last_tile);
      turn_back(results.data(), to, first * step, stop * step, count, sums.target.stride_n, sums.target.at(n, 0));
    }
  });
}

// ---- launchers: grad_weight ----------------------------------------------------------------------

// The sums of a kernel's row r for the output channels of a tile: over all pixels and lanes, tile by tile of terms.
template <class T>
void sum_row_of_kernel(const Conv2dShape& shape, const Axis& h, const Planes& planes, int64_t r, int64_t channels,
                       const T* grad, const T* source, const std::vector<int64_t>& offsets, T* to) {
  constexpr int64_t L = kLanes<T>;
  const int64_t shift = h.first + r * h.spacing;
  const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(shape.P, shape.H - shift);
  const int64_t most_rows = std::max<int64_t>(1, kGradPixels / shape.Q), count = offsets.size();
  for (int64_t t = 0; t < count; t += kGradTerms, to += L) {
    const auto add = sum_pixels_of<T>(channels, std::min<int64_t>(kGradTerms, count - t));
    for (int64_t i = begin; i < end; i += most_rows) {
      const Rows rows = {std::min(most_rows, end - i), shape.Q, shape.P * shape.Q * L, shape.Q * L, planes.pitch * L};
      add(rows, grad + i * shape.Q * L, source + (i + shift) * planes.pitch * L, offsets.data() + t, to);
    }
  }
}

template <class T>
void sum_weight(const Conv2dShape& shape, const Strided4d<const T>& grad, const Strided4d<const T>& input,
                const Strided4d<T>& grad_weight) {
  constexpr int64_t L = kLanes<T>;
  const Axis h = forward_axes_h(shape)[0], w = forward_axes_w(shape)[0];
  const Planes planes(h, w);
  const int64_t C = shape.C, K = shape.K, plane = shape.P * shape.Q, groups = ceil_div(shape.N, L);
  std::vector<int64_t> offsets;  // of a kernel's row: (c, s)
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t s = 0; s < shape.S; ++s) {
      offsets.push_back((c * planes.plane() + planes.place(w.first + s * w.spacing)) * L);
    }
  }
  const Pieces stretches(groups, ceil_div(groups, kMostStretches));
  const Pieces tiles(K, kGradChannels<T>);
  const Pieces slices = split_evenly(tiles.count, stretches.count);
  const int64_t row_sums = ceil_div(int64_t(offsets.size()), int64_t(kGradTerms)) * L, tile_sums = shape.R * row_sums;
  Scratch<T> partial(stretches.count * tiles.count * tile_sums);  // (stretch, tile, r, terms, channels of the tile)
  const std::vector<int64_t> from = places_of(input, C, shape.H, shape.W, planes.plane(), planes.pitch);
  const std::vector<int64_t> of_grad = places_of(grad, K, shape.P, shape.Q, plane, shape.Q);
  const int64_t products = stretches.most() * L * plane * K / slices.count * int64_t(offsets.size()) * shape.R;
  parallel_for(stretches.count * slices.count, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<T> source(C * planes.plane() * L), grads(K * plane * L);
    std::fill_n(source.data(), C * planes.plane() * L, T(0));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t stretch = task / slices.count, slice = task % slices.count;
      const int64_t first = slices.begin(slice), last = slices.begin(slice + 1);
      T* sums = partial.data() + stretch * tiles.count * tile_sums;
      std::fill(sums + first * tile_sums, sums + last * tile_sums, T(0));
      for (int64_t group = stretches.begin(stretch); group < stretches.begin(stretch + 1); ++group) {
        const int64_t n = group * L, count = std::min(L, shape.N - n);
        turn(input.at(n, 0), input.stride_n, count, from, source.data() - planes.first * L);
        turn(grad.at(n, 0), grad.stride_n, count, of_grad, grads.data());
        for (int64_t tile = first; tile < last; ++tile) {
          const T* of_tile = grads.data() + tiles.begin(tile) * plane * L;
          for (int64_t r = 0; r < shape.R; ++r) {
            sum_row_of_kernel(shape, h, planes, r, tiles.length(tile), of_tile, source.data(), offsets,
                              sums + tile * tile_sums + r * row_sums);
          }
        }
      }
    }
  });
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    for (int64_t k = tiles.begin(tile); k < tiles.begin(tile + 1); ++k) {
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t r = 0; r < shape.R; ++r) {
          for (int64_t s = 0; s < shape.S; ++s) {
            const int64_t t = c * shape.S + s, lane = (k - tiles.begin(tile)) * kGradTerms + t % kGradTerms;
            const T* first = partial.data() + tile * tile_sums + r * row_sums + t / kGradTerms * L + lane;
            T sum = 0;
            for (int64_t i = 0; i < stretches.count; ++i) sum += first[i * tiles.count * tile_sums];
            grad_weight.at(k, c, r, s) = sum;
          }
        }
      }
    }
  }
}

}  // namespace

// ---- entry points --------------------------------------------------------------------------------

template <class T>
void AcrossImages::forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                           int64_t bias_stride, Strided4d<T> output) {
  if (!is_dense(input, shape.C, shape.H, shape.W) || !is_dense(output, shape.K, shape.P, shape.Q)) {
    return Direct::forward(shape, input, weight, bias, bias_stride, output);
  }
  sum_images<T>({shape.N, shape.K, shape.C, input, weight, bias, bias_stride, output, forward_axes_h(shape)[0],
                 forward_axes_w(shape)[0]});
}

template <class T>
void AcrossImages::grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight,
                              const T* bias, int64_t bias_stride, Strided4d<T> grad_input) {
  if (!is_dense(grad, shape.K, shape.P, shape.Q) || !is_dense(grad_input, shape.C, shape.H, shape.W)) {
    return Direct::grad_input(shape, grad, weight, bias, bias_stride, grad_input);
  }
  const Strided4d<const T> turned = {weight.data, weight.stride_c, weight.stride_n, weight.stride_h, weight.stride_w};
  sum_images<T>({shape.N, shape.C, shape.K, grad, turned, bias, bias_stride, grad_input, gradient_axes_h(shape)[0],
                 gradient_axes_w(shape)[0]});
}

template <class T>
void AcrossImages::grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                               Strided4d<T> grad_weight) {
  if (!is_dense(grad, shape.K, shape.P, shape.Q) || !is_dense(input, shape.C, shape.H, shape.W)) {
    return Direct::grad_weight(shape, grad, input, grad_weight);
  }
  sum_weight(shape, grad, input, grad_weight);
}

template void AcrossImages::forward(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                    int64_t, Strided4d<float>);
template void AcrossImages::grad_input(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                       int64_t, Strided4d<float>);
template void AcrossImages::grad_weight(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>,
                                        Strided4d<float>);

}  // namespace dlkernels
