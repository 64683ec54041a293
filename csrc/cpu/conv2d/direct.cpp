// conv2d as matrix products over gathered pixels (implicit GEMM), for every argument and memory layout.
//
//   output     [m, x] = sum over l of weight[m, l] * gathered input[l, x]    m: channel k  l: (r, s, c)  x: n, p, q
//   grad_input [m, x] = sum over l of weight[l, m] * gathered grad[l, x]     m: channel c  l: (r, s, k)  x: n, h, w
//   grad_weight[m, j] = sum over x of grad[m, x] * gathered input[j, x]      m: channel k  j: (r, s, c)  x: n, p, q
//
// Who owns what: a task owns a block of pixels (or of weight columns) of one group, gathers what these need into a
// small panel that stays in cache, multiplies it with the packed other operand, and writes its results once. Passes
// over memory: each image is read R*S times from cache and about once from memory; nothing of the size of an image is
// copied. Sums over l or x run in blocks of a fixed size and are added in order, whatever the thread count.
#include "direct.h"

#include <algorithm>
#include <vector>

#include "../gemm.h"
#include "../parallel.h"
#include "../simd.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kBlockColumns = 96;       // pixels (or weight columns) of a task: a multiple of every kTileColumns
constexpr int64_t kBlockDepth = 256;        // terms summed before a sum goes to memory: the panel of columns is 96 KiB
constexpr int64_t kBlockRows = 256;         // channels of a task, where there are tasks enough ...
constexpr int64_t kFewRows = 64;            // ... and where there are not
constexpr int64_t kEnoughTasks = 8;         // for a handful of threads to share the work evenly
constexpr int64_t kTaskProducts = 1 << 16;  // multiply-adds (some 2 us) below which a second thread does not pay

static_assert(kBlockColumns % kTileColumns<float> == 0 && kBlockColumns % kTileColumns<double> == 0);
static_assert(kBlockRows % kTileRows == 0 && kFewRows % kTileRows == 0);

// ---- kernels: gathering --------------------------------------------------------------------------

// A position of the weight kernel, and where it reads: pixel (i, j) of the grid reads source pixel
// (i*step_h + h, j*step_w + w).
struct Tap {
  int64_t r, s;
  int64_t h, w;
};

// What a grid of N x I x J pixels reads for each group: D channels at every tap, zero outside the source's H x W.
template <class T>
struct Gather {
  Strided4d<const T> source;  // (N, G*D, H, W)
  int64_t H, W, D;
  int64_t N, I, J;
  int64_t step_h, step_w;
  std::vector<Tap> taps;

  int64_t depth() const { return int64_t(taps.size()) * D; }
  int64_t pixels() const { return N * I * J; }
};

// Pixels (n, i, j) to (n, i, j + length - 1) of the grid, which fill `length` lanes of a panel from `lane` on.
struct Segment {
  int64_t n, i, j;
  int64_t lane, length;
};

// Pixels [first, first + count) of the grid, cut where a row ends.
template <class T>
void cut_into_segments(const Gather<T>& gather, int64_t first, int64_t count, std::vector<Segment>& segments) {
  segments.clear();
  for (int64_t lane = 0; lane < count;) {
    const int64_t pixel = first + lane;
    const int64_t j = pixel % gather.J, row = pixel / gather.J;
    const int64_t length = std::min(gather.J - j, count - lane);
    segments.push_back({row / gather.I, row % gather.I, j, lane, length});
    lane += length;
  }
}

// Calls put(d, lane, source values, their stride, how many) for every run of pixels that lies inside the source, and
// put_zero(d, lane, how many) for the others, for channels [d_begin, d_end) of group g at one tap.
template <class T, class Put, class PutZero>
void gather_tap(const Gather<T>& gather, const Tap& tap, int64_t g, int64_t d_begin, int64_t d_end,
                const std::vector<Segment>& segments, const Put& put, const PutZero& put_zero) {
  const int64_t step = gather.step_w, W = gather.W;
  for (const Segment& segment : segments) {
    const int64_t h = segment.i * gather.step_h + tap.h;
    const int64_t w = segment.j * step + tap.w;  // of the segment's first pixel
    // w + x*step lies in [0, W) for x in [begin, end)
    const bool row_inside = h >= 0 && h < gather.H;
    const int64_t begin = std::clamp(ceil_div(std::max<int64_t>(-w, 0), step), int64_t(0), segment.length);
    const int64_t end = row_inside && W > w ? std::clamp(ceil_div(W - w, step), begin, segment.length) : begin;
    for (int64_t d = d_begin; d < d_end; ++d) {
      put_zero(d, segment.lane, begin);
      if (begin < end) {
        const T* from = &gather.source.at(segment.n, g * gather.D + d, h, w + begin * step);
        put(d, segment.lane + begin, from, step * gather.source.stride_w, end - begin);
      }
      put_zero(d, segment.lane + end, segment.length - end);
    }
  }
}

// Calls visit(tap, d_begin, d_end, l) for the pieces of [l_begin, l_end), where l = t*D + d counts taps and channels.
template <class T, class Visit>
void for_each_tap(const Gather<T>& gather, int64_t l_begin, int64_t l_end, const Visit& visit) {
  for (int64_t l = l_begin; l < l_end;) {
    const int64_t t = l / gather.D, d = l % gather.D;
    const int64_t count = std::min(gather.D - d, l_end - l);
    visit(gather.taps[t], d, d + count, l);
    l += count;
  }
}

// panel[l - l_begin][lane] = gathered[l][pixel]        panel (l_end - l_begin, kBlockColumns)
template <class T>
void pack_pixels_as_columns(const Gather<T>& gather, int64_t g, const std::vector<Segment>& segments, int64_t l_begin,
                            int64_t l_end, Accumulate<T>* panel) {
  for_each_tap(gather, l_begin, l_end, [&](const Tap& tap, int64_t d_begin, int64_t d_end, int64_t l) {
    Accumulate<T>* rows = panel + (l - l_begin - d_begin) * kBlockColumns;
    gather_tap(
        gather, tap, g, d_begin, d_end, segments,
        [&](int64_t d, int64_t lane, const T* from, int64_t stride, int64_t count) {
          Accumulate<T>* to = rows + d * kBlockColumns + lane;
          if (stride == 1) {
            for (int64_t x = 0; x < count; ++x) to[x] = load(from[x]);
          } else {
            for (int64_t x = 0; x < count; ++x) to[x] = load(from[x * stride]);
          }
        },
        [&](int64_t d, int64_t lane, int64_t count) {
          std::fill_n(rows + d * kBlockColumns + lane, count, Accumulate<T>(0));
        });
  });
}

// panel[lane][j - j_begin] = gathered[j][pixel]        panel (pixels, kBlockColumns)
template <class T>
void pack_pixels_as_depth(const Gather<T>& gather, int64_t g, const std::vector<Segment>& segments, int64_t j_begin,
                          int64_t j_end, Accumulate<T>* panel) {
  for_each_tap(gather, j_begin, j_end, [&](const Tap& tap, int64_t d_begin, int64_t d_end, int64_t j) {
    Accumulate<T>* columns = panel + (j - j_begin - d_begin);
    gather_tap(
        gather, tap, g, d_begin, d_end, segments,
        [&](int64_t d, int64_t lane, const T* from, int64_t stride, int64_t count) {
          Accumulate<T>* to = columns + d + lane * kBlockColumns;
          for (int64_t x = 0; x < count; ++x) to[x * kBlockColumns] = load(from[x * stride]);
        },
        [&](int64_t d, int64_t lane, int64_t count) {
          Accumulate<T>* to = columns + d + lane * kBlockColumns;
          for (int64_t x = 0; x < count; ++x) to[x * kBlockColumns] = 0;
        });
  });
}

// rows[panel][lane][m] = grad[m][pixel] for channels [m_begin, m_end) of `grad`: panels (lanes, kTileRows)
template <class T>
void pack_grad_rows(const Strided4d<const T>& grad, const std::vector<Segment>& segments, int64_t lanes,
                    int64_t m_begin, int64_t m_end, Accumulate<T>* rows) {
  for (int64_t m = m_begin; m < m_end; ++m) {
    const int64_t panel = (m - m_begin) / kTileRows, row = (m - m_begin) % kTileRows;
    for (const Segment& segment : segments) {
      Accumulate<T>* to = rows + (panel * lanes + segment.lane) * kTileRows + row;
      const T* from = &grad.at(segment.n, m, segment.i, segment.j);
      for (int64_t x = 0; x < segment.length; ++x) to[x * kTileRows] = load(from[x * grad.stride_w]);
    }
  }
}

// sums[m][j] += sum over l of rows[l][m] * columns[l][j], for row_count rows in panels (depth, kTileRows)
template <class T>
void multiply_block(int64_t row_count, int64_t column_count, int64_t depth, const T* rows, int64_t panel_size,
                    const T* columns, T* sums) {
  const int64_t whole_tiles = ceil_div(column_count, kTileColumns<T>) * kTileColumns<T>;
  for (int64_t m = 0; m < row_count; m += kTileRows) {
    multiply_panel(std::min<int64_t>(kTileRows, row_count - m), whole_tiles, depth, rows + m / kTileRows * panel_size,
                   columns, kBlockColumns, sums + m * kBlockColumns, kBlockColumns);
  }
}

// ---- launchers -----------------------------------------------------------------------------------

int64_t rows_per_task(int64_t rows, int64_t other_tasks) {
  return other_tasks * ceil_div(rows, kBlockRows) >= kEnoughTasks ? kBlockRows : kFewRows;
}

int64_t grain_of(int64_t products_per_task) { return std::max<int64_t>(1, kTaskProducts / (products_per_task + 1)); }

// packed[g][panel][l][row] = weight_at(g, m, d, tap) for l = t*D + d and m = panel*kTileRows + row; zero from m = M on
template <class T, class WeightAt>
void pack_weight(const Gather<T>& gather, int64_t G, int64_t M, const WeightAt& weight_at, Accumulate<T>* packed) {
  const int64_t panels = ceil_div(M, kTileRows), depth = gather.depth();
  parallel_for(G * panels, grain_of(depth * kTileRows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / panels, m_begin = task % panels * kTileRows;
      Accumulate<T>* to = packed + task * depth * kTileRows;
      for (const Tap& tap : gather.taps) {
        for (int64_t d = 0; d < gather.D; ++d, to += kTileRows) {
          for (int64_t row = 0; row < kTileRows; ++row) {
            to[row] = m_begin + row < M ? weight_at(g, m_begin + row, d, tap) : Accumulate<T>(0);
          }
        }
      }
    }
  });
}

// target[n, g*M + m, i, j] = offset(g*M + m) + sum over d, tap of weight_at(g, m, d, tap) * gathered source
template <class T, class WeightAt, class Offset>
void gather_and_multiply(const Gather<T>& gather, int64_t G, int64_t M, const WeightAt& weight_at, const Offset& offset,
                         const Strided4d<T>& target) {
  using Sum = Accumulate<T>;
  const int64_t depth = gather.depth(), pixels = gather.pixels();
  const int64_t panels = ceil_div(M, kTileRows), panel_size = depth * kTileRows;
  Scratch<Sum> weight(G * panels * panel_size);
  pack_weight(gather, G, M, weight_at, weight.data());

  const int64_t column_blocks = ceil_div(pixels, kBlockColumns);
  const int64_t block_rows = rows_per_task(M, G * column_blocks);
  const int64_t row_blocks = ceil_div(M, block_rows);
  const int64_t products = std::min(M, block_rows) * std::min(pixels, kBlockColumns) * depth;
  parallel_for(G * column_blocks * row_blocks, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<Sum> columns(std::min(depth, kBlockDepth) * kBlockColumns), sums(block_rows * kBlockColumns);
    std::vector<Segment> segments;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m_begin = task % row_blocks * block_rows, m_count = std::min(block_rows, M - m_begin);
      const int64_t first = task / row_blocks % column_blocks * kBlockColumns;
      const int64_t count = std::min(kBlockColumns, pixels - first), g = task / row_blocks / column_blocks;
      cut_into_segments(gather, first, count, segments);
      std::fill_n(sums.data(), m_count * kBlockColumns, Sum(0));
      const Sum* rows = weight.data() + (g * panels + m_begin / kTileRows) * panel_size;
      for (int64_t l = 0; l < depth; l += kBlockDepth) {
        const int64_t l_end = std::min(depth, l + kBlockDepth);
        pack_pixels_as_columns(gather, g, segments, l, l_end, columns.data());
        multiply_block(m_count, count, l_end - l, rows + l * kTileRows, panel_size, columns.data(), sums.data());
      }
      for (int64_t m = 0; m < m_count; ++m) {
        const int64_t channel = g * M + m_begin + m;
        const Sum shift = offset(channel);
        for (const Segment& segment : segments) {
          const Sum* from = sums.data() + m * kBlockColumns + segment.lane;
          T* to = &target.at(segment.n, channel, segment.i, segment.j);
          for (int64_t x = 0; x < segment.length; ++x) to[x * target.stride_w] = store<T>(from[x] + shift);
        }
      }
    }
  });
}

// What the output's pixels read of the input.
template <class T>
Gather<T> gather_input(const Conv2dShape& shape, const Strided4d<const T>& input) {
  Gather<T> gather{input,   shape.H, shape.W,        shape.C / shape.G, shape.N,
                   shape.P, shape.Q, shape.stride_h, shape.stride_w,    {}};
  for (int64_t r = 0; r < shape.R; ++r) {
    for (int64_t s = 0; s < shape.S; ++s) {
      gather.taps.push_back({r, s, r * shape.dilation_h - shape.pad_top, s * shape.dilation_w - shape.pad_left});
    }
  }
  return gather;
}

// What the input pixels h = phase_h + i*stride_h, w = phase_w + j*stride_w read of grad. h takes part in output row p
// through tap r when p*stride_h - pad_top + r*dilation_h = h, that is when phase_h + pad_top - r*dilation_h is a
// multiple of stride_h, and then p = i + (phase_h + pad_top - r*dilation_h) / stride_h. All pixels of a phase share
// their taps.
template <class T>
Gather<T> gather_grad(const Conv2dShape& shape, const Strided4d<const T>& grad, int64_t phase_h, int64_t phase_w) {
  const int64_t I = ceil_div(shape.H - phase_h, shape.stride_h), J = ceil_div(shape.W - phase_w, shape.stride_w);
  Gather<T> gather{grad, shape.P, shape.Q, shape.K / shape.G, shape.N, I, J, 1, 1, {}};
  for (int64_t r = 0; r < shape.R; ++r) {
    const int64_t h = phase_h + shape.pad_top - r * shape.dilation_h;
    for (int64_t s = 0; s < shape.S; ++s) {
      const int64_t w = phase_w + shape.pad_left - s * shape.dilation_w;
      if (floor_mod(h, shape.stride_h) == 0 && floor_mod(w, shape.stride_w) == 0) {
        gather.taps.push_back({r, s, floor_div(h, shape.stride_h), floor_div(w, shape.stride_w)});
      }
    }
  }
  return gather;
}

// sums[m][j] (M, kBlockColumns) = sum over pixels [first, last) of grad[m][pixel] * gathered[j][pixel] of group g,
// for channels m in [m_begin, m_begin + m_count) and columns j in [j_begin, j_end)
template <class T>
void sum_over_pixels(const Gather<T>& gather, const Strided4d<const T>& grad, int64_t g, int64_t m_begin,
                     int64_t m_count, int64_t j_begin, int64_t j_end, int64_t first, int64_t last,
                     Accumulate<T>* sums) {
  const int64_t panels = ceil_div(m_count, kTileRows);
  Scratch<Accumulate<T>> rows(panels * kTileRows * kBlockDepth), columns(kBlockDepth * kBlockColumns);
  std::fill_n(rows.data(), panels * kTileRows * kBlockDepth, Accumulate<T>(0));
  std::fill_n(columns.data(), kBlockDepth * kBlockColumns, Accumulate<T>(0));
  std::fill_n(sums, m_count * kBlockColumns, Accumulate<T>(0));
  std::vector<Segment> segments;
  for (int64_t pixel = first; pixel < last; pixel += kBlockDepth) {
    const int64_t count = std::min(kBlockDepth, last - pixel);
    cut_into_segments(gather, pixel, count, segments);
    pack_grad_rows(grad, segments, count, m_begin, m_begin + m_count, rows.data());
    pack_pixels_as_depth(gather, g, segments, j_begin, j_end, columns.data());
    multiply_block(m_count, j_end - j_begin, count, rows.data(), count * kTileRows, columns.data(), sums);
  }
}

}  // namespace

// ---- entry points --------------------------------------------------------------------------------

template <class T>
void conv2d_direct(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                   int64_t bias_stride, Strided4d<T> output) {
  const int64_t M = shape.K / shape.G;
  gather_and_multiply(
      gather_input(shape, input), shape.G, M,
      [&](int64_t g, int64_t m, int64_t d, const Tap& tap) { return load(weight.at(g * M + m, d, tap.r, tap.s)); },
      [&](int64_t k) { return bias == nullptr ? Accumulate<T>(0) : load(bias[k * bias_stride]); }, output);
}

template <class T>
void conv2d_direct_grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight,
                              const T* bias, int64_t bias_stride, Strided4d<T> grad_input) {
  if (shape.N == 0 || shape.C == 0) return;
  const int64_t M = shape.C / shape.G, D = shape.K / shape.G;
  for (int64_t phase_h = 0; phase_h < std::min(shape.stride_h, shape.H); ++phase_h) {
    for (int64_t phase_w = 0; phase_w < std::min(shape.stride_w, shape.W); ++phase_w) {
      const Strided4d<T> pixels_of_phase = {&grad_input.at(0, 0, phase_h, phase_w), grad_input.stride_n,
                                            grad_input.stride_c, grad_input.stride_h * shape.stride_h,
                                            grad_input.stride_w * shape.stride_w};
      gather_and_multiply(
          gather_grad(shape, grad, phase_h, phase_w), shape.G, M,
          [&](int64_t g, int64_t m, int64_t d, const Tap& tap) { return load(weight.at(g * D + d, m, tap.r, tap.s)); },
          [&](int64_t c) { return bias == nullptr ? Accumulate<T>(0) : load(bias[c * bias_stride]); }, pixels_of_phase);
    }
  }
}

// Tasks own a block of rows and columns of one group's grad_weight, and one of `chunks` stretches of pixels where there
// would be too few tasks otherwise; the chunks' sums are then added in order.
template <class T>
void conv2d_direct_grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                               Strided4d<T> grad_weight) {
  if (shape.C == 0) return;
  using Sum = Accumulate<T>;
  const Gather<T> gather = gather_input(shape, input);
  const int64_t M = shape.K / shape.G, columns = gather.depth(), pixels = gather.pixels();
  const int64_t column_blocks = ceil_div(columns, kBlockColumns), row_blocks = ceil_div(M, kBlockRows);
  const int64_t blocks = shape.G * row_blocks * column_blocks;
  const int64_t depth_blocks = std::max<int64_t>(1, ceil_div(pixels, kBlockDepth));
  const int64_t chunks = std::min(depth_blocks, ceil_div(kEnoughTasks, blocks));
  const int64_t block_rows = std::min(M, kBlockRows), block_size = block_rows * kBlockColumns;
  const int64_t products = block_rows * std::min(columns, kBlockColumns) * ceil_div(pixels, chunks);

  Scratch<Sum> partial(blocks * chunks * block_size);
  parallel_for(blocks * chunks, grain_of(products), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, block = task / chunks;
      const int64_t j = block % column_blocks * kBlockColumns, m = block / column_blocks % row_blocks * kBlockRows;
      const int64_t g = block / column_blocks / row_blocks;
      const int64_t first = depth_blocks * chunk / chunks * kBlockDepth;
      const int64_t last = std::min(pixels, depth_blocks * (chunk + 1) / chunks * kBlockDepth);
      sum_over_pixels(gather, grad, g, g * M + m, std::min(kBlockRows, M - m), j, std::min(columns, j + kBlockColumns),
                      first, last, partial.data() + task * block_size);
    }
  });

  parallel_for(shape.K, grain_of(columns * chunks), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t g = k / M, m = k % M;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t block = (g * row_blocks + m / kBlockRows) * column_blocks + j / kBlockColumns;
        const Sum* sums =
            partial.data() + block * chunks * block_size + m % kBlockRows * kBlockColumns + j % kBlockColumns;
        Sum sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * block_size];
        const Tap& tap = gather.taps[j / gather.D];
        grad_weight.at(k, j % gather.D, tap.r, tap.s) = store<T>(sum);
      }
    }
  });
}

template <class T>
void conv2d_direct_grad_bias(const Conv2dShape& shape, Strided4d<const T> grad, T* grad_bias) {
  constexpr int64_t kChannels = 16;  // of a task: one cache line of float in channels_last
  const int64_t pixels = shape.N * shape.P * shape.Q;
  parallel_for(ceil_div(shape.K, kChannels), grain_of(pixels * kChannels), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kChannels, count = std::min(kChannels, shape.K - first);
      double sums[kChannels] = {};
      for (int64_t n = 0; n < shape.N; ++n) {
        for (int64_t p = 0; p < shape.P; ++p) {
          // sums[k] += sum over q of grad[n, k, p, q]; the inner loop is the one that runs along memory
          const T* row = &grad.at(n, first, p, 0);
          if (grad.stride_c < grad.stride_w) {
            for (int64_t q = 0; q < shape.Q; ++q) {
              for (int64_t k = 0; k < count; ++k) sums[k] += load(row[q * grad.stride_w + k * grad.stride_c]);
            }
          } else {
            for (int64_t k = 0; k < count; ++k) {
              constexpr int64_t kParallelSums = 16;  // independent, so that they fill a vector
              Accumulate<T> lanes[kParallelSums] = {};
              int64_t q = 0;
              for (; q + kParallelSums <= shape.Q; q += kParallelSums) {
                for (int64_t x = 0; x < kParallelSums; ++x) {
                  lanes[x] += load(row[k * grad.stride_c + (q + x) * grad.stride_w]);
                }
              }
              for (; q < shape.Q; ++q) lanes[0] += load(row[k * grad.stride_c + q * grad.stride_w]);
              for (int64_t x = 0; x < kParallelSums; ++x) sums[k] += lanes[x];
            }
          }
        }
      }
      for (int64_t k = 0; k < count; ++k) grad_bias[first + k] = store<T>(Accumulate<T>(sums[k]));
    }
  });
}

#define DLKERNELS_INSTANTIATE(T)                                                                                     \
  template void conv2d_direct(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, const T*, int64_t,         \
                              Strided4d<T>);                                                                         \
  template void conv2d_direct_grad_input(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, const T*,       \
                                         int64_t, Strided4d<T>);                                                     \
  template void conv2d_direct_grad_weight(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, Strided4d<T>); \
  template void conv2d_direct_grad_bias(const Conv2dShape&, Strided4d<const T>, T*);
DLKERNELS_INSTANTIATE(double)
DLKERNELS_INSTANTIATE(float)
DLKERNELS_INSTANTIATE(BFloat16)
DLKERNELS_INSTANTIATE(Half)
#undef DLKERNELS_INSTANTIATE

}  // namespace dlkernels
