// The inner loop of every matrix product here: a register tile of packed panels.
//
//   sums[m][j] += sum over l of rows[l][m] * columns[l][j]
//
// Both operands are packed, l outermost, so that the loop reads memory straight on. A tile's sum over its l is kept in
// registers and added to `sums` once: long sums are made of short ones, which also keeps their rounding errors small.
#pragma once

#include <cstdint>

#include "simd.h"

namespace dlkernels {

// Register tile: kTileRows x kTileVectors accumulators, kTileVectors of `columns` and one broadcast of `rows` fill
// the 32 (8*3 + 3 + 1) or 16 (4*3 + 3 + 1) vector registers.
constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int kTileVectors = 3;
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

// One tile of ROWS <= kTileRows rows.
//   rows     (depth, kTileRows)
//   columns  (depth, column_stride), the tile's kTileColumns first
//   sums     (ROWS, sum_stride)
template <int ROWS, class T>
void multiply_tile(int64_t depth, const T* rows, const T* columns, int64_t column_stride, T* sums, int64_t sum_stride) {
  Vector<T> tile[ROWS][kTileVectors] = {};
  for (int64_t l = 0; l < depth; ++l) {
    Vector<T> column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) column[v] = load_vector(columns + l * column_stride + v * kLanes<T>);
    // tile[m][j] += rows[l][m] * columns[l][j]
    for (int m = 0; m < ROWS; ++m) {
      for (int v = 0; v < kTileVectors; ++v) tile[m][v] += rows[l * kTileRows + m] * column[v];
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int v = 0; v < kTileVectors; ++v) {
      T* sum = sums + m * sum_stride + v * kLanes<T>;
      store_vector(sum, load_vector(sum) + tile[m][v]);
    }
  }
}

// A panel of `row_count` <= kTileRows rows by `column_count` columns, a multiple of kTileColumns.
template <int ROWS = kTileRows, class T>
void multiply_panel(int64_t row_count, int64_t column_count, int64_t depth, const T* rows, const T* columns,
                    int64_t column_stride, T* sums, int64_t sum_stride) {
  if constexpr (ROWS > 1) {
    if (row_count < ROWS) {
      return multiply_panel<ROWS - 1>(row_count, column_count, depth, rows, columns, column_stride, sums, sum_stride);
    }
  }
  for (int64_t j = 0; j < column_count; j += kTileColumns<T>) {
    multiply_tile<ROWS>(depth, rows, columns + j, column_stride, sums + j, sum_stride);
  }
}

}  // namespace dlkernels
