// Weights as the strategies read and write them: panels of channels, which fill vectors.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../gemm.h"
#include "../parallel.h"
#include "slab.h"

namespace dlkernels {

// ---- tuning constants of the strategies that are matrix products -----------------------------------

constexpr int kPanelVectors = kVectorRegisters == 32 ? 4 : 2;  // of channels: they divide the usual numbers of channels
constexpr int64_t kBlockTerms = 144;        // summed before a sum goes to memory: their panel fits the first cache
constexpr int64_t kEnoughTasks = 8;         // for a handful of threads to share the work evenly
constexpr int64_t kTaskProducts = 1 << 17;  // multiply-adds (some 2 us) below which a second thread does not pay
constexpr int64_t kMoveProducts = 4;        // multiply-adds in the time in which an element is moved

// Tasks of so many multiply-adds that one thread takes at least.
inline int64_t grain_of(int64_t products_per_task) {
  return std::max<int64_t>(1, kTaskProducts / (products_per_task + 1));
}

// `items` of each of `blocks` cut into as few pieces as keep all threads busy: what is common to a block's items is
// made again for each of its pieces. `thread_count` decides on speed alone: what is computed for an item does not
// depend on the cut.
inline Pieces split_evenly(int64_t items, int64_t blocks) {
  const int64_t threads = thread_count(), all = std::max<int64_t>(1, blocks * items);
  const auto longest = [&](int64_t splits) { return ceil_div(blocks * splits, threads) * ceil_div(items, splits); };
  int64_t best = 1;
  for (int64_t splits = 1; splits <= std::min(items, 2 * threads); ++splits) {
    if (longest(splits) < longest(best)) best = splits;
    if (longest(best) * threads * 8 <= all * 9) break;  // an eighth lost at most
  }
  return Pieces(items, ceil_div(items, best));
}

// weight[m, d, tap] lies at data[m*stride_m + d*stride_d + tap.r*stride_r + tap.s*stride_s]; T may be const.
template <class T>
struct WeightView {
  T* data;
  int64_t stride_m, stride_d, stride_r, stride_s;
  int64_t R, S;

  int64_t offset(const Tap& tap) const { return tap.r * stride_r + tap.s * stride_s; }
  bool taps_side_by_side() const { return (S == 1 || stride_s == 1) && (R == 1 || stride_r == S); }
};

// Channels cut into panels of whole vectors: columns [first, first + count) of M, `width` with the padding.
struct Panel {
  int64_t first, count, width;
};
template <class T>
class PanelCuts {
 public:
  explicit PanelCuts(int64_t M) : M_(M), vectors_(ceil_div(M, kLanes<T>), kPanelVectors) {}
  int64_t count() const { return vectors_.count; }
  int64_t padded() const { return vectors_.size * kLanes<T>; }
  Panel operator[](int64_t panel) const {
    const int64_t first = vectors_.begin(panel) * kLanes<T>, width = vectors_.length(panel) * kLanes<T>;
    return {first, std::min(width, M_ - first), width};
  }

 private:
  int64_t M_;
  Pieces vectors_;
};

// Calls run(from, row, count): `count` weights side by side from each of the panel's columns, `from` being column 0's,
// are terms row[0], row[1], ... of channels [d_begin, d_begin + d_count), in the order (tap, channel); -1: none of
// them.
template <class T, class Run>
void for_each_run(const WeightView<T>& weight, const std::vector<Tap>& taps, int64_t d_begin, int64_t d_count,
                  const Run& run) {
  std::vector<int64_t> row;
  T* first = weight.data + d_begin * weight.stride_d;
  if (weight.taps_side_by_side() && weight.R * weight.S > 1) {
    const int64_t positions = weight.R * weight.S;
    const int64_t channels = weight.stride_d == positions ? d_count : 1;  // of a run
    for (int64_t d = 0; d < d_count; d += channels) {
      row.assign(channels * positions, -1);
      for (size_t t = 0; t < taps.size(); ++t) {
        for (int64_t i = 0; i < channels; ++i) {
          row[i * positions + taps[t].r * weight.S + taps[t].s] = int64_t(t) * d_count + d + i;
        }
      }
      run(first + d * weight.stride_d, row.data(), channels * positions);
    }
  } else {
    const int64_t channels = weight.stride_d == 1 ? d_count : 1;
    for (size_t t = 0; t < taps.size(); ++t) {
      for (int64_t d = 0; d < d_count; d += channels) {
        row.resize(channels);
        std::iota(row.begin(), row.end(), int64_t(t) * d_count + d);
        run(first + weight.offset(taps[t]) + d * weight.stride_d, row.data(), channels);
      }
    }
  }
}

// packed[l][j] = weight[first + j, d, tap] for l = t*d_count + d - d_begin, 0 for the padding; packed (terms, width)
template <class T>
void pack_weight(const WeightView<const T>& weight, const Panel& panel, const std::vector<Tap>& taps, int64_t d_begin,
                 int64_t d_count, T* packed) {
  constexpr int64_t L = kLanes<T>;
  const WeightView<const T> view = {weight.data + panel.first * weight.stride_m,
                                    weight.stride_m,
                                    weight.stride_d,
                                    weight.stride_r,
                                    weight.stride_s,
                                    weight.R,
                                    weight.S};
  if (weight.stride_m == 1) {  // the columns are side by side
    for (const Tap& tap : taps) {
      for (int64_t d = d_begin; d < d_begin + d_count; ++d, packed += panel.width) {
        const T* from = view.data + d * view.stride_d + view.offset(tap);
        for (int64_t j = 0; j < panel.width; j += L) {
          store_vector(packed + j, load_as<T>(from + j, std::clamp<int64_t>(panel.count - j, 0, L)));
        }
      }
    }
    return;
  }
  for_each_run(view, taps, d_begin, d_count, [&](const T* from, const int64_t* row, int64_t count) {
    const int64_t wanted = std::count_if(row, row + count, [](int64_t l) { return l >= 0; });
    if (2 * wanted <= count) {  // some taps of a kernel: copied one by one, not all of them transposed
      for (int64_t q = 0; q < count; ++q) {
        if (row[q] < 0) continue;
        T* to = packed + row[q] * panel.width;
        for (int64_t j = 0; j < panel.count; ++j) to[j] = from[j * view.stride_m + q];
        std::fill(to + panel.count, to + panel.width, T(0));
      }
      return;
    }
    for (int64_t j = 0; j < panel.width; j += L) {
      const int64_t columns = std::clamp<int64_t>(panel.count - j, 0, L);
      for (int64_t q = 0; q < count; q += L) {
        const int64_t lanes = std::min(L, count - q);
        Vector<T> block[L] = {};
        for (int64_t i = 0; i < columns; ++i) {
          const T* at = from + (j + i) * view.stride_m + q;
          block[i] = load_as<T>(at, lanes);
          // the next block of columns, or the first of what follows this run: the strides are too long to be noticed
          __builtin_prefetch(at + (j + L < panel.count ? L * view.stride_m : count - j * view.stride_m));
        }
        transpose<T>(block);
        for (int64_t i = 0; i < lanes; ++i) {
          if (row[q + i] >= 0) store_vector(packed + row[q + i] * panel.width + j, block[i]);
        }
      }
    }
  });
}

// The way back, for all channels: weight[first + j, d, tap] = sums[t*D + d][j]
template <class T>
void unpack_weight(const T* sums, const Panel& panel, const std::vector<Tap>& taps, int64_t D,
                   const WeightView<T>& weight) {
  constexpr int64_t L = kLanes<T>;
  const WeightView<T> view = {weight.data + panel.first * weight.stride_m,
                              weight.stride_m,
                              weight.stride_d,
                              weight.stride_r,
                              weight.stride_s,
                              weight.R,
                              weight.S};
  for_each_run(view, taps, 0, D, [&](T* to, const int64_t* row, int64_t count) {
    for (int64_t j = 0; j < panel.count; j += L) {
      for (int64_t q = 0; q < count; q += L) {
        Vector<T> block[L] = {};
        const int64_t lanes = std::min(L, count - q);
        for (int64_t i = 0; i < lanes; ++i) block[i] = load_vector(sums + row[q + i] * panel.width + j);
        transpose<T>(block);
        for (int64_t i = 0; i < std::min(L, panel.count - j); ++i) {
          store_as<T>(to + (j + i) * view.stride_m + q, lanes, block[i]);
        }
      }
    }
  });
}

// Which operands of `multiply` are in no cache yet: a tile asks for the next one's.
struct InMemory {
  bool rows = false, sums = false;
};

// How many of the rows, of those that are evenly spaced from the first one on, the next tile takes: tiles of about the
// same size.
inline int64_t evenly_spaced(const int64_t* row, int64_t count) {
  int64_t run = std::min<int64_t>(count, 1);
  while (run < std::min<int64_t>(count, 2 * kEvenRows) && row[run] - row[run - 1] == row[1] - row[0]) ++run;
  return run >= 2 * kEvenRows ? kEvenRows : ceil_div(run, ceil_div(run, kEvenRows));
}

// sums[m][j] += sum over l of data[row[m] + depth[l]] * columns[l][j], for vectors of columns that one tile takes; with
// `start`, sums[m][j] = start[j] + ...
template <class T>
void multiply(int64_t row_count, const T* data, const int64_t* row, const std::vector<int64_t>& depth, const T* columns,
              int64_t column_stride, int64_t width, const T* start, T* const* sums, InMemory in_memory = {}) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t vectors = width / kLanes<T>, most = tile_rows(int(vectors)), terms = depth.size();
  const int64_t prefetched_terms = in_memory.rows ? terms : 0;
  const int64_t prefetched_width = in_memory.sums ? width : 0;
  for (int64_t m = 0, count = 0; m < row_count; m += count) {
    const int64_t even = vectors == 1 ? evenly_spaced(row + m, row_count - m) : 0;
    count = std::max(even, std::min(most, row_count - m));
    for (int64_t next = m + count; next < std::min(row_count, m + 2 * count); ++next) {
      for (int64_t l = 0; l < prefetched_terms; l += kLine) __builtin_prefetch(data + row[next] + depth[l]);
      for (int64_t j = 0; j < prefetched_width; j += kLine) __builtin_prefetch(sums[next] + j, 1);
    }
    if (even == count) {
      const EvenlySpaced<T> rows{data + row[m], even > 1 ? row[m + 1] - row[m] : 0, depth.data()};
      even_tile<T>(count)(terms, rows, columns, column_stride, start, sums + m);
    } else {
      const Indirect<T> rows{data, row + m, depth.data()};
      scattered_tile<T>(count, vectors)(terms, rows, columns, column_stride, start, sums + m);
    }
  }
}

// ---- pixels in memory ----------------------------------------------------------------------------

// A grid of N x P x Q pixels in memory, `step` apart: pixel x of the flattened grid is (n, p, q).
template <class T>
struct Pixels {
  Strided4d<T> image;
  int64_t P, Q;
  int64_t step_h, step_w;

  // Calls run(first, lane, count) for the stretches of pixels [x, x + count) that lie evenly in memory, stride_w()
  // apart; `first` is the first one's place.
  template <class Run>
  void for_each_run(int64_t x, int64_t count, const Run& run) const {
    const bool rows_join = step_h * image.stride_h == Q * stride_w();
    const int64_t length = rows_join ? P * Q : Q;
    for (int64_t lane = 0; lane < count;) {
      const int64_t pixel = x + lane, row = pixel / Q;
      const int64_t run_length = std::min(length - pixel % length, count - lane);
      run(&image.at(row / P, 0, row % P * step_h, pixel % Q * step_w), lane, run_length);
      lane += run_length;
    }
  }
  int64_t stride_w() const { return step_w * image.stride_w; }
};

// pixel panel.first + lane of channel m = sums[m][lane]; sums (M, panel.width)
template <class T>
void unpack_pixels(const T* sums, int64_t channel, int64_t M, const Panel& panel, const Pixels<T>& pixels) {
  const int64_t stride = pixels.stride_w();
  pixels.for_each_run(panel.first, panel.count, [&](T* first, int64_t lane, int64_t length) {
    if (pixels.image.stride_c == 1) {
      return copy_pixels(sums + lane, 1, panel.width, length, M, first + channel, stride);
    }
    for (int64_t m = 0; m < M; ++m) {
      const T* from = sums + m * panel.width + lane;
      T* to = first + (channel + m) * pixels.image.stride_c;
      if (stride == 1) {
        copy_run(from, length, to);
      } else {
        for (int64_t i = 0; i < length; ++i) to[i * stride] = from[i];
      }
    }
  });
}

// images[n, c, h, first + i] = bias[c] for c < C, i < count
template <class T>
void fill_row_with_bias(int64_t C, const T* bias, int64_t bias_stride, const Strided4d<T>& images, int64_t n, int64_t h,
                        int64_t first, int64_t count) {
  const bool side_by_side = images.stride_c == 1;
  for (int64_t outer = 0; outer < (side_by_side ? count : C); ++outer) {
    for (int64_t inner = 0; inner < (side_by_side ? C : count); ++inner) {
      const int64_t c = side_by_side ? inner : outer, w = first + (side_by_side ? outer : inner);
      images.at(n, c, h, w) = bias != nullptr ? bias[c * bias_stride] : T(0);
    }
  }
}

// images[n, c, h, w] = bias[c], images (N, C, H, W) of the input's shape
template <class T>
void fill_with_bias(const Conv2dShape& shape, const T* bias, int64_t bias_stride, const Strided4d<T>& images) {
  const int64_t N = shape.N, H = shape.H, W = shape.W, C = shape.C;
  parallel_for(N * H, grain_of(kMoveProducts * W * C), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      fill_row_with_bias(C, bias, bias_stride, images, row / H, row % H, 0, W);
    }
  });
}

// Where pixel x of the block lies in the target's memory.
template <class T>
void target_of_pixels(const Strided4d<T>& target, const Block& block, std::vector<T*>& pixels) {
  pixels.resize(block.pixels());
  T** pixel = pixels.data();
  for (int64_t n = 0; n < block.images; ++n) {
    for (int64_t i = 0; i < block.rows; ++i, pixel += block.columns) {
      T* row = &target.at(block.n + n, 0, block.i + i, block.j);
      for (int64_t j = 0; j < block.columns; ++j) pixel[j] = row + j * target.stride_w;
    }
  }
}

// pixels[x][(first + j)*stride_c] = sums[x][j] for j < panel.count; sums (pixels, panel.width)
template <class T>
void write_pixels(const T* sums, const Panel& panel, const std::vector<T*>& pixels, int64_t stride_c) {
  constexpr int64_t L = kLanes<T>;
  const int64_t pixel_count = pixels.size();
  for (int64_t x = 0; x < pixel_count;) {
    int64_t run = 1;  // pixels side by side
    while (run < L && x + run < pixel_count && pixels[x + run] == pixels[x] + run) ++run;
    T* to = pixels[x] + panel.first * stride_c;
    const T* from = sums + x * panel.width;
    for (int64_t j = 0; j < panel.count; j += L) {
      const int64_t lanes = std::min(L, panel.count - j);
      if (stride_c == 1) {
        store_as<T>(to + j, lanes, load_vector(from + j));
      } else if (run == 1) {
        for (int64_t i = j; i < j + lanes; ++i) to[i * stride_c] = from[i];
      } else {
        Vector<T> block[L] = {};
        for (int64_t i = 0; i < run; ++i) block[i] = load_vector(from + i * panel.width + j);
        transpose<T>(block);
        for (int64_t i = 0; i < lanes; ++i) store_as<T>(to + (j + i) * stride_c, run, block[i]);
      }
    }
    x += stride_c == 1 ? 1 : run;
  }
}

}  // namespace dlkernels
