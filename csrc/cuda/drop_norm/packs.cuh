// Features in packs of 16 bytes.
#pragma once

#include <type_traits>

#include "../../drop_norm.h"
#include "../async_copy.cuh"

namespace dlkernels {

// Features that lie side by side: 16 bytes, or one where the length of a row is no multiple of that. Rows that are not
// aligned for loads of 16 bytes are taken in the same packs: who owns what is the same, and so are the bits of results.
template <class T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Pack {
  T values[WIDTH];

  __device__ void read(const T* from, bool aligned) {
    if (aligned) {
      *this = *(const Pack*)from;
    } else {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) values[i] = from[i];
    }
  }
};

template <class T>
bool is_aligned(const T* rows, int64_t row_stride) {
  return uintptr_t(rows) % kCopyBytes == 0 && uintptr_t(row_stride) * sizeof(T) % kCopyBytes == 0;
}

// values[i] and on; `otherwise` without any.
template <int WIDTH, class V>
__device__ Pack<V, WIDTH> pack_at(const V* values, int64_t i, V otherwise) {
  Pack<V, WIDTH> pack;
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) pack.values[j] = otherwise;
  if (values != nullptr) pack.read(values + i, uintptr_t(values) % sizeof(pack) == 0);
  return pack;
}

// Calls run(width) with the features of a pack, a constant: 16 bytes of them where the row is made of such packs.
template <class T, class Run>
void for_width(int64_t M, const Run& run) {
  constexpr int kWide = kCopyBytes / sizeof(T);
  if (M % kWide == 0) return run(std::integral_constant<int, kWide>());
  run(std::integral_constant<int, 1>());
}

// s = M / kept when rescale, else 1
template <class A>
__device__ A scale_of(const DropNormShape& shape, const bool* keep, A kept) {
  return shape.rescale && keep != nullptr && kept > 0 ? A(shape.M) / kept : A(1);
}

}  // namespace dlkernels
