// conv2d of one input channel for each output channel (G = C = K), bound by the reading and writing of images.
//
//   output     [n, c, p, q] = bias[c] + sum over r, s of weight[c, r, s] * input[n, c, h, w]
//   grad_input [n, c, h, w] = the same over grad, for each phase of h and w by the stride (stencil.h)
//   grad_weight[c, r, s]    = sum over n, p, q of grad[n, c, p, q] * input[n, c, h, w]
// with h = p*stride_h - pad_top + r*dilation_h and w alike.
//
// Who owns what: channels_last: a task owns some rows of pixels of all channels; vectors run along the channels, and
// source pixels are read where they lie; those outside the source are a pixel of zeros. NCHW: a task owns a block of
// rows of one plane, packs the source rows it needs into a padded slab in L1, and sums vectors along the columns; where
// that would leave vectors half empty or ask for every second column (short rows, strides), a task owns such a block of
// a vector's width of planes instead, and transposes it to channels_last and back. Each way a tile of outputs shares
// the vectors it reads. Passes over memory: each image is read and written once, as long as R rows stay in L2.
// grad_weight: the sums of fixed stretches of rows, added in order, whatever the thread count.
#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "../simd.h"
#include "stencil.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kTaskProducts = 1 << 15;        // multiply-adds (some 2 us) below which a second thread does not pay
constexpr int64_t kEnoughTasks = 16;              // of grad_weight, for a handful of threads to share the work evenly
constexpr int kTileRows = 4;                      // NCHW: output rows that share source vectors, ...
constexpr int kPixelRows = 2, kPixelColumns = 4;  // ... channels_last: output pixels that do, beside 9 weights
constexpr int64_t kSlabBytes = 20 << 10;          // NCHW: padded rows; leaves room in a 32 KiB L1 for what is written
constexpr int64_t kBlockBytes = 128 << 10;        // of planes that lie transposed in L2
constexpr int64_t kGradColumns = 8;               // channels_last: pixels of grad whose products registers sum
constexpr int64_t kBlockChannels = 128;           // channels_last: of a grad_weight task, half a kilobyte side by side
constexpr int64_t kPixelsPerSum = 16;             // channels_last: that a grad_weight task adds up for each of its sums

int64_t grain_of(int64_t products_per_task) { return std::max<int64_t>(1, kTaskProducts / (products_per_task + 1)); }

// ---- taps known when compiling -------------------------------------------------------------------

// R x S neighbouring taps at a stride; R = 0: any other taps.
template <int R_, int S_, int STEP_H_, int STEP_W_>
struct Taps {
  static constexpr int R = R_, S = S_, STEP_H = STEP_H_, STEP_W = STEP_W_;
  static constexpr bool kKnown = R > 0;

  static bool fit(const Axis& h, const Axis& w) {
    return h.taps == R && w.taps == S && h.step == STEP_H && w.step == STEP_W && (R == 1 || h.spacing == 1) &&
           (S == 1 || w.spacing == 1);
  }
};
using AnyTaps = Taps<0, 0, 1, 1>;

// Calls run(Taps) with the taps of these axes: 3x3 with stride 1 and 2, ...
template <class Run>
void with_3x3(const Axis& h, const Axis& w, const Run& run) {
  if (Taps<3, 3, 1, 1>::fit(h, w)) return run(Taps<3, 3, 1, 1>{});
  if (Taps<3, 3, 2, 2>::fit(h, w)) return run(Taps<3, 3, 2, 2>{});
  run(AnyTaps{});
}

// ... and what a phase of the latter's gradient has.
template <class Run>
void with_taps(const Axis& h, const Axis& w, const Run& run) {
  if (Taps<2, 2, 1, 1>::fit(h, w)) return run(Taps<2, 2, 1, 1>{});
  if (Taps<2, 1, 1, 1>::fit(h, w)) return run(Taps<2, 1, 1, 1>{});
  if (Taps<1, 2, 1, 1>::fit(h, w)) return run(Taps<1, 2, 1, 1>{});
  if (Taps<1, 1, 1, 1>::fit(h, w)) return run(Taps<1, 1, 1, 1>{});
  with_3x3(h, w, run);
}

// ---- kernels: NCHW -------------------------------------------------------------------------------

// A block of padded rows, as its output (0, 0) and the tap (0, 0) see it.
template <class A>
struct BlockOfRows {
  const A* rows;
  int64_t pitch;
};

// to[i][j] = bias + sum over r, s of weight[r*S + s] * rows[i + r*spacing_h][j + s*spacing_w]
// for ROWS rows from i on and `count` columns, at most a vector of them, from j on
template <class TAPS, int ROWS, class A, class To>
inline void sum_rows(const BlockOfRows<A>& block, const Axis& h, const Axis& w, const A* weight, A bias, int64_t i,
                     int64_t j, int64_t count, To* to, int64_t to_pitch) {
  Vector<A> sums[ROWS];
  for (auto& sum : sums) sum = Vector<A>{} + bias;
  const A* rows = block.rows + i * block.pitch + j;
  if constexpr (TAPS::kKnown) {
#pragma GCC unroll 16
    for (int y = 0; y < ROWS - 1 + TAPS::R; ++y) {
#pragma GCC unroll 4
      for (int s = 0; s < TAPS::S; ++s) {
        const Vector<A> x = load_vector(rows + y * block.pitch + s);
#pragma GCC unroll 4
        for (int o = 0; o < ROWS; ++o) {
          const int r = y - o;
          if (r >= 0 && r < TAPS::R) sums[o] += weight[r * TAPS::S + s] * x;
        }
      }
    }
  } else {
    for (int64_t r = 0; r < h.taps; ++r) {
      for (int64_t s = 0; s < w.taps; ++s, ++weight) {
#pragma GCC unroll 4
        for (int o = 0; o < ROWS; ++o) {
          sums[o] += *weight * load_vector(rows + (o + r * h.spacing) * block.pitch + s * w.spacing);
        }
      }
    }
  }
  for (int o = 0; o < ROWS; ++o) store_as<A>(to + (i + o) * to_pitch + j, count, sums[o]);
}

// The same for all of I x J outputs. The last rows are summed together with some of those before them once more.
template <class TAPS, class A, class To>
void sum_block(const BlockOfRows<A>& block, const Axis& h, const Axis& w, const A* weight, A bias, int64_t I, To* to,
               int64_t to_pitch) {
  const int64_t J = w.outputs;
  for (int64_t i = 0; i < I; i += I < kTileRows ? 1 : kTileRows) {
    for (int64_t j = 0; j < J; j += kLanes<A>) {
      const int64_t count = std::min<int64_t>(kLanes<A>, J - j);
      if (I < kTileRows) {
        sum_rows<AnyTaps, 1>(block, h, w, weight, bias, i, j, count, to, to_pitch);
      } else {
        sum_rows<TAPS, kTileRows>(block, h, w, weight, bias, std::min(i, I - kTileRows), j, count, to, to_pitch);
      }
    }
  }
}

// How the planes of one call are cut into blocks of rows, each with its slab.
template <class A>
struct Blocks {
  Axis h, w;
  PaddedRows slab;
  int64_t rows, count;  // output rows of a block; blocks of a plane

  Blocks(const Axis& h, const Axis& w) : h(h), w(w), slab(PaddedRows::of<A>(w.first, w.reach(w.outputs))) {
    const int64_t wanted = kSlabBytes / (slab.pitch * int64_t(sizeof(A)));
    count = ceil_div(h.outputs, std::max<int64_t>(wanted, kTileRows));
    rows = ceil_div(h.outputs, count);
    count = ceil_div(h.outputs, rows);
  }
  int64_t slab_size() const { return h.reach(rows) * slab.pitch; }
  int64_t first(int64_t block) const { return block * rows; }
  int64_t outputs(int64_t block) const { return std::min(rows, h.outputs - first(block)); }

  template <class T>
  void pack(const T* plane, int64_t stride_h, int64_t block, A* to) const {
    const int64_t origin = first(block) + h.first;
    pack_rows(slab, plane, stride_h, h.source, w.source, origin, h.reach(outputs(block)), to);
  }
};

int64_t taps_of(const std::vector<Axis>& axes) {
  int64_t taps = 0;
  for (const Axis& axis : axes) taps += axis.taps;
  return taps;
}

// The weights of one channel in the order of the taps.
template <class T>
void gather_weight(const Strided4d<const T>& weight, int64_t c, const Axis& h, const Axis& w, Accumulate<T>* to) {
  for (int64_t r = 0; r < h.taps; ++r) {
    for (int64_t s = 0; s < w.taps; ++s) *to++ = load(weight.at(c, 0, h.weight(r), w.weight(s)));
  }
}

// target = bias + sums over the source, plane by plane
template <class T>
void sum_planes(int64_t N, int64_t C, const Axis& h, const Axis& w, const Strided4d<const T>& source,
                const Strided4d<const T>& weight, const T* bias, int64_t bias_stride, const Strided4d<T>& target) {
  using A = Accumulate<T>;
  const Blocks<A> blocks(h, w);
  const int64_t taps = h.taps * w.taps;
  parallel_for(N * C * blocks.count, grain_of(blocks.rows * w.outputs * taps), [&](int64_t begin, int64_t end) {
    Scratch<A> packed(blocks.slab_size()), factors(taps);
    std::fill_n(packed.data(), blocks.slab_size(), A(0));
    const BlockOfRows<A> rows{packed.data(), blocks.slab.pitch};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks.count, plane = task / blocks.count, c = plane % C, n = plane / C;
      blocks.pack(source.at(n, c), source.stride_h, block, packed.data());
      gather_weight(weight, c, h, w, factors.data());
      const A offset = bias == nullptr ? A(0) : load(bias[c * bias_stride]);
      T* to = target.at(n, c) + blocks.first(block) * target.stride_h;
      with_taps(h, w, [&]<class TAPS>(TAPS) {
        sum_block<TAPS>(rows, h, w, factors.data(), offset, blocks.outputs(block), to, target.stride_h);
      });
    }
  });
}

// grad_weight[c, r, s] = sums[r*S + s]
template <class T>
void store_weights(const Accumulate<T>* sums, const Conv2dShape& shape, int64_t c, const Strided4d<T>& grad_weight) {
  for (int64_t r = 0; r < shape.R; ++r) {
    for (int64_t s = 0; s < shape.S; ++s) grad_weight.at(c, 0, r, s) = store<T>(*sums++);
  }
}

// sums[r*S + s] += sum over i < ROWS of grad[i][j] * rows[i + r*spacing_h][j + s*spacing_w], lanes j < count
template <class TAPS, int ROWS, class T, class A>
inline void add_products(const BlockOfRows<A>& block, const T* grad, int64_t grad_pitch, int64_t i, int64_t j,
                         int64_t count, int64_t spacing_w, Vector<A>* sums) {
  Vector<A> factors[ROWS];
  for (int o = 0; o < ROWS; ++o) factors[o] = load_as<A>(grad + (i + o) * grad_pitch + j, count);
  const A* rows = block.rows + i * block.pitch + j;
#pragma GCC unroll 16
  for (int y = 0; y < ROWS - 1 + TAPS::R; ++y) {
#pragma GCC unroll 4
    for (int s = 0; s < TAPS::S; ++s) {
      // what lies behind the last column may be infinite, and its product with a grad of zero no number
      const Vector<A> x = load_as<A>(rows + y * block.pitch + s * spacing_w, count);
#pragma GCC unroll 4
      for (int o = 0; o < ROWS; ++o) {
        const int r = y - o;
        if (r >= 0 && r < TAPS::R) sums[r * TAPS::S + s] += factors[o] * x;
      }
    }
  }
}

// sums[r*S + s] (a vector's lanes each) += the same for all of I x J
template <class TAPS, class T, class A>
void add_block_products(const BlockOfRows<A>& block, const T* grad, int64_t grad_pitch, int64_t I, int64_t J,
                        int64_t spacing_w, A* sums) {
  constexpr int kTaps = TAPS::R * TAPS::S;
  constexpr int64_t L = kLanes<A>;
  Vector<A> block_sums[kTaps] = {};
  for (int64_t j = 0; j < J; j += L) {
    const int64_t count = std::min(L, J - j);
    int64_t i = 0;
    for (; i + kTileRows <= I; i += kTileRows) {
      add_products<TAPS, kTileRows>(block, grad, grad_pitch, i, j, count, spacing_w, block_sums);
    }
    for (; i < I; ++i) add_products<TAPS, 1>(block, grad, grad_pitch, i, j, count, spacing_w, block_sums);
  }
  for (int t = 0; t < kTaps; ++t) store_vector(sums + t * L, load_vector(sums + t * L) + block_sums[t]);
}

// The same for any taps: row by row of the kernel, whose taps are taken four and one at a time.
template <class T, class A>
void add_block_products_of(const BlockOfRows<A>& block, const Axis& h, const Axis& w, const T* grad, int64_t grad_pitch,
                           int64_t I, A* sums) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t r = 0; r < h.taps; ++r) {
    for (int64_t s = 0; s < w.taps;) {
      const BlockOfRows<A> part{block.rows + r * h.spacing * block.pitch + s * w.spacing, block.pitch};
      A* part_sums = sums + (r * w.taps + s) * L;
      const bool four = s + 4 <= w.taps;
      if (four) add_block_products<Taps<1, 4, 1, 1>>(part, grad, grad_pitch, I, w.outputs, w.spacing, part_sums);
      if (!four) add_block_products<Taps<1, 1, 1, 1>>(part, grad, grad_pitch, I, w.outputs, w.spacing, part_sums);
      s += four ? 4 : 1;
    }
  }
}

// grad_weight plane by plane: a task sums one channel over one of `chunks` stretches of all blocks of all images.
template <class T>
void multiply_planes(const Conv2dShape& shape, const Strided4d<const T>& grad, const Strided4d<const T>& input,
                     const Strided4d<T>& grad_weight) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  const Axis h = forward_axes_h(shape)[0], w = forward_axes_w(shape)[0];
  const Blocks<A> blocks(h, w);
  const int64_t C = shape.C, taps = shape.R * shape.S, all = shape.N * blocks.count;
  const int64_t chunks = std::max<int64_t>(1, std::min(all, ceil_div(kEnoughTasks, C)));
  Scratch<A> partial(C * chunks * taps);
  const int64_t products = ceil_div(all, chunks) * blocks.rows * w.outputs * taps;
  parallel_for(C * chunks, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<A> packed(blocks.slab_size()), sums(taps * L);
    std::fill_n(packed.data(), blocks.slab_size(), A(0));
    const BlockOfRows<A> rows{packed.data(), blocks.slab.pitch};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / chunks, chunk = task % chunks;
      std::fill_n(sums.data(), taps * L, A(0));
      for (int64_t item = all * chunk / chunks; item < all * (chunk + 1) / chunks; ++item) {
        const int64_t n = item / blocks.count, block = item % blocks.count, I = blocks.outputs(block);
        blocks.pack(input.at(n, c), input.stride_h, block, packed.data());
        const T* factors = grad.at(n, c) + blocks.first(block) * grad.stride_h;
        with_3x3(h, w, [&]<class TAPS>(TAPS) {
          if constexpr (TAPS::kKnown) {
            add_block_products<TAPS>(rows, factors, grad.stride_h, I, w.outputs, 1, sums.data());
          } else {
            add_block_products_of(rows, h, w, factors, grad.stride_h, I, sums.data());
          }
        });
      }
      for (int64_t t = 0; t < taps; ++t) {
        partial.data()[task * taps + t] = sum_of_lanes<A>(load_vector(sums.data() + t * L));
      }
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    A* sums = partial.data() + c * chunks * taps;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t t = 0; t < taps; ++t) sums[t] += sums[chunk * taps + t];
    }
    store_weights(sums, shape, c, grad_weight);
  }
}

// ---- kernels: channels_last ----------------------------------------------------------------------

template <int ROWS, int COLUMNS>
struct Tile {};

// Where the source pixels of a tile lie: all inside the source, so that strides tell; or in a table, where those
// outside are a pixel of zeros.
template <class T>
struct PixelsInside {
  const T* first;
  int64_t stride_h, stride_w;
  const T* operator()(int64_t y, int64_t x) const { return first + y * stride_h + x * stride_w; }
};
template <class T>
struct PixelsInTable {
  const T* const* table;
  int64_t columns;
  const T* operator()(int64_t y, int64_t x) const { return table[y * columns + x]; }
};

// The source of a call as its tiles see it.
template <class T>
struct PixelSource {
  const Strided4d<const T>& images;
  const T* zeros;  // (C)
  const Axis &h, &w;
  std::vector<const T*>& table;

  // Calls run(pixels) for what a tile of rows x columns outputs from (i, j) on reads.
  template <class Run>
  void with_pixels(int64_t n, int64_t i, int64_t j, int64_t rows, int64_t columns, const Run& run) const {
    const int64_t y = i * h.step + h.first, x = j * w.step + w.first;
    const int64_t reach_h = h.reach(rows), reach_w = w.reach(columns);
    const T* image = images.at(n, 0);
    if (y >= 0 && x >= 0 && y + reach_h <= h.source && x + reach_w <= w.source) {
      return run(PixelsInside<T>{image + y * images.stride_h + x * images.stride_w, images.stride_h, images.stride_w});
    }
    table.clear();
    for (int64_t a = y; a < y + reach_h; ++a) {
      for (int64_t b = x; b < x + reach_w; ++b) {
        const bool inside = a >= 0 && a < h.source && b >= 0 && b < w.source;
        table.push_back(inside ? image + a * images.stride_h + b * images.stride_w : zeros);
      }
    }
    run(PixelsInTable<T>{table.data(), reach_w});
  }
};

// to[o, u][c] = bias[c] + sum over r, s of weight[r*S + s][c] * pixels(o*step + r*spacing, u*step + s*spacing)[c]
// for a tile of ROWS x COLUMNS outputs and channels c from `first` on; weight (taps, pitch)
template <class TAPS, int ROWS, int COLUMNS, class T, class Pixels>
void sum_pixels(const Pixels& pixels, const Axis& h, const Axis& w, const Accumulate<T>* weight, int64_t pitch,
                const Accumulate<T>* bias, int64_t first, int64_t C, T* to, int64_t to_h, int64_t to_w) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  Vector<A> sums[ROWS][COLUMNS];
  if constexpr (TAPS::kKnown) {
    int64_t c = first;
    for (; c + L <= C; c += L) {
      for (auto& row : sums) {
        for (auto& sum : row) sum = load_vector(bias + c);
      }
#pragma GCC unroll 8
      for (int y = 0; y < (ROWS - 1) * TAPS::STEP_H + TAPS::R; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < (COLUMNS - 1) * TAPS::STEP_W + TAPS::S; ++x) {
          const Vector<A> pixel = load_as<A>(pixels(y, x) + c);
#pragma GCC unroll 4
          for (int o = 0; o < ROWS; ++o) {
#pragma GCC unroll 4
            for (int u = 0; u < COLUMNS; ++u) {
              const int r = y - o * TAPS::STEP_H, s = x - u * TAPS::STEP_W;
              if (r >= 0 && r < TAPS::R && s >= 0 && s < TAPS::S) {
                sums[o][u] += load_vector(weight + (r * TAPS::S + s) * pitch + c) * pixel;
              }
            }
          }
        }
      }
      for (int o = 0; o < ROWS; ++o) {
        for (int u = 0; u < COLUMNS; ++u) store_as<A>(to + o * to_h + u * to_w + c, sums[o][u]);
      }
    }
    if (c < C) sum_pixels<AnyTaps, ROWS, COLUMNS>(pixels, h, w, weight, pitch, bias, c, C, to, to_h, to_w);
  } else {
    for (int64_t c = first; c < C; c += L) {
      const int64_t count = std::min(L, C - c);
      for (auto& row : sums) {
        for (auto& sum : row) sum = load_vector(bias + c);
      }
      const A* factors = weight + c;
      for (int64_t r = 0; r < h.taps; ++r) {
        for (int64_t s = 0; s < w.taps; ++s, factors += pitch) {
          const Vector<A> factor = load_vector(factors);
#pragma GCC unroll 2
          for (int o = 0; o < ROWS; ++o) {
#pragma GCC unroll 4
            for (int u = 0; u < COLUMNS; ++u) {
              const T* pixel = pixels(o * h.step + r * h.spacing, u * w.step + s * w.spacing);
              sums[o][u] += factor * load_as<A>(pixel + c, count);
            }
          }
        }
      }
      for (int o = 0; o < ROWS; ++o) {
        for (int u = 0; u < COLUMNS; ++u) store_as<A>(to + o * to_h + u * to_w + c, count, sums[o][u]);
      }
    }
  }
}

// target[i, j] = bias + sums over the source for rows of pixels [begin, end); weight (taps, pitch). Where there are
// enough rows and columns, only full tiles are summed: the last ones cover some pixels once more.
template <class T>
void sum_pixel_rows(const PixelSource<T>& source, int64_t n, int64_t begin, int64_t end, int64_t C,
                    const Accumulate<T>* weight, int64_t pitch, const Accumulate<T>* bias, const Strided4d<T>& target) {
  const Axis &h = source.h, &w = source.w;
  const auto sum_tile = [&]<class TAPS, int ROWS, int COLUMNS>(TAPS, Tile<ROWS, COLUMNS>, int64_t i, int64_t j) {
    T* to = &target.at(n, 0, h.place(i), w.place(j));
    source.with_pixels(n, i, j, ROWS, COLUMNS, [&](const auto& pixels) {
      sum_pixels<TAPS, ROWS, COLUMNS>(pixels, h, w, weight, pitch, bias, 0, C, to, h.place_step * target.stride_h,
                                      w.place_step * target.stride_w);
    });
  };
  if (end - begin < kPixelRows || w.outputs < kPixelColumns) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < w.outputs; ++j) sum_tile(AnyTaps{}, Tile<1, 1>{}, i, j);
    }
    return;
  }
  with_taps(h, w, [&](auto taps) {
    for (int64_t i = begin; i < end; i += kPixelRows) {
      for (int64_t j = 0; j < w.outputs; j += kPixelColumns) {
        sum_tile(taps, Tile<kPixelRows, kPixelColumns>{}, std::min(i, end - kPixelRows),
                 std::min(j, w.outputs - kPixelColumns));
      }
    }
  });
}

// The weights that planes first, first + 1, ... (n*C + c) have at the taps of these axes: to[t][lane], zero from
// `count` to pitch
template <class T>
void gather_weights(const Strided4d<const T>& weight, int64_t C, int64_t first, int64_t count, const Axis& h,
                    const Axis& w, int64_t pitch, Accumulate<T>* to) {
  for (int64_t r = 0; r < h.taps; ++r) {
    for (int64_t s = 0; s < w.taps; ++s, to += pitch) {
      const T* from = &weight.at(0, 0, h.weight(r), w.weight(s));
      for (int64_t lane = 0, c = first % C; lane < count; ++lane, c = c + 1 < C ? c + 1 : 0) {
        to[lane] = load(from[c * weight.stride_n]);
      }
      std::fill_n(to + count, pitch - count, Accumulate<T>(0));
    }
  }
}

template <class T>
void gather_bias(const T* bias, int64_t stride, int64_t C, int64_t first, int64_t count, int64_t pitch,
                 Accumulate<T>* to) {
  for (int64_t lane = 0; lane < pitch; ++lane) {
    to[lane] = bias != nullptr && lane < count ? load(bias[(first + lane) % C * stride]) : Accumulate<T>(0);
  }
}

// One phase of the weights, and where it lies.
template <class A>
struct PhaseWeights {
  Axis h, w;
  const A* weight;
};

// target = bias + sums over the source, for all phases hs x ws, some rows of pixels at a time
template <class T>
void sum_images(int64_t N, int64_t C, const std::vector<Axis>& hs, const std::vector<Axis>& ws,
                const Strided4d<const T>& source, const Strided4d<const T>& weight, const T* bias, int64_t bias_stride,
                const Strided4d<T>& target) {
  using A = Accumulate<T>;
  const int64_t pitch = ceil_div(C, int64_t(kLanes<A>)) * kLanes<A>, taps = taps_of(hs) * taps_of(ws);
  Scratch<A> weights(taps * pitch), offsets(pitch);
  gather_bias(bias, bias_stride, C, 0, C, pitch, offsets.data());
  Scratch<T> zeros(C);
  std::fill_n(zeros.data(), C, T{});
  std::vector<PhaseWeights<A>> phases;
  A* to = weights.data();
  for (const Axis& h : hs) {
    for (const Axis& w : ws) {
      gather_weights(weight, C, 0, C, h, w, pitch, to);
      phases.push_back({h, w, to});
      to += h.taps * w.taps * pitch;
    }
  }

  // Every task has two rows of each phase but an image's last one, which has what is left: up to three.
  const int64_t pairs = std::max<int64_t>(1, hs[0].outputs / kPixelRows), J = ws[0].outputs;
  parallel_for(N * pairs, grain_of(kPixelRows * J * taps * C), [&](int64_t begin, int64_t end) {
    std::vector<const T*> table;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / pairs, i = task % pairs * kPixelRows;
      for (const PhaseWeights<A>& phase : phases) {
        const PixelSource<T> pixels{source, zeros.data(), phase.h, phase.w, table};
        const int64_t last = (task + 1) % pairs == 0 ? phase.h.outputs : std::min(i + kPixelRows, phase.h.outputs);
        sum_pixel_rows(pixels, n, i, last, C, phase.weight, pitch, offsets.data(), target);
      }
    }
  });
}

// sums[r*S + s][c] += sum over o, u of grad[o, u][c] * pixels(o*step + r*spacing, u*step + s*spacing)[c]
// for a tile of ROWS x `columns` pixels of grad and channels c from `first` on; sums (taps, pitch)
template <class TAPS, int ROWS, class T, class Pixels>
void add_pixel_products(const Pixels& pixels, const Axis& h, const Axis& w, const T* grad, int64_t grad_h,
                        int64_t grad_w, int64_t columns, int64_t first, int64_t C, Accumulate<T>* sums, int64_t pitch) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  if constexpr (TAPS::kKnown) {
    int64_t c = first;
    for (; c + L <= C; c += L) {
      Vector<A> products[TAPS::R * TAPS::S];
      for (int t = 0; t < TAPS::R * TAPS::S; ++t) products[t] = load_vector(sums + t * pitch + c);
      for (int64_t u = 0; u < columns; ++u) {
        Vector<A> factors[ROWS];
        for (int o = 0; o < ROWS; ++o) factors[o] = load_as<A>(grad + o * grad_h + u * grad_w + c);
#pragma GCC unroll 8
        for (int y = 0; y < (ROWS - 1) * TAPS::STEP_H + TAPS::R; ++y) {
#pragma GCC unroll 4
          for (int s = 0; s < TAPS::S; ++s) {
            const Vector<A> pixel = load_as<A>(pixels(y, u * TAPS::STEP_W + s) + c);
#pragma GCC unroll 4
            for (int o = 0; o < ROWS; ++o) {
              const int r = y - o * TAPS::STEP_H;
              if (r >= 0 && r < TAPS::R) products[r * TAPS::S + s] += factors[o] * pixel;
            }
          }
        }
      }
      for (int t = 0; t < TAPS::R * TAPS::S; ++t) store_vector(sums + t * pitch + c, products[t]);
    }
    if (c < C) add_pixel_products<AnyTaps, ROWS>(pixels, h, w, grad, grad_h, grad_w, columns, c, C, sums, pitch);
  } else {
    for (int64_t c = first; c < C; c += L) {
      const int64_t count = std::min(L, C - c);
      A* to = sums + c;
      for (int64_t r = 0; r < h.taps; ++r) {
        for (int64_t s = 0; s < w.taps; ++s, to += pitch) {
          Vector<A> sum = load_vector(to);
          for (int64_t u = 0; u < columns; ++u) {
            for (int o = 0; o < ROWS; ++o) {
              const T* pixel = pixels(o * h.step + r * h.spacing, u * w.step + s * w.spacing);
              sum += load_as<A>(grad + o * grad_h + u * grad_w + c, count) * load_as<A>(pixel + c, count);
            }
          }
          store_vector(to, sum);
        }
      }
    }
  }
}

// The same for rows of pixels of grad [begin, end).
template <class T>
void add_row_products(const PixelSource<T>& source, const Strided4d<const T>& grad, int64_t n, int64_t begin,
                      int64_t end, int64_t C, Accumulate<T>* sums, int64_t pitch) {
  const Axis &h = source.h, &w = source.w;
  const int64_t tiles = ceil_div(w.outputs, kGradColumns);
  const auto add_row = [&]<class TAPS, int ROWS>(TAPS, Tile<ROWS, 0>, int64_t i) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t j = w.outputs * tile / tiles, columns = w.outputs * (tile + 1) / tiles - j;
      source.with_pixels(n, i, j, ROWS, columns, [&](const auto& pixels) {
        add_pixel_products<TAPS, ROWS>(pixels, h, w, &grad.at(n, 0, i, j), grad.stride_h, grad.stride_w, columns, 0, C,
                                       sums, pitch);
      });
    }
  };
  with_3x3(h, w, [&](auto taps) {
    int64_t i = begin;
    for (; i + kPixelRows <= end; i += kPixelRows) add_row(taps, Tile<kPixelRows, 0>{}, i);
    for (; i < end; ++i) add_row(AnyTaps{}, Tile<1, 0>{}, i);
  });
}

// grad_weight for a block of channels at a time: a task sums over one of `chunks` stretches of the rows of all images,
// long enough to be worth a set of sums of its own.
template <class T>
void multiply_images(const Conv2dShape& shape, const Strided4d<const T>& grad, const Strided4d<const T>& input,
                     const Strided4d<T>& grad_weight) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  const Axis h = forward_axes_h(shape)[0], w = forward_axes_w(shape)[0];
  const int64_t C = shape.C, taps = shape.R * shape.S, pitch = ceil_div(C, L) * L;
  const int64_t pairs = ceil_div(shape.P, int64_t(kPixelRows)), all = shape.N * pairs;
  const int64_t block = ceil_div(ceil_div(C, std::max<int64_t>(1, C / kBlockChannels)), L) * L;
  const int64_t blocks = ceil_div(C, block), worthwhile = shape.N * shape.P * shape.Q / (kPixelsPerSum * taps);
  const int64_t chunks =
      std::clamp<int64_t>(std::min(worthwhile, ceil_div(kEnoughTasks, blocks)), 1, std::max<int64_t>(1, all));
  Scratch<A> partial(chunks * taps * pitch);
  Scratch<T> zeros(C);
  std::fill_n(zeros.data(), C, T{});
  const int64_t products = ceil_div(all, chunks) * kPixelRows * shape.Q * taps * block;
  parallel_for(chunks * blocks, grain_of(products), [&](int64_t begin, int64_t end) {
    std::vector<const T*> table;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / blocks, c = task % blocks * block, count = std::min(block, C - c);
      A* sums = partial.data() + chunk * taps * pitch + c;
      for (int64_t t = 0; t < taps; ++t) std::fill_n(sums + t * pitch, ceil_div(count, L) * L, A(0));
      Strided4d<const T> pixels = input, grads = grad;
      pixels.data += c;
      grads.data += c;
      const PixelSource<T> source{pixels, zeros.data(), h, w, table};
      for (int64_t item = all * chunk / chunks; item < all * (chunk + 1) / chunks; ++item) {
        const int64_t n = item / pairs, i = item % pairs * kPixelRows;
        add_row_products(source, grads, n, i, std::min(i + kPixelRows, shape.P), count, sums, pitch);
      }
    }
  });
  parallel_for(C, grain_of(taps * chunks), [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = begin; c < end; ++c) {
        A sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial.data()[(chunk * taps + t) * pitch + c];
        grad_weight.at(c, 0, t / shape.S, t % shape.S) = store<T>(sum);
      }
    }
  });
}

// ---- kernels: NCHW by way of channels_last ---------------------------------------------------------

// L planes of images, n*C + c = first, first + 1, ..., pixel by pixel as vectors. Where there are fewer, the first one
// stands in for those that are missing.
template <class T>
struct PlaneVectors {
  using A = Accumulate<std::remove_const_t<T>>;
  static constexpr int64_t L = kLanes<A>;

  T* planes[L];
  int64_t count, stride_h, W;

  // Of these planes, columns [begin, end).
  template <class Source>
  PlaneVectors(const Source& images, int64_t N, int64_t C, int64_t first, int64_t begin, int64_t end)
      : count(std::min(L, N * C - first)), stride_h(images.stride_h), W(end - begin) {
    for (int64_t lane = 0; lane < L; ++lane) {
      const int64_t plane = lane < count ? first + lane : first;
      planes[lane] = images.at(plane / C, plane % C) + begin;
    }
  }

  // to[h - begin][w][lane] = planes[lane][h][w] for rows h in [begin, end); to (end - begin, pitch, L)
  void load_rows(int64_t begin, int64_t end, int64_t pitch, A* to) const {
    const int64_t gap = (pitch - W) * L;
    int64_t left = W;  // pixels to come of this row
    for (int64_t row = begin; row < end; row += stride_h == W ? end - begin : 1) {
      const int64_t first = row * stride_h, last = first + (stride_h == W ? end - begin : 1) * W;
      for (int64_t offset = first; offset < last; offset += L) {
        const int64_t pixels = std::min(L, last - offset);
        Vector<A> lanes[L];
#pragma GCC unroll 16
        for (int lane = 0; lane < L; ++lane) lanes[lane] = load_as<A>(planes[lane] + offset, pixels);
        transpose<A>(lanes);
        if (left > L && pixels == L) {
#pragma GCC unroll 16
          for (int pixel = 0; pixel < L; ++pixel) store_vector(to + pixel * L, lanes[pixel]);
          to += L * L;
          left -= L;
          continue;
        }
        for (int64_t pixel = 0; pixel < pixels; ++pixel, to += L) {
          store_vector(to, lanes[pixel]);
          if (--left == 0) to += gap, left = W;
        }
      }
    }
  }

  // planes[lane][h][w] = from[h - begin][w][lane]; from (end - begin, W, L), and as many vectors again behind it
  void store_rows(int64_t begin, int64_t end, const A* from) const {
    for (int64_t row = begin; row < end; row += stride_h == W ? end - begin : 1) {
      const int64_t first = row * stride_h, last = first + (stride_h == W ? end - begin : 1) * W;
      for (int64_t offset = first; offset < last; offset += L) {
        const int64_t pixels = std::min(L, last - offset);
        Vector<A> lanes[L];
#pragma GCC unroll 16
        for (int pixel = 0; pixel < L; ++pixel) lanes[pixel] = load_vector(from + pixel * L);
        from += pixels * L;
        transpose<A>(lanes);
        if (count == L && pixels == L) {
#pragma GCC unroll 16
          for (int lane = 0; lane < L; ++lane) store_as<A>(planes[lane] + offset, lanes[lane]);
        } else {
          for (int64_t lane = 0; lane < count; ++lane) store_as<A>(planes[lane] + offset, pixels, lanes[lane]);
        }
      }
    }
  }
};

// The lowest and the highest source position, relative to i*step, that output i of any of the axes reads.
struct Span {
  int64_t low = 0, high = 0;

  explicit Span(const std::vector<Axis>& axes) {
    bool empty = true;
    for (const Axis& axis : axes) {
      if (axis.taps == 0) continue;
      const int64_t last = axis.first + (axis.taps - 1) * axis.spacing;
      low = empty ? axis.first : std::min(low, axis.first);
      high = empty ? last : std::max(high, last);
      empty = false;
    }
  }
};

// What `count` outputs of any of the axes, from i on, read of the source, with zeros where that is outside of it.
struct Window {
  int64_t first, size;  // source positions [first, first + size), ...
  int64_t begin, end;   // ... of which these lie inside

  Window(const std::vector<Axis>& axes, int64_t i, int64_t count) {
    const Span span(axes);
    first = i * axes[0].step + span.low;
    size = (count - 1) * axes[0].step + span.high - span.low + 1;
    end = std::clamp(axes[0].source, first, first + size);
    begin = std::clamp<int64_t>(0, first, end);
  }

  // The axis of `outputs` outputs from i on that finds this window as its source.
  Axis of(Axis axis, int64_t i, int64_t outputs) const {
    axis.first += i * axis.step - first;
    axis.outputs = outputs;
    axis.source = size;
    return axis;
  }
};

// Fills the window h x w of the planes, at `to` (h.size, w.size, L). Zeros left and right stay from before.
template <class T, class A>
void load_window(const PlaneVectors<const T>& planes, const Window& h, const Window& w, A* to) {
  const int64_t row = w.size * kLanes<A>, above = h.begin - h.first, inside = h.end - h.begin;
  std::fill_n(to, above * row, A(0));
  planes.load_rows(h.begin, h.end, w.size, to + above * row + (w.begin - w.first) * kLanes<A>);
  std::fill(to + (above + inside) * row, to + h.size * row, A(0));
}

// Of I rows of outputs, cut into blocks of about the same size that fit into cache.
int64_t rows_of_block(int64_t I, int64_t row_bytes) {
  return ceil_div(I, ceil_div(I, std::max<int64_t>(kPixelRows, kBlockBytes / row_bytes)));
}

// target (N, C, H, W) = bias + sums over the source, for all phases hs x ws, for a vector of planes and a block of rows
// at a time
template <class T>
void sum_plane_vectors(int64_t N, int64_t C, const std::vector<Axis>& hs, const std::vector<Axis>& ws,
                       const Strided4d<const T>& source, const Strided4d<const T>& weight, const T* bias,
                       int64_t bias_stride, int64_t H, int64_t W, const Strided4d<T>& target) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  const int64_t I = hs[0].outputs, place_step = hs[0].place_step, source_W = ws[0].source;
  const int64_t taps = taps_of(hs) * taps_of(ws);
  const int64_t row_bytes = (hs[0].step * source_W + place_step * W) * L * sizeof(A);
  const int64_t block_rows = rows_of_block(I, row_bytes), blocks = ceil_div(I, block_rows);
  const int64_t vectors = ceil_div(N * C, L);
  const Window columns(ws, 0, ws[0].outputs);
  const int64_t size = Window(hs, 0, block_rows).size * columns.size * L;
  parallel_for(vectors * blocks, grain_of(block_rows * ws[0].outputs * taps * L), [&](int64_t begin, int64_t end) {
    Scratch<A> from(size), to((block_rows * place_step * W + L) * L), factors(taps * L), offsets(L);
    std::fill_n(from.data(), size, A(0));
    std::vector<const A*> table;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / blocks * L, i = task % blocks * block_rows;
      const Window rows(hs, i, std::min(block_rows, I - i));
      const PlaneVectors<const T> planes(source, N, C, first, columns.begin, columns.end);
      load_window(planes, rows, columns, from.data());
      gather_bias(bias, bias_stride, C, first, planes.count, L, offsets.data());
      const Strided4d<const A> pixels{from.data(), 0, 1, columns.size * L, L};
      const Strided4d<A> results{to.data(), 0, 1, W * L, L};
      for (const Axis& axis_h : hs) {
        const Axis h = rows.of(axis_h, i, std::min(block_rows, axis_h.outputs - i));
        for (const Axis& axis_w : ws) {
          const Axis w = columns.of(axis_w, 0, axis_w.outputs);
          gather_weights(weight, C, first, planes.count, h, w, L, factors.data());
          const PixelSource<A> inside{pixels, nullptr, h, w, table};
          sum_pixel_rows(inside, 0, 0, h.outputs, L, factors.data(), L, offsets.data(), results);
        }
      }
      const PlaneVectors<T> targets(target, N, C, first, 0, W);
      targets.store_rows(i * place_step, std::min(H, (i + block_rows) * place_step), to.data());
    }
  });
}

// grad_weight for a vector of planes and a block of rows at a time, whose sums are then added in order.
template <class T>
void multiply_plane_vectors(const Conv2dShape& shape, const Strided4d<const T>& grad, const Strided4d<const T>& input,
                            const Strided4d<T>& grad_weight) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  const std::vector<Axis> hs = forward_axes_h(shape), ws = forward_axes_w(shape);
  const int64_t N = shape.N, C = shape.C, taps = shape.R * shape.S;
  const int64_t row_bytes = (shape.stride_h * shape.W + shape.Q) * L * sizeof(A);
  const int64_t block_rows = rows_of_block(shape.P, row_bytes), blocks = ceil_div(shape.P, block_rows);
  const int64_t vectors = ceil_div(N * C, L);
  const Window columns(ws, 0, shape.Q);
  const int64_t size = Window(hs, 0, block_rows).size * columns.size * L;
  Scratch<A> partial(vectors * blocks * taps * L);  // [vector][block][tap][lane]
  parallel_for(vectors * blocks, grain_of(block_rows * shape.Q * taps * L), [&](int64_t begin, int64_t end) {
    Scratch<A> from(size), factors(block_rows * shape.Q * L);
    std::fill_n(from.data(), size, A(0));
    std::vector<const A*> table;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / blocks * L, i = task % blocks * block_rows, I = std::min(block_rows, shape.P - i);
      const Window rows(hs, i, I);
      load_window(PlaneVectors<const T>(input, N, C, first, columns.begin, columns.end), rows, columns, from.data());
      PlaneVectors<const T>(grad, N, C, first, 0, shape.Q).load_rows(i, i + I, shape.Q, factors.data());
      const Axis h = rows.of(hs[0], i, I), w = columns.of(ws[0], 0, shape.Q);
      const Strided4d<const A> pixels{from.data(), 0, 1, columns.size * L, L};
      const Strided4d<const A> grads{factors.data(), 0, 1, shape.Q * L, L};
      const PixelSource<A> inside{pixels, nullptr, h, w, table};
      A* sums = partial.data() + task * taps * L;
      std::fill_n(sums, taps * L, A(0));
      add_row_products(inside, grads, 0, 0, I, L, sums, L);
    }
  });
  parallel_for(C, grain_of(taps * N * blocks), [&](int64_t begin, int64_t end) {
    Scratch<A> sums(taps);
    for (int64_t c = begin; c < end; ++c) {
      std::fill_n(sums.data(), taps, A(0));
      for (int64_t n = 0; n < N; ++n) {
        const int64_t plane = n * C + c;
        const A* of_plane = partial.data() + plane / L * blocks * taps * L + plane % L;
        for (int64_t block = 0; block < blocks; ++block) {
          for (int64_t t = 0; t < taps; ++t, of_plane += L) sums.data()[t] += *of_plane;
        }
      }
      store_weights(sums.data(), shape, c, grad_weight);
    }
  });
}

// Whether planes are summed row by row: rows that fill vectors, without gaps between the columns of a tap. Transposing
// the planes costs less than splitting and interleaving columns, or than vectors half empty.
template <class T>
bool by_rows(const Axis& h, const Axis& w) {
  return h.step == 1 && w.step == 1 && h.place_step == 1 && w.place_step == 1 && w.outputs >= kLanes<Accumulate<T>>;
}

// Channels lie side by side. (Where both hold, H = W = 1 or C = 1: either is right.)
template <class T>
bool is_channels_last(const Strided4d<T>& images) {
  return images.stride_c == 1;
}

}  // namespace

// ---- entry points --------------------------------------------------------------------------------

template <class T>
void Depthwise::forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight, const T* bias,
                        int64_t bias_stride, Strided4d<T> output) {
  if (shape.N * shape.C == 0) return;
  const std::vector<Axis> hs = forward_axes_h(shape), ws = forward_axes_w(shape);
  const bool channels_last = is_channels_last(output);
  const Unstrided<T> images(input, shape.N, shape.C, shape.H, shape.W, channels_last);
  if (channels_last) return sum_images(shape.N, shape.C, hs, ws, images.view(), weight, bias, bias_stride, output);
  if (by_rows<T>(hs[0], ws[0])) {
    return sum_planes(shape.N, shape.C, hs[0], ws[0], images.view(), weight, bias, bias_stride, output);
  }
  sum_plane_vectors(shape.N, shape.C, hs, ws, images.view(), weight, bias, bias_stride, shape.P, shape.Q, output);
}

template <class T>
void Depthwise::grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                           int64_t bias_stride, Strided4d<T> grad_input) {
  if (shape.N * shape.C == 0) return;
  const std::vector<Axis> hs = gradient_axes_h(shape), ws = gradient_axes_w(shape);
  const bool channels_last = is_channels_last(grad_input);
  const Unstrided<T> images(grad, shape.N, shape.C, shape.P, shape.Q, channels_last);
  if (channels_last) return sum_images(shape.N, shape.C, hs, ws, images.view(), weight, bias, bias_stride, grad_input);
  if (by_rows<T>(hs[0], ws[0])) {
    return sum_planes(shape.N, shape.C, hs[0], ws[0], images.view(), weight, bias, bias_stride, grad_input);
  }
  sum_plane_vectors(shape.N, shape.C, hs, ws, images.view(), weight, bias, bias_stride, shape.H, shape.W, grad_input);
}

template <class T>
void Depthwise::grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                            Strided4d<T> grad_weight) {
  if (shape.C == 0) return;
  const bool channels_last = is_channels_last(input);
  const Unstrided<T> images(input, shape.N, shape.C, shape.H, shape.W, channels_last);
  const Unstrided<T> grads(grad, shape.N, shape.C, shape.P, shape.Q, channels_last);
  if (channels_last) return multiply_images(shape, grads.view(), images.view(), grad_weight);
  if (by_rows<T>(forward_axes_h(shape)[0], forward_axes_w(shape)[0])) {
    return multiply_planes(shape, grads.view(), images.view(), grad_weight);
  }
  multiply_plane_vectors(shape, grads.view(), images.view(), grad_weight);
}

template void Depthwise::forward(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                 int64_t, Strided4d<float>);
template void Depthwise::grad_input(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                    int64_t, Strided4d<float>);
template void Depthwise::grad_weight(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>,
                                     Strided4d<float>);

}  // namespace dlkernels
