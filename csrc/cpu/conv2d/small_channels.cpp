// conv2d of few channels in a group: the pixels of a row fill the vectors, not the channels.
//
//   output    [n, k, p, q] = bias[k] + sum over c, r, s of weight[k, c, r, s] * input[n, c, h, w]
//   grad_input[n, c, h, w] = bias[c] + the same over grad and k, for each phase of h and w by the stride (stencil.h)
//   grad_weight[k, c, r, s] =          sum over n, p, q of grad[n, k, p, q] * input[n, c, h, w]
// with h = p*stride_h - pad_top + r*dilation_h and w alike. The first two are one sum: M target channels, D source
// channels, of each group. In the third each lane sums over its own pixels, and the lanes are added at the end.
//
// Who owns what: a task owns a block of rows of one image, for all M of one group or some. It packs the rows that it
// reads of all D channels into padded planes that stay in the second cache, and sums tiles of rows and target channels
// along the columns: a source vector serves up to R rows of up to kTileChannels channels each. Passes over memory: each
// image is read and written once for each phase. Sums run in blocks of at most kBlockTerms, which are added in order.
#include "small_channels.h"

#include <algorithm>
#include <array>
#include <vector>

#include "../parallel.h"
#include "direct.h"
#include "panels.h"
#include "slab.h"
#include "stencil.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int kTileChannels = kVectorRegisters == 32 ? 4 : 2;  // target channels that share source vectors
constexpr int64_t kTileRows = 4;                               // rows that do
constexpr int64_t kOneChannelRows = 8;     // rows of a tile of one channel, else too few sums run side by side
constexpr int64_t kPackProducts = 32;      // multiply-adds in the time in which a weight is packed
constexpr int64_t kBlockBytes = 96 << 10;  // of a task's planes and results, in the second cache
constexpr int64_t kSumBytes = 256 << 10;   // of grad_weight's sums, in the second cache
constexpr int64_t kTaskChannels = 8;       // of grad, at least, for which a thread packs the source
constexpr int64_t kWindowVectors = 64;     // of grad's rows in the first cache, summed before a sum goes to memory

// ---- kernels -------------------------------------------------------------------------------------

// Where a block lies: plane d, row y, column x of output (0, 0) and tap (0, 0) at data[d*plane + y*pitch + x]; tap s is
// column[s] further on. Rows outside [first, last) are padding.
template <class T>
struct Planes {
  const T* data;
  int64_t plane, pitch, D;
  const int64_t* column;
  int64_t first, last;
};

// Where results go: channel m, row i at data[m*plane + i*pitch].
template <class T>
struct Results {
  T* data;
  int64_t plane, pitch;
};

// What a vector holds: pixels of a row or, of images half as wide, of two neighbouring rows.
struct OneRow {
  static constexpr int kRows = 1;
  template <class T>
  static Vector<T> load(const T* row, int64_t) {
    return load_vector(row);
  }
  template <class T>
  static void store(T* row, int64_t, int64_t count, Vector<T> x) {
    store_as<T>(row, count, x);
  }
};
struct TwoRows {
  static constexpr int kRows = 2;
  template <class T>
  static Vector<T> load(const T* row, int64_t pitch) {
    return load_two_halves(row, row + pitch);
  }
  template <class T>
  static void store(T* row, int64_t pitch, int64_t count, Vector<T> x) {
    store_as<T>(row, count, x);
    store_as<T>(row + pitch, count, swap_halves<T>(x));
  }
};

// sums[m][o] += sum over r of weight[r*M + m] * rows[o*STEP + r], R neighbouring rows of the kernel known when
// compiling. BORDER: rows outside [first, last) are padding, and add nothing.
template <class Lanes, int R, int STEP, bool BORDER, int M, int ROWS, class T>
inline void add_known_rows(const T* rows, int64_t pitch, int first, int last, const T* weight,
                           Vector<T> (&sums)[M][ROWS]) {
#pragma GCC unroll 24
  for (int y = 0; y < (ROWS - 1) * STEP + R; ++y) {
    if (BORDER && (y + Lanes::kRows <= first || y >= last)) continue;
    const Vector<T> x = Lanes::load(rows + y * pitch, pitch);
#pragma GCC unroll 8
    for (int o = 0; o < ROWS; ++o) {
      const int r = y - o * STEP;
      if (r < 0 || r >= R) continue;
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m][o] += weight[r * M + m] * x;
    }
  }
}

// The same for any step and spacing of the rows.
template <int M, int ROWS, class T>
inline void add_any_rows(const T* rows, int64_t pitch, const Axis& h, const T* weight, Vector<T> (&sums)[M][ROWS]) {
  for (int64_t r = 0; r < h.taps; ++r, weight += M) {
#pragma GCC unroll 8
    for (int o = 0; o < ROWS; ++o) {
      const Vector<T> x = load_vector(rows + (o * h.step + r * h.spacing) * pitch);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m][o] += weight[m] * x;
    }
  }
}

// to[m][o][0 .. count) = bias[m] + sum over d, s, r of weight[d, s, r, m] * source[d][o*step + r*spacing][column[s]]
// for M channels and ROWS rows, or pairs of them; R = 0: any taps, else so many, spacing = 1 and STEP = rows from one
// sum to the next
template <class Lanes, int R, int STEP, int M, int ROWS, class T>
void sum_tile(const Planes<T>& source, const Axis& h, int64_t taps_w, const T* weight, const T* bias, int64_t count,
              const Results<T>& to) {
  Vector<T> sums[M][ROWS], done[M][ROWS] = {};  // of a block, and of the blocks before it
  const int64_t most = std::max<int64_t>(1, kBlockTerms / std::max<int64_t>(1, h.taps));  // pairs (d, s) of a block
  const int64_t pairs = source.D * taps_w;
  const int first = int(source.first), last = int(source.last);
  const bool border = first > 0 || last < (ROWS - 1) * STEP + R + Lanes::kRows - 1;
  bool is_first = true;
  const auto before = [&](int m, int o) { return is_first ? Vector<T>{} + bias[m] : done[m][o]; };
  for (int64_t pair = 0, d = 0, s = 0;; is_first = false) {
    clear_tile(sums);
    for (const int64_t end = std::min(pairs, pair + most); pair < end; ++pair, weight += h.taps * M) {
      const T* rows = source.data + d * source.plane + source.column[s];
      if constexpr (R > 0) {
        border ? add_known_rows<Lanes, R, STEP, true, M, ROWS>(rows, source.pitch, first, last, weight, sums)
               : add_known_rows<Lanes, R, STEP, false, M, ROWS>(rows, source.pitch, first, last, weight, sums);
      }
      if constexpr (R == 0) add_any_rows<M, ROWS>(rows, source.pitch, h, weight, sums);
      if (++s == taps_w) s = 0, ++d;
    }
    if (pair == pairs) break;  // the usual case: a single block, with all of its sums in registers
    for (int m = 0; m < M; ++m) {
      for (int o = 0; o < ROWS; ++o) done[m][o] = before(m, o) + sums[m][o];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int o = 0; o < ROWS; ++o) {
      T* row = to.data + m * to.plane + o * Lanes::kRows * to.pitch;
      Lanes::store(row, to.pitch, count, Vector<T>(before(m, o) + sums[m][o]));
    }
  }
}

// ---- kernels: the weight's gradient ------------------------------------------------------------------

// Rows of some channels of grad, and the source as neighbouring taps of a kernel's row read it with them: grad(k, i, j)
// lies at grad[k*plane + i*pitch + j], and source(s, i, j), what tap s reads for it, at source[i*source_pitch +
// column[s] + j].
template <class T>
struct GradWindow {
  int64_t rows, columns;
  const T* grad;
  int64_t plane, pitch;
  const T* source;
  int64_t source_pitch;
  const int64_t* column;
  int64_t ahead;  // how far behind a number of grad lies what is fetched meanwhile; 0: nothing is
};

// For a vector that several FMAs take: the compiler would let each of them load it anew, and there would be as many
// loads as FMAs.
template <class V>
inline void keep_in_register(V& vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#endif
}

// sums[k*stride + s] += sum over i, j of grad(k, i, j) * source(s, i, j), lane by lane, for K channels and S taps
template <int K, int S, class T>
void add_products(const GradWindow<T>& at, Vector<T>* sums, int64_t stride) {
  constexpr int64_t L = kLanes<T>;
  const int64_t whole = at.columns / L * L, left = at.columns - whole;
  Vector<T> tile[K][S];
  clear_tile(tile);
  const auto add = [&](const T* grad, const T* source, const auto& load) {
    Vector<T> x[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) x[s] = load(source + at.column[s]);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      Vector<T> dy = load(grad + k * at.plane);
      if (at.ahead != 0) __builtin_prefetch(grad + k * at.plane + at.ahead, 0, 2);
      keep_in_register(dy);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) tile[k][s] += dy * x[s];
    }
  };
  for (int64_t i = 0; i < at.rows; ++i) {
    const T *grad = at.grad + i * at.pitch, *source = at.source + i * at.source_pitch;
    for (int64_t j = 0; j < whole; j += L) add(grad + j, source + j, [](const T* from) { return load_vector(from); });
    if (left > 0) add(grad + whole, source + whole, [left](const T* from) { return load_first(from, left); });
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) sums[k * stride + s] += tile[k][s];
  }
}

template <class T>
using AddProducts = void (*)(const GradWindow<T>&, Vector<T>*, int64_t);

// Channels that share vectors of the source of so many taps: their sums fit the registers.
constexpr int kMostTaps = kVectorRegisters == 32 ? 5 : 3;
constexpr int channels_beside(int taps) {
  return kVectorRegisters == 32 ? std::min(8, 24 / taps) : std::min(4, 9 / taps);
}

template <int S, class T, int... K>
AddProducts<T> products_of(int64_t channels, std::integer_sequence<int, K...>) {
  static constexpr AddProducts<T> kTiles[] = {&add_products<K + 1, S, T>...};
  return kTiles[channels - 1];
}

// add_products for `channels` <= channels_beside(taps) and `taps` <= kMostTaps.
template <class T, int S = kMostTaps>
AddProducts<T> products_of(int64_t channels, int64_t taps) {
  if constexpr (S > 1) {
    if (taps < S) return products_of<T, S - 1>(channels, taps);
  }
  return products_of<S, T>(channels, std::make_integer_sequence<int, channels_beside(S)>{});
}

template <class T>
using SumTile = void (*)(const Planes<T>&, const Axis&, int64_t, const T*, const T*, int64_t, const Results<T>&);

// Whether there is a loop for just the kernel's rows.
bool rows_are_known(const Axis& h) {
  return (h.spacing == 1 || h.taps == 1) && (h.step == 1 ? h.taps <= 5 : h.step == 2 && h.taps == 3);
}

// The usual kernels; the others take any_taps.
template <int M, int ROWS, class T>
SumTile<T> tile_for(const Axis& h) {
  const SumTile<T> any_taps = &sum_tile<OneRow, 0, 1, M, ROWS, T>;
  if (!rows_are_known(h)) return any_taps;
  if (h.step == 2) return &sum_tile<OneRow, 3, 2, M, ROWS, T>;
  switch (h.taps) {
    case 1:
      return &sum_tile<OneRow, 1, 1, M, ROWS, T>;
    case 2:
      return &sum_tile<OneRow, 2, 1, M, ROWS, T>;
    case 3:
      return &sum_tile<OneRow, 3, 1, M, ROWS, T>;
    case 4:
      return &sum_tile<OneRow, 4, 1, M, ROWS, T>;
    case 5:
      return &sum_tile<OneRow, 5, 1, M, ROWS, T>;
    default:
      return any_taps;
  }
}

// Of images that are no wider than half a vector.
constexpr int64_t kPairRows = 2 * kTileRows;
template <class T>
bool in_pairs(const Axis& h, const Axis& w, int64_t I) {
  const bool usual = rows_are_known(h) && h.step == 1 && (h.taps == 3 || h.taps == 5);
  return usual && w.outputs <= kLanes<T> / 2 && I >= kPairRows;
}

template <int M, class T>
SumTile<T> pair_tile_for(const Axis& h) {
  return h.taps == 3 ? &sum_tile<TwoRows, 3, 2, M, kTileRows, T> : &sum_tile<TwoRows, 5, 2, M, kTileRows, T>;
}

// A tile of M channels of a block of I rows.
template <class T>
struct RowTile {
  int64_t rows;
  SumTile<T> sum;

  template <int M>
  static RowTile of(const Axis& h, const Axis& w, int64_t I) {
    if (in_pairs<T>(h, w, I)) return {kPairRows, pair_tile_for<M, T>(h)};
    if (M == 1 && I >= kOneChannelRows) return {kOneChannelRows, tile_for<1, kOneChannelRows, T>(h)};
    if (I >= kTileRows) return {kTileRows, tile_for<M, kTileRows, T>(h)};
    return {1, &sum_tile<OneRow, 0, 1, M, 1, T>};
  }
  static RowTile of(const Axis& h, const Axis& w, int64_t I, int64_t M) {
    if constexpr (kTileChannels == 4) {
      if (M == 4) return of<4>(h, w, I);
      if (M == 3) return of<3>(h, w, I);
    }
    return M == 2 ? of<2>(h, w, I) : of<1>(h, w, I);
  }
};

// ---- launchers -----------------------------------------------------------------------------------

// One call's sums: M target channels of each group from D source channels. weight[m, d, r, s] of group g lies at
// weight.at(m, d, r, s)[g * weight_group].
template <class T>
struct Sums {
  int64_t N, G, M, D;
  Strided4d<const T> source;
  Strided4d<const T> weight;
  int64_t weight_group;
  const T* bias;
  int64_t bias_stride;
  Strided4d<T> target;
};

// The rows and columns of one phase as planes in cache. With a step, the columns that one tap reads lie side by side:
// position x of a packed row is source column w.first + x, at (x % step)*width + x / step.
template <class T>
class Packing {
 public:
  Packing(const Axis& h, const Axis& w, int64_t M, int64_t D)
      : h_(h), w_(w), D_(D), columns_(w.reach(w.outputs)), width_(ceil_div(columns_, w.step) + kLanes<T>) {
    pitch_ = width_ * w.step;
    const int64_t row_bytes = (D * pitch_ * h.step + M * result_pitch()) * int64_t(sizeof(T));
    const int64_t fit = std::max<int64_t>(kOneChannelRows, kBlockBytes / row_bytes);
    const int64_t count = ceil_div(h.outputs, fit);
    rows_ = ceil_div(ceil_div(h.outputs, count), kTileRows) * kTileRows;
    for (int64_t s = 0; s < w.taps; ++s) {
      tap_columns_.push_back(s * w.spacing % w.step * width_ + s * w.spacing / w.step);
    }
  }
  int64_t blocks() const { return ceil_div(h_.outputs, rows_); }
  int64_t first(int64_t block) const { return block * rows_; }
  int64_t rows(int64_t block) const { return std::min(rows_, h_.outputs - first(block)); }
  int64_t most_rows() const { return std::min(rows_, h_.outputs); }
  int64_t plane() const { return h_.reach(most_rows()) * pitch_ + kLanes<T>; }
  int64_t size() const { return D_ * plane(); }
  int64_t line() const { return w_.step > 1 ? D_ * columns_ : 0; }
  int64_t result_pitch() const { return ceil_div(w_.outputs, kLanes<T>) * kLanes<T>; }
  Planes<T> planes(const T* data, int64_t channel, int64_t count, int64_t block) const {
    const int64_t origin = first(block) * h_.step + h_.first;
    return {data + channel * plane(), plane(), pitch_, count, tap_columns_.data(), -origin, h_.source - origin};
  }

  // `line` (D, columns_) holds a row before it is taken apart; `to` was zero before the first block.
  void pack(const Strided4d<const T>& source, int64_t n, int64_t channel, int64_t block, T* line, T* to) const {
    const int64_t begin = std::clamp<int64_t>(-w_.first, 0, columns_);
    const int64_t end = std::clamp<int64_t>(w_.source - w_.first, begin, columns_);
    const int64_t origin = first(block) * h_.step + h_.first;
    for (int64_t y = 0; y < h_.reach(rows(block)); ++y, to += pitch_) {
      const int64_t row = origin + y;
      if (row < 0 || row >= h_.source || begin == end || D_ == 0) {
        for (int64_t d = 0; d < D_; ++d) std::fill_n(to + d * plane(), pitch_, T(0));
        continue;
      }
      // seen from copy_pixels, channels are the pixels, and the other way round
      const T* from = &source.at(n, channel, row, w_.first + begin);
      T* packed = w_.step > 1 ? line : to + begin;
      copy_pixels(from, source.stride_c, source.stride_w, D_, end - begin, packed, w_.step > 1 ? end - begin : plane());
      if (w_.step == 1) continue;
      for (int64_t d = 0; d < D_; ++d) take_apart(line + d * (end - begin), begin, end, to + d * plane());
    }
  }

 private:
  void take_apart(const T* line, int64_t begin, int64_t end, T* to) const {
    const auto place = [&](int64_t x) { return to + x % w_.step * width_ + x / w_.step; };
    if (w_.step == 2) return take_two_apart(line, end - begin, place(begin), place(begin + 1));
    for (int64_t phase = 0; phase < w_.step; ++phase) {
      const int64_t i = ceil_div(std::max<int64_t>(0, begin - phase), w_.step);
      T* row = to + phase * width_ + i;
      for (int64_t x = phase + i * w_.step; x < end; x += w_.step) *row++ = line[x - begin];
    }
  }

  // first[i] = line[2*i], second[i] = line[2*i + 1] for all `count` of the line
  static void take_two_apart(const T* line, int64_t count, T* first, T* second) {
    constexpr int64_t L = kLanes<T>;
    using AllLanes = std::make_integer_sequence<int, kLanes<T>>;
    int64_t i = 0;
    for (; 2 * i + 2 * L <= count; i += L) {
      const Vector<T> a = load_vector(line + 2 * i), b = load_vector(line + 2 * i + L);
      store_vector(first + i, every_second<0>(a, b, AllLanes{}));
      store_vector(second + i, every_second<1>(a, b, AllLanes{}));
    }
    for (; 2 * i < count; ++i) {
      first[i] = line[2 * i];
      if (2 * i + 1 < count) second[i] = line[2 * i + 1];
    }
  }

  Axis h_, w_;
  int64_t D_, columns_, width_, pitch_, rows_;
  std::vector<int64_t> tap_columns_;
};

// packed[d][s][r][m] for each tile of the group's channels, one tile after the other
template <class T>
void pack_factors(const Sums<T>& sums, int64_t g, const Axis& h, const Axis& w, const Pieces& tiles, T* packed) {
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    for (int64_t d = 0; d < sums.D; ++d) {
      for (int64_t s = 0; s < w.taps; ++s) {
        for (int64_t r = 0; r < h.taps; ++r) {
          for (int64_t m = tiles.begin(tile); m < tiles.begin(tile + 1); ++m) {
            *packed++ = (&sums.weight.at(m, d, h.weight(r), w.weight(s)))[g * sums.weight_group];
          }
        }
      }
    }
  }
}

// to[m][i][j] for all M channels, I rows and J columns. The last rows are summed together with some of those before
// them once more.
template <class T>
void sum_block(const Planes<T>& source, const Axis& h, const Axis& w, const Pieces& tiles, const T* factors,
               const T* offsets, int64_t I, const Results<T>& to) {
  for (int64_t t = 0; t < tiles.count; ++t) {
    const int64_t m = tiles.begin(t);
    const RowTile<T> tile = RowTile<T>::of(h, w, I, tiles.length(t));
    for (int64_t i = 0; i < I; i += tile.rows) {
      const int64_t row = std::min(i, I - tile.rows);
      for (int64_t j = 0; j < w.outputs; j += kLanes<T>) {
        Planes<T> part = source;
        part.data += row * h.step * source.pitch + j;
        part.first -= row * h.step;
        part.last -= row * h.step;
        const Results<T> place = {to.data + m * to.plane + row * to.pitch + j, to.plane, to.pitch};
        tile.sum(part, h, w.taps, factors + m * source.D * w.taps * h.taps, offsets + m,
                 std::min<int64_t>(kLanes<T>, w.outputs - j), place);
      }
    }
  }
}

// target[.., m, i, j] = from[m][i][j] for the target's columns `step` apart
template <class T>
void write_block(const Results<T>& from, int64_t M, int64_t I, int64_t J, const Strided4d<T>& target) {
  for (int64_t i = 0; i < I; ++i) {
    const T* row = from.data + i * from.pitch;
    T* to = target.data + i * target.stride_h;
    if (target.stride_c == 1 && M > 1) {
      copy_pixels(row, 1, from.plane, J, M, to, target.stride_w);
      continue;
    }
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t j = 0; j < J; ++j) to[m * target.stride_c + j * target.stride_w] = row[m * from.plane + j];
    }
  }
}

// How many groups a task takes: with channels side by side, as many as fill a vector, which then is turned in one go.
template <class T>
int64_t groups_of_task(const Sums<T>& sums) {
  const int64_t most = kLanes<T> / std::max<int64_t>(1, std::max(sums.M, sums.D));
  if (sums.source.stride_c != 1 || sums.target.stride_c != 1) return 1;
  int64_t groups = std::clamp<int64_t>(most, 1, sums.G);
  while (sums.G % groups != 0) --groups;
  return groups;
}

// The sums of one phase.
template <class T>
void sum_phase(const Sums<T>& sums, const Axis& h, const Axis& w) {
  const int64_t groups = groups_of_task(sums), M = groups * sums.M, D = groups * sums.D, bundles = sums.G / groups;
  const Packing<T> packing(h, w, M, D);
  const Pieces tiles(sums.M, kTileChannels);
  const int64_t group_factors = sums.M * sums.D * h.taps * w.taps, channels = sums.G * sums.M;
  Scratch<T> factors(sums.G * group_factors), offsets(channels);
  parallel_for(sums.G, grain_of(kPackProducts * group_factors), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) pack_factors(sums, g, h, w, tiles, factors.data() + g * group_factors);
  });
  for (int64_t m = 0; m < channels; ++m)
    offsets.data()[m] = sums.bias == nullptr ? T(0) : sums.bias[m * sums.bias_stride];
  const int64_t blocks = packing.blocks(), pitch = packing.result_pitch();
  const bool in_place = sums.target.stride_w * w.place_step == 1;
  const int64_t products = packing.most_rows() * w.outputs * groups * group_factors;
  parallel_for(sums.N * blocks * bundles, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<T> packed(packing.size()), line(packing.line());
    Scratch<T> results(in_place ? 0 : M * packing.most_rows() * pitch);
    std::fill_n(packed.data(), packing.size(), T(0));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % bundles * groups, block = task / bundles % blocks, n = task / bundles / blocks;
      const int64_t I = packing.rows(block);
      packing.pack(sums.source, n, first * sums.D, block, line.data(), packed.data());
      const Strided4d<T> target = {&sums.target.at(n, first * sums.M, h.place(packing.first(block)), w.place(0)),
                                   sums.target.stride_n, sums.target.stride_c, sums.target.stride_h * h.place_step,
                                   sums.target.stride_w * w.place_step};
      const Results<T> to = in_place ? Results<T>{target.data, target.stride_c, target.stride_h}
                                     : Results<T>{results.data(), I * pitch, pitch};
      for (int64_t g = first; g < first + groups; ++g) {
        const Results<T> of_group = {to.data + (g - first) * sums.M * to.plane, to.plane, to.pitch};
        sum_block(packing.planes(packed.data(), (g - first) * sums.D, sums.D, block), h, w, tiles,
                  factors.data() + g * group_factors, offsets.data() + g * sums.M, I, of_group);
      }
      if (!in_place) write_block(to, M, I, w.outputs, target);
    }
  });
}

// What a task sums of grad_weight: rows of one image, for some output channels of a group.
template <class T>
struct GradBlock {
  const T* grad;  // of the first channel and row
  int64_t plane, pitch;
  int64_t channels, rows;
};

// sums[((k*C + c)*R + r)*S + s] += sum over the block's pixels of grad (k, i, j) times what tap (r, s) of channel c
// reads with (i, j), lane by lane: some rows and channels at a time, which stay in the first cache while all taps read
// them
template <class T>
void add_products_of_block(const Planes<T>& source, const Axis& h, const Axis& w, const GradBlock<T>& block,
                           Vector<T>* sums) {
  const int64_t taps = source.D * h.taps * w.taps, vectors = ceil_div(w.outputs, kLanes<T>);
  const Pieces rows(block.rows, ceil_div(kWindowVectors, vectors)), columns(w.taps, kMostTaps);
  const Pieces channels(block.channels, channels_beside(int(columns.most())));
  for (int64_t window = 0; window < rows.count * channels.count; ++window) {
    const int64_t i = rows.begin(window / channels.count), k = channels.begin(window % channels.count);
    const int64_t channel_count = channels.length(window % channels.count);
    const T* grad = block.grad + k * block.plane + i * block.pitch;
    for (int64_t d = 0; d < source.D; ++d) {
      for (int64_t r = 0; r < h.taps; ++r) {
        const T* row = source.data + d * source.plane + (i * h.step + r * h.spacing) * source.pitch;
        for (int64_t part = 0; part < columns.count; ++part) {
          const int64_t s = columns.begin(part);
          const bool fetch = d + r + part == 0 && k + channel_count < block.channels;
          const auto add = products_of<T>(channel_count, columns.length(part));
          add({rows.length(window / channels.count), w.outputs, grad, block.plane, block.pitch, row,
               h.step * source.pitch, source.column + s, fetch ? channel_count * block.plane : 0},
              sums + k * taps + (d * h.taps + r) * w.taps + s, taps);
        }
      }
    }
  }
}

// Tasks own some output channels of a group, and one of `chunks` stretches of its images and blocks of rows; the
// chunks' sums are then added in order.
template <class T>
void sum_weight(const Conv2dShape& shape, const Strided4d<const T>& grad, const Strided4d<const T>& input,
                const Strided4d<T>& grad_weight) {
  const Axis h = forward_axes_h(shape)[0], w = forward_axes_w(shape)[0];
  const int64_t C = shape.C / shape.G, K = shape.K / shape.G, taps = C * shape.R * shape.S;
  const Packing<T> packing(h, w, 0, C);
  const int64_t blocks = packing.blocks(), pieces = shape.N * blocks;
  const int64_t fit = std::clamp<int64_t>(kSumBytes / (taps * kVectorBytes), 1, K);  // channels whose sums do
  const int64_t chunks = std::clamp(ceil_div(kEnoughTasks, shape.G * ceil_div(K, fit)), int64_t(1), pieces);
  const int64_t share = std::max(kTaskChannels, ceil_div(K, ceil_div(kEnoughTasks, shape.G * chunks)));
  const Pieces channels(K, std::min(fit, share));
  const int64_t tasks = shape.G * channels.count * chunks;
  Scratch<T> partial(chunks * shape.K * taps);  // (chunks, K, C, R, S)
  const int64_t products = ceil_div(pieces, chunks) * packing.most_rows() * shape.Q * channels.most() * taps;
  parallel_for(tasks, grain_of(products), [&](int64_t begin, int64_t end) {
    Scratch<T> packed(packing.size()), line(packing.line());
    Scratch<Vector<T>> sums(channels.most() * taps);
    std::fill_n(packed.data(), packing.size(), T(0));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, part = task / chunks % channels.count, g = task / chunks / channels.count;
      const int64_t k = g * K + channels.begin(part), weights = channels.length(part) * taps;
      std::fill_n(sums.data(), weights, Vector<T>{});
      for (int64_t piece = pieces * chunk / chunks; piece < pieces * (chunk + 1) / chunks; ++piece) {
        const int64_t n = piece / blocks, block = piece % blocks;
        packing.pack(input, n, g * C, block, line.data(), packed.data());
        add_products_of_block<T>(packing.planes(packed.data(), 0, C, block), h, w,
                                 {&grad.at(n, k, packing.first(block), 0), grad.stride_c, grad.stride_h,
                                  channels.length(part), packing.rows(block)},
                                 sums.data());
      }
      T* to = partial.data() + (chunk * shape.K + k) * taps;
      for (int64_t i = 0; i < weights; ++i) to[i] = sum_of_lanes<T>(sums.data()[i]);
    }
  });
  const T* first = partial.data();
  for (int64_t k = 0; k < shape.K; ++k) {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t r = 0; r < shape.R; ++r) {
        for (int64_t s = 0; s < shape.S; ++s, ++first) {
          T sum = 0;
          for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += first[chunk * shape.K * taps];
          grad_weight.at(k, c, r, s) = sum;
        }
      }
    }
  }
}

}  // namespace

// ---- entry points --------------------------------------------------------------------------------

bool SmallChannels::knows_rows(const Conv2dShape& shape) { return rows_are_known(forward_axes_h(shape)[0]); }

bool SmallChannels::pairs_rows(const Conv2dShape& shape) {
  return in_pairs<float>(forward_axes_h(shape)[0], forward_axes_w(shape)[0], shape.P);
}

template <class T>
void SmallChannels::forward(const Conv2dShape& shape, Strided4d<const T> input, Strided4d<const T> weight,
                            const T* bias, int64_t bias_stride, Strided4d<T> output) {
  if (shape.N * shape.K * shape.P * shape.Q == 0) return;
  const int64_t M = shape.K / shape.G, D = shape.C / shape.G;
  sum_phase<T>({shape.N, shape.G, M, D, input, weight, M * weight.stride_n, bias, bias_stride, output},
               forward_axes_h(shape)[0], forward_axes_w(shape)[0]);
}

template <class T>
void SmallChannels::grad_input(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> weight,
                               const T* bias, int64_t bias_stride, Strided4d<T> grad_input) {
  if (shape.N * shape.C * shape.H * shape.W == 0) return;
  const Strided4d<const T> turned = {weight.data, weight.stride_c, weight.stride_n, weight.stride_h, weight.stride_w};
  const int64_t M = shape.C / shape.G, D = shape.K / shape.G;
  const Sums<T> sums = {shape.N, shape.G, M, D, grad, turned, D * weight.stride_n, bias, bias_stride, grad_input};
  for (const Axis& h : gradient_axes_h(shape)) {
    for (const Axis& w : gradient_axes_w(shape)) sum_phase(sums, h, w);
  }
}

// Where channels lie side by side they fill the vectors: as direct has it.
template <class T>
void SmallChannels::grad_weight(const Conv2dShape& shape, Strided4d<const T> grad, Strided4d<const T> input,
                                Strided4d<T> grad_weight) {
  const bool empty = shape.N * shape.C * shape.K * shape.P * shape.Q == 0;
  if (empty || grad.stride_w != 1) return Direct::grad_weight(shape, grad, input, grad_weight);
  sum_weight(shape, grad, input, grad_weight);
}

template void SmallChannels::forward(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>, const float*,
                                     int64_t, Strided4d<float>);
template void SmallChannels::grad_input(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>,
                                        const float*, int64_t, Strided4d<float>);
template void SmallChannels::grad_weight(const Conv2dShape&, Strided4d<const float>, Strided4d<const float>,
                                         Strided4d<float>);

}  // namespace dlkernels
