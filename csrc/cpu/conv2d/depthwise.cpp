// conv2d of one input channel for each output channel (G = C = K), bound by the reading and writing of images.
//
//   output     [n, c, p, q] = bias[c] + sum over r, s of weight[c, r, s] * input[n, c, p*stride_h - ..., q*stride_w -
//   ...] grad_input [n, c, h, w] = the same over grad, for each phase of h and w by the stride (stencil.h)
//   grad_weight[c, r, s]    = sum over n, p, q of grad[n, c, p, q] * input[n, c, p*stride_h - ..., q*stride_w - ...]
//
// Who owns what: NCHW: a task owns a block of rows of one plane, packs the source rows it needs into a padded slab in
// L1, and sums vectors along the columns. channels_last: a task owns some rows of pixels of all channels; vectors run
// along the channels, and source pixels are read where they lie; those outside the source are a pixel of zeros. Either
// way a tile of outputs shares the vectors it reads. Passes over memory: each image is read and written once, as long
// as R rows stay in L2. grad_weight: the sums of fixed chunks of rows, added in order, whatever the thread count.
#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "../simd.h"
#include "stencil.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kTaskProducts = 1 << 15;  // multiply-adds (some 2 us) below which a second thread does not pay
constexpr int64_t kSlabBytes = 20 << 10;    // of padded rows: leaves room in a 32 KiB L1 for what is written
constexpr int kTileRows = 4;                // NCHW: output rows that share source vectors, ...
constexpr int kPixelRows = 2,
              kPixelColumns = 4;      // ... channels_last: output pixels that do; 9 weights stay beside them
constexpr int64_t kEnoughTasks = 16;  // of grad_weight, for a handful of threads to share the work evenly

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

// Calls run(Taps) with the taps of these axes: 3x3 with stride 1 and 2, and what a phase of the latter's gradient has.
template <class Run>
void with_taps(const Axis& h, const Axis& w, const Run& run) {
  if (Taps<3, 3, 1, 1>::fit(h, w)) return run(Taps<3, 3, 1, 1>{});
  if (Taps<3, 3, 2, 2>::fit(h, w)) return run(Taps<3, 3, 2, 2>{});
  if (Taps<2, 2, 1, 1>::fit(h, w)) return run(Taps<2, 2, 1, 1>{});
  if (Taps<2, 1, 1, 1>::fit(h, w)) return run(Taps<2, 1, 1, 1>{});
  if (Taps<1, 2, 1, 1>::fit(h, w)) return run(Taps<1, 2, 1, 1>{});
  if (Taps<1, 1, 1, 1>::fit(h, w)) return run(Taps<1, 1, 1, 1>{});
  run(AnyTaps{});
}

// ---- kernels: NCHW -------------------------------------------------------------------------------

// A block of padded rows, as output (0, 0) of a block and its tap (0, 0) see it.
template <class A>
struct BlockOfRows {
  const A* rows;
  int64_t pitch;
  const int64_t* columns;  // (taps of w): where output column 0 finds each tap
};

// to[i][j] = bias + sum over r, s of weight[r*S + s] * rows[i*step + r*spacing][columns[s] + j]
// for ROWS rows from i on and `count` columns, at most a vector of them, from j on
template <class TAPS, int ROWS, class A, class To>
inline void sum_rows(const BlockOfRows<A>& block, const Axis& h, const Axis& w, const A* weight, A bias, int64_t i,
                     int64_t j, int64_t count, To* to, int64_t to_pitch) {
  Vector<A> sums[ROWS];
  for (auto& sum : sums) sum = Vector<A>{} + bias;
  const A* rows = block.rows + i * h.step * block.pitch + j;
  if constexpr (TAPS::kKnown) {
#pragma GCC unroll 16
    for (int y = 0; y < (ROWS - 1) * TAPS::STEP_H + TAPS::R; ++y) {
#pragma GCC unroll 4
      for (int s = 0; s < TAPS::S; ++s) {
        const Vector<A> x = load_vector(rows + y * block.pitch + block.columns[s]);
#pragma GCC unroll 4
        for (int o = 0; o < ROWS; ++o) {
          const int r = y - o * TAPS::STEP_H;
          if (r >= 0 && r < TAPS::R) sums[o] += weight[r * TAPS::S + s] * x;
        }
      }
    }
  } else {
    for (int64_t r = 0; r < h.taps; ++r) {
      for (int64_t s = 0; s < w.taps; ++s, ++weight) {
#pragma GCC unroll 4
        for (int o = 0; o < ROWS; ++o) {
          sums[o] += *weight * load_vector(rows + (o * h.step + r * h.spacing) * block.pitch + block.columns[s]);
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
        sum_rows<TAPS, 1>(block, h, w, weight, bias, i, j, count, to, to_pitch);
      } else {
        sum_rows<TAPS, kTileRows>(block, h, w, weight, bias, std::min(i, I - kTileRows), j, count, to, to_pitch);
      }
    }
  }
}

// to[j*2 + phase] = phases[phase][j], `count` elements in all
template <class T, int... LANE>
void interleave(const Accumulate<T>* even, const Accumulate<T>* odd, int64_t count, T* to,
                std::integer_sequence<int, LANE...>) {
  using A = Accumulate<T>;
  constexpr int64_t L = kLanes<A>;
  for (int64_t w = 0; w < count; w += 2 * L, even += L, odd += L) {
    const Vector<A> a = load_vector(even), b = load_vector(odd);
    const Vector<A> low = __builtin_shufflevector(a, b, (LANE / 2 + LANE % 2 * int(L))...);
    const Vector<A> high = __builtin_shufflevector(a, b, ((LANE + int(L)) / 2 + LANE % 2 * int(L))...);
    store_as<A>(to + w, std::min(L, count - w), low);
    if (count - w > L) store_as<A>(to + w + L, std::min(L, count - w - L), high);
  }
}

// A row (W) whose columns phase, phase + phases, ... lie side by side in staged[phase]
template <class T>
void write_row(const Accumulate<T>* staged, int64_t phase_pitch, int64_t phases, int64_t W, T* to) {
  if (phases == 2) {
    return interleave<T>(staged, staged + phase_pitch, W, to, std::make_integer_sequence<int, kLanes<Accumulate<T>>>{});
  }
  for (int64_t w = 0; w < W; ++w) to[w] = store<T>(staged[w % phases * phase_pitch + w / phases]);
}

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

// How the planes of one call are cut into blocks of rows, each with its slab.
template <class A>
struct Blocks {
  Span span_h, span_w;
  Slab slab;
  int64_t I, rows, count;  // output rows of a plane, of a block; blocks of a plane

  Blocks(const std::vector<Axis>& hs, const std::vector<Axis>& ws)
      : span_h(hs),
        span_w(ws),
        slab(Slab::of<A>(span_w.low, (ws[0].outputs - 1) * ws[0].step + span_w.high - span_w.low + 1, ws[0].step)),
        I(hs[0].outputs) {
    const int64_t wanted = kSlabBytes / (slab.pitch() * int64_t(sizeof(A)) * hs[0].step);
    count = ceil_div(I, std::max<int64_t>(wanted, kTileRows));
    rows = ceil_div(I, count);
    step = hs[0].step;
  }
  int64_t slab_rows(int64_t outputs) const { return (outputs - 1) * step + span_h.high - span_h.low + 1; }
  int64_t slab_size() const { return slab_rows(rows) * slab.pitch(); }
  int64_t first(int64_t block) const { return block * rows; }
  int64_t outputs(int64_t block) const { return std::min(rows, I - block * rows); }

  template <class T>
  void pack(const T* plane, int64_t stride_h, int64_t H, int64_t W, int64_t block, A* to) const {
    pack_rows(slab, plane, stride_h, H, W, first(block) * step + span_h.low, slab_rows(outputs(block)), to);
  }
  // The rows that outputs of this axis read, among the packed ones of a block.
  BlockOfRows<A> of(const A* packed, const Axis& h, const std::vector<int64_t>& columns) const {
    return {packed + (h.taps > 0 ? h.first - span_h.low : 0) * slab.pitch(), slab.pitch(), columns.data()};
  }

 private:
  int64_t step;
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

// target (N, C, any, W) = bias + sums over the source, for all phases hs x ws, plane by plane
template <class T>
void sum_planes(int64_t N, int64_t C, const std::vector<Axis>& hs, const std::vector<Axis>& ws,
                const Strided4d<const T>& source, const Strided4d<const T>& weight, const T* bias, int64_t bias_stride,
                int64_t W, const Strided4d<T>& target) {
  using A = Accumulate<T>;
  const Blocks<A> blocks(hs, ws);
  const int64_t J = ws[0].outputs, phases = int64_t(ws.size()), taps = taps_of(hs) * taps_of(ws);
  const int64_t phase_pitch = J + kLanes<A>;
  std::vector<std::vector<int64_t>> columns;
  for (const Axis& w : ws) columns.push_back(blocks.slab.offsets(w));
  parallel_for(N * C * blocks.count, grain_of(blocks.rows * J * taps), [&](int64_t begin, int64_t end) {
    Scratch<A> packed(blocks.slab_size()), factors(taps);
    Scratch<A> staged(phases > 1 ? blocks.rows * phases * phase_pitch : 0);
    std::fill_n(packed.data(), blocks.slab_size(), A(0));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks.count, plane = task / blocks.count, c = plane % C, n = plane / C;
      blocks.pack(source.at(n, c), source.stride_h, hs[0].source, ws[0].source, block, packed.data());
      const A offset = bias == nullptr ? A(0) : load(bias[c * bias_stride]);
      for (const Axis& h : hs) {
        const int64_t i_first = blocks.first(block), I = std::min(blocks.outputs(block), h.outputs - i_first);
        T* to = target.at(n, c) + h.place(i_first) * target.stride_h;
        const int64_t to_pitch = h.place_step * target.stride_h;
        for (int64_t phase = 0; phase < phases; ++phase) {
          const Axis& w = ws[phase];
          gather_weight(weight, c, h, w, factors.data());
          const BlockOfRows<A> rows = blocks.of(packed.data(), h, columns[phase]);
          with_taps(h, w, [&]<class TAPS>(TAPS) {
            if (phases == 1) return sum_block<TAPS>(rows, h, w, factors.data(), offset, I, to, to_pitch);
            A* of_phase = staged.data() + phase * phase_pitch;
            sum_block<TAPS>(rows, h, w, factors.data(), offset, I, of_phase, phases * phase_pitch);
          });
        }
        for (int64_t i = 0; i < I && phases > 1; ++i) {
          write_row(staged.data() + i * phases * phase_pitch, phase_pitch, phases, W, to + i * to_pitch);
        }
      }
    }
  });
}

// sums[r*S + s] += sum over i < ROWS of grad[i][j] * rows[i*STEP_H + r][columns[s] + j], lanes j < count
template <class TAPS, int ROWS, class T, class A>
inline void add_products(const BlockOfRows<A>& block, const T* grad, int64_t grad_pitch, int64_t i, int64_t j,
                         int64_t count, Vector<A>* sums) {
  Vector<A> factors[ROWS];
  for (int o = 0; o < ROWS; ++o) factors[o] = load_as<A>(grad + (i + o) * grad_pitch + j, count);
  const A* rows = block.rows + i * TAPS::STEP_H * block.pitch + j;
#pragma GCC unroll 16
  for (int y = 0; y < (ROWS - 1) * TAPS::STEP_H + TAPS::R; ++y) {
#pragma GCC unroll 4
    for (int s = 0; s < TAPS::S; ++s) {
      // what lies behind the last column may be infinite, and its product with a grad of zero no number
      const Vector<A> x = load_as<A>(rows + y * block.pitch + block.columns[s], count);
#pragma GCC unroll 4
      for (int o = 0; o < ROWS; ++o) {
        const int r = y - o * TAPS::STEP_H;
        if (r >= 0 && r < TAPS::R) sums[r * TAPS::S + s] += factors[o] * x;
      }
    }
  }
}

// sums[r*S + s] (a vector's lanes each) += the same for all of I x J
template <class TAPS, class T, class A>
void add_block_products(const BlockOfRows<A>& block, const T* grad, int64_t grad_pitch, int64_t I, int64_t J, A* sums) {
  constexpr int kTaps = TAPS::R * TAPS::S;
  constexpr int64_t L = kLanes<A>;
  Vector<A> block_sums[kTaps] = {};
  for (int64_t j = 0; j < J; j += L) {
    const int64_t count = std::min(L, J - j);
    int64_t i = 0;
    for (; i + kTileRows <= I; i += kTileRows) {
      add_products<TAPS, kTileRows>(block, grad, grad_pitch, i, j, count, block_sums);
    }
    for (; i < I; ++i) add_products<TAPS, 1>(block, grad, grad_pitch, i, j, count, block_sums);
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
      const BlockOfRows<A> part{block.rows + r * h.spacing * block.pitch, h.step * block.pitch, block.columns + s};
      A* part_sums = sums + (r * w.taps + s) * L;
      const bool four = s + 4 <= w.taps;
      if (four) add_block_products<Taps<1, 4, 1, 1>>(part, grad, grad_pitch, I, w.outputs, part_sums);
      if (!four) add_block_products<Taps<1, 1, 1, 1>>(part, grad, grad_pitch, I, w.outputs, part_sums);
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
  const std::vector<Axis> hs = forward_axes_h(shape), ws = forward_axes_w(shape);
  const Axis &h = hs[0], &w = ws[0];
  const Blocks<A> blocks(hs, ws);
  const std::vector<int64_t> columns = blocks.slab.offsets(w);
  const int64_t C = shape.C, taps = shape.R * shape.S, all = shape.N * blocks.count;
  const int64_t chunks = std::max<int64_t>(1, std::min(all, ceil_div(kEnoughTasks, C)));
  Scratch<A> partial(C * chunks * taps);
  const int64_t products = ceil_div(all, chunks) * blocks.rows * w.outputs * taps;
  parallel_for(C * chunks, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<A> packed(blocks.slab_size()), sums(taps * L);
    std::fill_n(packed.data(), blocks.slab_size(), A(0));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c = task / chunks, chunk = task % chunks;
      std::fill_n(sums.data(), taps * L, A(0));
      for (int64_t item = all * chunk / chunks; item < all * (chunk + 1) / chunks; ++item) {
        const int64_t n = item / blocks.count, block = item % blocks.count, I = blocks.outputs(block);
        blocks.pack(input.at(n, c), input.stride_h, shape.H, shape.W, block, packed.data());
        const BlockOfRows<A> rows = blocks.of(packed.data(), h, columns);
        const T* factors = grad.at(n, c) + blocks.first(block) * grad.stride_h;
        with_taps(h, w, [&]<class TAPS>(TAPS) {
          if constexpr (TAPS::kKnown) {
            add_block_products<TAPS>(rows, factors, grad.stride_h, I, w.outputs, sums.data());
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
    for (int64_t t = 0; t < taps; ++t) {
      A sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial.data()[(c * chunks + chunk) * taps + t];
      grad_weight.at(c, 0, t / shape.S, t % shape.S) = store<T>(sum);
    }
  }
}

// ---- kernels: channels_last ----------------------------------------------------------------------

// Output pixels (i, j) to (i + ROWS - 1, j + COLUMNS - 1).
template <int ROWS, int COLUMNS>
struct Tile {
  int64_t i, j;
};

template <int ROWS, class Run>
void for_tiles_of(int64_t i, int64_t J, bool again, const Run& run) {
  int64_t j = 0;
  for (; j + kPixelColumns <= J; j += kPixelColumns) run(Tile<ROWS, kPixelColumns>{i, j});
  if (j == J) return;
  if (again && J > kPixelColumns) return run(Tile<ROWS, kPixelColumns>{i, J - kPixelColumns});
  for (; j < J; ++j) run(Tile<ROWS, 1>{i, j});
}

// Calls run(tile) for tiles that cover `rows` rows, at most kPixelRows, of J pixels from row i on. With `again` the
// last tile may cover some pixels once more, so that it has full width.
template <class Run>
void for_tiles(int64_t i, int64_t rows, int64_t J, bool again, const Run& run) {
  if (rows == kPixelRows) return for_tiles_of<kPixelRows>(i, J, again, run);
  for (int64_t end = i + rows; i < end; ++i) for_tiles_of<1>(i, J, again, run);
}

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

  // Calls run(pixels) for what a tile of outputs reads.
  template <int ROWS, int COLUMNS, class Run>
  void with_pixels(int64_t n, Tile<ROWS, COLUMNS> tile, const Run& run) const {
    const int64_t y = tile.i * h.step + h.first, x = tile.j * w.step + w.first;
    const int64_t reach_h = h.reach(ROWS), reach_w = w.reach(COLUMNS);
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

// Calls run(c, count) for all channels, a vector at a time; count is known when compiling but for the last ones.
template <class A, class Run>
inline void for_channels(int64_t C, const Run& run) {
  int64_t c = 0;
  for (; c + kLanes<A> <= C; c += kLanes<A>) run(c, std::integral_constant<int64_t, kLanes<A>>{});
  if (c < C) run(c, C - c);
}

// to[o, u][c] = bias[c] + sum over r, s of weight[r*S + s][c] * pixels(o*step + r*spacing, u*step + s*spacing)[c]
// for a tile of ROWS x COLUMNS outputs; weight (taps, pitch)
template <class TAPS, int ROWS, int COLUMNS, class T, class Pixels>
void sum_pixels(const Pixels& pixels, const Axis& h, const Axis& w, const Accumulate<T>* weight, int64_t pitch,
                const Accumulate<T>* bias, int64_t C, T* to, int64_t to_h, int64_t to_w) {
  using A = Accumulate<T>;
  for_channels<A>(C, [&](int64_t c, auto count) {
    Vector<A> sums[ROWS][COLUMNS];
    for (auto& row : sums) {
      for (auto& sum : row) sum = load_vector(bias + c);
    }
    if constexpr (TAPS::kKnown) {
#pragma GCC unroll 8
      for (int y = 0; y < (ROWS - 1) * TAPS::STEP_H + TAPS::R; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < (COLUMNS - 1) * TAPS::STEP_W + TAPS::S; ++x) {
          const Vector<A> pixel = load_as<A>(pixels(y, x) + c, count);
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
    } else {
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
    }
    for (int o = 0; o < ROWS; ++o) {
      for (int u = 0; u < COLUMNS; ++u) store_as<A>(to + o * to_h + u * to_w + c, count, sums[o][u]);
    }
  });
}

// The weights of the taps of these axes as vectors along the channels: to[t][c], zero from C to pitch
template <class T>
void gather_weights(const Strided4d<const T>& weight, int64_t C, const Axis& h, const Axis& w, int64_t pitch,
                    Accumulate<T>* to) {
  std::fill_n(to, h.taps * w.taps * pitch, Accumulate<T>(0));
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t r = 0; r < h.taps; ++r) {
      for (int64_t s = 0; s < w.taps; ++s) {
        to[(r * w.taps + s) * pitch + c] = load(weight.at(c, 0, h.weight(r), w.weight(s)));
      }
    }
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
  std::fill_n(offsets.data(), pitch, A(0));
  for (int64_t c = 0; c < C && bias != nullptr; ++c) offsets.data()[c] = load(bias[c * bias_stride]);
  Scratch<T> zeros(C);
  std::fill_n(zeros.data(), C, T{});
  std::vector<PhaseWeights<A>> phases;
  A* to = weights.data();
  for (const Axis& h : hs) {
    for (const Axis& w : ws) {
      gather_weights(weight, C, h, w, pitch, to);
      phases.push_back({h, w, to});
      to += h.taps * w.taps * pitch;
    }
  }

  const int64_t pairs = ceil_div(hs[0].outputs, int64_t(kPixelRows)), J = ws[0].outputs;
  parallel_for(N * pairs, grain_of(kPixelRows * J * taps * C), [&](int64_t begin, int64_t end) {
    std::vector<const T*> table;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / pairs, i = task % pairs * kPixelRows;
      for (const PhaseWeights<A>& phase : phases) {
        const Axis &h = phase.h, &w = phase.w;
        const PixelSource<T> source_pixels{source, zeros.data(), h, w, table};
        with_taps(h, w, [&]<class TAPS>(TAPS) {
          for_tiles(i, std::min<int64_t>(kPixelRows, h.outputs - i), w.outputs, true,
                    [&]<int ROWS, int COLUMNS>(Tile<ROWS, COLUMNS> tile) {
                      T* to = &target.at(n, 0, h.place(tile.i), w.place(tile.j));
                      source_pixels.with_pixels(n, tile, [&](const auto& pixels) {
                        sum_pixels<TAPS, ROWS, COLUMNS>(pixels, h, w, phase.weight, pitch, offsets.data(), C, to,
                                                        h.place_step * target.stride_h, w.place_step * target.stride_w);
                      });
                    });
        });
      }
    }
  });
}

// sums[r*S + s][c] += sum over o, u of grad[o, u][c] * pixels(o*step + r*spacing, u*step + s*spacing)[c]
// for a tile of ROWS x COLUMNS pixels of grad; sums (taps, pitch)
template <class TAPS, int ROWS, int COLUMNS, class T, class Pixels>
void add_pixel_products(const Pixels& pixels, const Axis& h, const Axis& w, const T* grad, int64_t grad_h,
                        int64_t grad_w, int64_t C, Accumulate<T>* sums, int64_t pitch) {
  using A = Accumulate<T>;
  for_channels<A>(C, [&](int64_t c, auto count) {
    Vector<A> factors[ROWS][COLUMNS];
    for (int o = 0; o < ROWS; ++o) {
      for (int u = 0; u < COLUMNS; ++u) factors[o][u] = load_as<A>(grad + o * grad_h + u * grad_w + c, count);
    }
    if constexpr (TAPS::kKnown) {
      Vector<A> products[TAPS::R * TAPS::S];
      for (int t = 0; t < TAPS::R * TAPS::S; ++t) products[t] = load_vector(sums + t * pitch + c);
#pragma GCC unroll 8
      for (int y = 0; y < (ROWS - 1) * TAPS::STEP_H + TAPS::R; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < (COLUMNS - 1) * TAPS::STEP_W + TAPS::S; ++x) {
          const Vector<A> pixel = load_as<A>(pixels(y, x) + c, count);
#pragma GCC unroll 4
          for (int o = 0; o < ROWS; ++o) {
#pragma GCC unroll 4
            for (int u = 0; u < COLUMNS; ++u) {
              const int r = y - o * TAPS::STEP_H, s = x - u * TAPS::STEP_W;
              if (r >= 0 && r < TAPS::R && s >= 0 && s < TAPS::S) products[r * TAPS::S + s] += factors[o][u] * pixel;
            }
          }
        }
      }
      for (int t = 0; t < TAPS::R * TAPS::S; ++t) store_vector(sums + t * pitch + c, products[t]);
    } else {
      A* to = sums + c;
      for (int64_t r = 0; r < h.taps; ++r) {
        for (int64_t s = 0; s < w.taps; ++s, to += pitch) {
          Vector<A> sum = load_vector(to);
#pragma GCC unroll 2
          for (int o = 0; o < ROWS; ++o) {
#pragma GCC unroll 4
            for (int u = 0; u < COLUMNS; ++u) {
              const T* pixel = pixels(o * h.step + r * h.spacing, u * w.step + s * w.spacing);
              sum += factors[o][u] * load_as<A>(pixel + c, count);
            }
          }
          store_vector(to, sum);
        }
      }
    }
  });
}

// grad_weight, all channels at a time: a task sums over one of `chunks` stretches of the rows of all images.
template <class T>
void multiply_images(const Conv2dShape& shape, const Strided4d<const T>& grad, const Strided4d<const T>& input,
                     const Strided4d<T>& grad_weight) {
  using A = Accumulate<T>;
  const Axis h = forward_axes_h(shape)[0], w = forward_axes_w(shape)[0];
  const int64_t C = shape.C, taps = shape.R * shape.S, pitch = ceil_div(C, int64_t(kLanes<A>)) * kLanes<A>;
  const int64_t pairs = ceil_div(shape.P, int64_t(kPixelRows)), all = shape.N * pairs;
  const int64_t chunks = std::max<int64_t>(1, std::min(all, kEnoughTasks)), size = taps * pitch;
  Scratch<A> partial(chunks * size);
  Scratch<T> zeros(C);
  std::fill_n(zeros.data(), C, T{});
  const int64_t products = ceil_div(all, chunks) * kPixelRows * shape.Q * taps * C;
  parallel_for(chunks, grain_of(products), [&](int64_t begin, int64_t end) {
    std::vector<const T*> table;
    const PixelSource<T> source_pixels{input, zeros.data(), h, w, table};
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      A* sums = partial.data() + chunk * size;
      std::fill_n(sums, size, A(0));
      for (int64_t item = all * chunk / chunks; item < all * (chunk + 1) / chunks; ++item) {
        const int64_t n = item / pairs, i = item % pairs * kPixelRows;
        with_taps(h, w, [&]<class TAPS>(TAPS) {
          const int64_t rows = std::min<int64_t>(kPixelRows, shape.P - i);
          for_tiles(i, rows, shape.Q, false, [&]<int ROWS, int COLUMNS>(Tile<ROWS, COLUMNS> tile) {
            source_pixels.with_pixels(n, tile, [&](const auto& pixels) {
              add_pixel_products<TAPS, ROWS, COLUMNS>(pixels, h, w, &grad.at(n, 0, tile.i, tile.j), grad.stride_h,
                                                      grad.stride_w, C, sums, pitch);
            });
          });
        });
      }
    }
  });
  parallel_for(C, grain_of(taps * chunks), [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = begin; c < end; ++c) {
        A sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial.data()[chunk * size + t * pitch + c];
        grad_weight.at(c, 0, t / shape.S, t % shape.S) = store<T>(sum);
      }
    }
  });
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
  sum_planes(shape.N, shape.C, hs, ws, images.view(), weight, bias, bias_stride, shape.Q, output);
}

template <class T>
void Depthwise::grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight, const T* bias,
                           int64_t bias_stride, Strided4d<T> grad_input) {
  if (shape.N * shape.C == 0) return;
  const std::vector<Axis> hs = gradient_axes_h(shape), ws = gradient_axes_w(shape);
  const bool channels_last = is_channels_last(grad_input);
  const Unstrided<T> images(grad, shape.N, shape.C, shape.P, shape.Q, channels_last);
  if (channels_last) return sum_images(shape.N, shape.C, hs, ws, images.view(), weight, bias, bias_stride, grad_input);
  sum_planes(shape.N, shape.C, hs, ws, images.view(), weight, bias, bias_stride, shape.W, grad_input);
}

template <class T>
void Depthwise::grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                            Strided4d<T> grad_weight) {
  if (shape.C == 0) return;
  const bool channels_last = is_channels_last(input);
  const Unstrided<T> images(input, shape.N, shape.C, shape.H, shape.W, channels_last);
  const Unstrided<T> grads(grad, shape.N, shape.C, shape.P, shape.Q, channels_last);
  if (channels_last) return multiply_images(shape, grads.view(), images.view(), grad_weight);
  multiply_planes(shape, grads.view(), images.view(), grad_weight);
}

#define DLKERNELS_INSTANTIATE(T)                                                                                     \
  template void Depthwise::forward(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, const T*, int64_t,    \
                                   Strided4d<T>);                                                                    \
  template void Depthwise::grad_input(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, const T*, int64_t, \
                                      Strided4d<T>);                                                                 \
  template void Depthwise::grad_weight(const Conv2dShape&, Strided4d<const T>, Strided4d<const T>, Strided4d<T>);
DLKERNELS_INSTANTIATE(double)
DLKERNELS_INSTANTIATE(float)
DLKERNELS_INSTANTIATE(BFloat16)
DLKERNELS_INSTANTIATE(Half)
#undef DLKERNELS_INSTANTIATE

}  // namespace dlkernels
