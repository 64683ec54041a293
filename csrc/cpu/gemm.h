// The inner loop of every matrix product here: a register tile of packed panels.
//
//   sums[m][j] += sum over l of rows[l][m] * columns[l][j]
//
// Both operands are packed, l outermost, so that the loop reads memory straight on. A tile's sum over its l is kept in
// registers and added to `sums` once: long sums are made of short ones, which also keeps their rounding errors small.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "../common.h"
#include "simd.h"

namespace dlkernels {

// Register tile: kTileRows x kTileVectors accumulators, kTileVectors of `columns` and one broadcast of `rows` fill
// the 32 (8*3 + 3 + 1) or 16 (4*3 + 3 + 1) vector registers.
constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int kTileVectors = 3;

// Few rows leave registers for more columns: with them, every chain of sums has others to run beside.
constexpr int kFewRows = kTileRows / 2;
constexpr int kFewRowsVectors = kVectorRegisters == 32 ? 6 : 4;

// Terms summed in registers before memory is touched: a panel of this depth, 30 KiB, leaves room in the first cache.
constexpr int64_t kTileDepth = 160;

// Of a right operand that a core's cache keeps from one use to the next.
constexpr int64_t kCoreCacheBytes = 1 << 20;

// The left operand packed: (depth, kTileRows).
template <class T>
struct Interleaved {
  const T* data;
  T at(int m, int64_t l) const { return data[l * kTileRows + m]; }
};

// The left operand as it lies in memory: rows `stride` apart.
template <class T>
struct RowMajor {
  const T* data;
  int64_t stride;
  T at(int m, int64_t l) const { return data[m * stride + l]; }
  RowMajor from(int64_t m, int64_t l) const { return {data + m * stride + l, stride}; }
};

// The left operand through two tables: element (m, l) lies at data[row[m] + depth[l]].
template <class T>
struct Indirect {
  const T* data;
  const int64_t *row, *depth;
  T at(int m, int64_t l) const { return data[row[m] + depth[l]]; }
};

// The same where its rows are `step` apart: element (m, l) lies at data[m * step + depth[l]].
template <class T>
struct EvenlySpaced {
  const T* data;
  int64_t step;
  const int64_t* depth;
};

// tile[m][v] += sum over l of rows[l][m] * vector v of columns[l], in order of l whatever the tile's size: the same
// bits.
//   rows (depth, ROWS), columns (depth, column_stride), the tile's VECTORS vectors first
//   AHEAD: asks for the columns that follow these, which the second cache does not hold yet
template <int ROWS, int VECTORS, bool AHEAD = false, class T, class Rows>
inline void sum_tile(int64_t depth, const Rows& rows, const T* columns, int64_t column_stride,
                     Vector<T> (&tile)[ROWS][VECTORS]) {
#pragma GCC unroll 2
  for (int64_t l = 0; l < depth; ++l) {
    Vector<T> column[VECTORS];
    for (int v = 0; v < VECTORS; ++v) column[v] = load_vector(columns + l * column_stride + v * kLanes<T>);
    for (int v = 0; AHEAD && v < VECTORS; ++v) {
      __builtin_prefetch(columns + (l + depth) * column_stride + v * kLanes<T>, 0, 2);
    }
    for (int m = 0; m < ROWS; ++m) {
      for (int v = 0; v < VECTORS; ++v) tile[m][v] += rows.at(m, l) * column[v];
    }
  }
}

// The same through tables. A row's address is worked out once: an addition for each element would take a place that an
// FMA could have.
template <int ROWS, int VECTORS, class T>
inline void sum_tile(int64_t depth, const Indirect<T>& rows, const T* columns, int64_t column_stride,
                     Vector<T> (&tile)[ROWS][VECTORS]) {
  const T* row[ROWS];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
    row[m] = rows.data + rows.row[m];
    asm("" : "+r"(row[m]));  // or the sum would be taken apart again
  }
#pragma GCC unroll 2
  for (int64_t l = 0; l < depth; ++l, columns += column_stride) {
    const int64_t offset = rows.depth[l];
    Vector<T> column[VECTORS];
    for (int v = 0; v < VECTORS; ++v) column[v] = load_vector(columns + v * kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      for (int v = 0; v < VECTORS; ++v) tile[m][v] += row[m][offset] * column[v];
    }
  }
}

// The same for evenly spaced rows and a single vector of columns, where each sum takes a broadcast from memory of its
// own: more of them run side by side than there are registers for their addresses, which here take three, as each four
// rows are x86's row + step * 0, 1, 2 and 3 * step.
template <int ROWS, int VECTORS, class T>
inline void sum_tile(int64_t depth, const EvenlySpaced<T>& rows, const T* columns, int64_t column_stride,
                     Vector<T> (&tile)[ROWS][VECTORS]) {
  static_assert(VECTORS == 1);
  const int64_t step = rows.step * int64_t(sizeof(T)), steps[] = {0, step, 2 * step, 3 * step};
  for (int64_t l = 0; l < depth; ++l, columns += column_stride) {
    const Vector<T> column = load_vector(columns);
    const char* row = (const char*)(rows.data + rows.depth[l]);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      tile[m][0] += *(const T*)(row + steps[m % 4]) * column;
      if (m % 4 == 3) row += 4 * step;
      if (m % 4 == 3) asm("" : "+r"(row));  // or each address would be worked out, and kept, by itself
    }
  }
}

// Vector by vector: an initialiser becomes a loop over memory, and with it the tile would live there.
template <int ROWS, int VECTORS, class V>
inline void clear_tile(V (&tile)[ROWS][VECTORS]) {
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) tile[m][v] = V{};
  }
}

// What sums begin from: rows `stride` apart, often the sums themselves, or one row for all where the stride is 0; zeros
// without rows.
template <class T>
struct Start {
  const T* rows = nullptr;
  int64_t stride = 0;
  Start from(int64_t m) const { return {rows == nullptr ? nullptr : rows + m * stride, stride}; }
};

// One tile of ROWS rows by VECTORS vectors, written to sums (ROWS, sum_stride).
template <int ROWS, int VECTORS, bool AHEAD, class T, class Rows>
void multiply_tile(int64_t depth, const Rows& rows, const T* columns, int64_t column_stride, Start<T> start, T* sums,
                   int64_t sum_stride) {
  Vector<T> tile[ROWS][VECTORS];
  clear_tile(tile);
  sum_tile<ROWS, VECTORS, AHEAD>(depth, rows, columns, column_stride, tile);
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {  // unrolled, or the tile would live in memory
    if (start.rows != nullptr) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) tile[m][v] += load_vector(start.rows + m * start.stride + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store_vector(sums + m * sum_stride + v * kLanes<T>, tile[m][v]);
  }
}

// The same with each row of sums through a pointer of its own: added to sums[m], or, where there is a `start`, begun
// from that row and written to sums[m].
template <int ROWS, int VECTORS, class T, class Rows>
void multiply_scattered_tile(int64_t depth, const Rows& rows, const T* columns, int64_t column_stride, const T* start,
                             T* const* sums) {
  Vector<T> tile[ROWS][VECTORS];
  clear_tile(tile);
  sum_tile(depth, rows, columns, column_stride, tile);
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m) {
    T* sum = sums[m];
    const T* before = start != nullptr ? start : sum;
    for (int v = 0; v < VECTORS; ++v) {
      store_vector(sum + v * kLanes<T>, load_vector(before + v * kLanes<T>) + tile[m][v]);
    }
  }
}

// ---- tiles of any size ---------------------------------------------------------------------------

template <class T, class Rows>
using Tile = void (*)(int64_t depth, const Rows& rows, const T* columns, int64_t column_stride, Start<T> start, T* sums,
                      int64_t sum_stride);

template <int VECTORS, bool AHEAD, class T, class Rows, int... ROW>
Tile<T, Rows> tile_of(int64_t row_count, std::integer_sequence<int, ROW...>) {
  static constexpr Tile<T, Rows> kTiles[] = {&multiply_tile<ROW + 1, VECTORS, AHEAD, T, Rows>...};
  return kTiles[row_count - 1];
}

// multiply_tile for `vectors` <= kFewRowsVectors, and `row_count` <= kTileRows, or kFewRows where vectors >
// kTileVectors.
template <class T, class Rows, bool AHEAD = false, int VECTORS = kFewRowsVectors>
Tile<T, Rows> tile_of(int64_t row_count, int64_t vectors) {
  if constexpr (VECTORS > 1) {
    if (vectors < VECTORS) return tile_of<T, Rows, AHEAD, VECTORS - 1>(row_count, vectors);
  }
  constexpr int kRows = VECTORS > kTileVectors ? kFewRows : kTileRows;
  return tile_of<VECTORS, AHEAD, T, Rows>(row_count, std::make_integer_sequence<int, kRows>{});
}

// The most rows of a tile of so many vectors, each row through a pointer of its own.
constexpr int tile_rows(int vectors) { return std::min(8, (kVectorRegisters - 1 - vectors) / vectors); }

template <class T, class Rows>
using ScatteredTile = void (*)(int64_t depth, const Rows& rows, const T* columns, int64_t column_stride, const T* start,
                               T* const* sums);

template <int VECTORS, class T, class Rows, int... ROW>
ScatteredTile<T, Rows> scattered_tile(int64_t row_count, std::integer_sequence<int, ROW...>) {
  static constexpr ScatteredTile<T, Rows> kTiles[] = {&multiply_scattered_tile<ROW + 1, VECTORS, T, Rows>...};
  return kTiles[row_count - 1];
}

// multiply_scattered_tile for `vectors` <= 4 and `row_count` <= tile_rows(vectors).
template <class T, int VECTORS = 4>
ScatteredTile<T, Indirect<T>> scattered_tile(int64_t row_count, int64_t vectors) {
  if constexpr (VECTORS > 1) {
    if (vectors < VECTORS) return scattered_tile<T, VECTORS - 1>(row_count, vectors);
  }
  return scattered_tile<VECTORS, T, Indirect<T>>(row_count, std::make_integer_sequence<int, tile_rows(VECTORS)>{});
}

// ... and for a single vector and `row_count` <= kEvenRows rows that are evenly spaced.
constexpr int kEvenRows = 14;

template <class T>
ScatteredTile<T, EvenlySpaced<T>> even_tile(int64_t row_count) {
  return scattered_tile<1, T, EvenlySpaced<T>>(row_count, std::make_integer_sequence<int, kEvenRows>{});
}

// The right operand packed: its columns, filled up with zeros to whole vectors, cut into panels of about the same
// width, at most `most_vectors`, their number a multiple of `threads` that share them. A panel is (depth, width) in
// memory.
template <class T>
class Panels {
 public:
  Panels(int64_t depth, int64_t columns, int most_vectors, int64_t threads = 1, int64_t count = 0)
      : depth_(depth),
        columns_(columns),
        vectors_(ceil_div(columns, kLanes<T>)),
        count_(count > 0 ? count : std::min(vectors_, ceil_div(ceil_div(vectors_, most_vectors), threads) * threads)),
        few_(most_vectors > kTileVectors),
        large_(depth * vectors_ * int64_t(sizeof(Vector<T>)) > threads * kCoreCacheBytes),
        data_(depth * vectors_ * kLanes<T>) {}

  int64_t count() const { return count_; }
  int64_t first_column(int64_t panel) const { return first_vector(panel) * kLanes<T>; }
  int64_t end_column(int64_t panel) const { return first_vector(panel + 1) * kLanes<T>; }  // past the padding, too

  // sums[m][j] = start[m][j] + sum over l < depth of rows[m][l] * columns[l][j] for the panel's columns j
  //   rows (row_count, depth), start and sums (row_count, sum_stride), the panel's first column first
  // A large operand is asked for ahead: +2 to 3 % with 8 MiB of weights of an RNN; where it fits, -1 to -4 %.
  void multiply(int64_t panel, int64_t depth, int64_t row_count, const RowMajor<T>& rows, const Start<T>& start,
                T* sums, int64_t sum_stride) const {
    const int64_t vectors = first_vector(panel + 1) - first_vector(panel), width = vectors * kLanes<T>;
    const int64_t tile_rows = few_ ? kFewRows : kTileRows;
    for (int64_t l = 0; l == 0 || l < depth; l += kTileDepth) {
      const int64_t count = std::min(kTileDepth, depth - l);
      const Start<T> before = l == 0 ? start : Start<T>{sums, sum_stride};
      for (int64_t m = 0; m < row_count; m += tile_rows) {
        const int64_t tile_height = std::min(tile_rows, row_count - m);
        const auto tile = large_ ? tile_of<T, RowMajor<T>, true>(tile_height, vectors)
                                 : tile_of<T, RowMajor<T>>(tile_height, vectors);
        tile(count, rows.from(m, l), this->panel(panel) + l * width, width, before.from(m), sums + m * sum_stride,
             sum_stride);
      }
    }
  }

  // The same for one tile of packed rows. Its sums are asked for at once: they come when the products are done.
  void multiply(int64_t panel, int64_t depth, int64_t row_count, const Interleaved<T>& rows, const Start<T>& start,
                T* sums, int64_t sum_stride) const {
    const int64_t vectors = first_vector(panel + 1) - first_vector(panel), width = vectors * kLanes<T>;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t m = 0; m < row_count; ++m) {
      for (int64_t j = 0; j < width; j += kLine) __builtin_prefetch(sums + m * sum_stride + j, 1);
    }
    const auto tile = tile_of<T, Interleaved<T>>(row_count, vectors);
    tile(depth, rows, this->panel(panel), width, start, sums, sum_stride);
  }

  // columns[l][j] = row[j]
  void pack_row(int64_t l, const T* row) {
    for (int64_t p = 0; p < count_; ++p) {
      const int64_t width = end_column(p) - first_column(p);
      T* to = panel(p) + l * width;
      for (int64_t j = first_column(p); j < end_column(p); j += kLanes<T>, to += kLanes<T>) {
        store_vector(to, columns_ - j < kLanes<T> ? load_first(row + j, columns_ - j) : load_vector(row + j));
      }
    }
  }

  // columns[l][first + j] = matrix[j][l] for columns [first, first + count) of the panel, zeros behind them up to a
  // whole vector; first is a multiple of kLanes, matrix (count, depth), rows `stride` apart, of a storage type
  template <class S>
  void pack_transposed(int64_t p, int64_t first, int64_t count, const S* matrix, int64_t stride) {
    constexpr int L = kLanes<T>;
    const int64_t width = end_column(p) - first_column(p);
    for (int64_t j = 0; j < count; j += L) {
      const S* rows = matrix + j * stride;
      T* to = panel(p) + first + j;
      const int64_t whole = count - j >= L ? depth_ / L * L : 0;
      for (int64_t l = 0; l < whole; l += L) pack_block(rows + l, stride, to + l * width, width);
      for (int64_t l = whole; l < depth_; l += L) {
        pack_part_of_block(rows + l, stride, count - j, depth_ - l, to + l * width, width);
      }
    }
  }

 private:
  // A block of L rows and columns of the matrix, transposed.
  template <class S>
  static void pack_block(const S* rows, int64_t stride, T* to, int64_t width) {
    constexpr int L = kLanes<T>;
    Vector<T> block[L];
    for (int i = 0; i < L; ++i) block[i] = load_as<T>(rows + i * stride);
    transpose<T>(block);
    for (int i = 0; i < L; ++i) store_vector(to + i * width, block[i]);
  }

  // The same where it ends after `row_count` rows or `depth` columns; missing rows are zeros, missing columns left out.
  template <class S>
  [[gnu::noinline]] static void pack_part_of_block(const S* rows, int64_t stride, int64_t row_count, int64_t depth,
                                                   T* to, int64_t width) {
    constexpr int L = kLanes<T>;
    depth = std::min<int64_t>(L, depth);
    Vector<T> block[L] = {};
    for (int i = 0; i < std::min<int64_t>(L, row_count); ++i) block[i] = load_as<T>(rows + i * stride, depth);
    transpose<T>(block);
    for (int i = 0; i < depth; ++i) store_vector(to + i * width, block[i]);
  }

  int64_t first_vector(int64_t panel) const { return vectors_ * panel / count_; }
  T* panel(int64_t panel) { return data_.data() + first_column(panel) * depth_; }
  const T* panel(int64_t panel) const { return data_.data() + first_column(panel) * depth_; }

  int64_t depth_, columns_, vectors_, count_;
  bool few_, large_;
  Scratch<T> data_;
};

}  // namespace dlkernels
