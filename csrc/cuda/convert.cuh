// Numbers of every storage type as they lie in 32-bit words: two of 16 bits, one of 32, half of one of 64.
#pragma once

#include <cuda_runtime.h>

#include "../common.h"

namespace dlkernels {

// Two numbers of 16 bits, the first in the lower half: one instruction where two single conversions need three.
template <class T>
__device__ inline uint32_t store_pair(float first, float second) {
  return uint32_t(store<T>(first).bits) | uint32_t(store<T>(second).bits) << 16;
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ inline uint32_t store_pair<BFloat16>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

template <>
__device__ inline uint32_t store_pair<Half>(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
#endif

// Number i of those in `words`.
template <class T>
__device__ inline T from_words(const uint32_t* words, int i) {
  if constexpr (sizeof(T) == 2) return T{uint16_t(words[i / 2] >> (i % 2 * 16))};
  if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
  if constexpr (sizeof(T) == 8) return __hiloint2double(words[2 * i + 1], words[2 * i]);
}

// The `COUNT` numbers as words; COUNT is even.
template <class T, int COUNT>
__device__ inline void to_words(const Accumulate<T> (&values)[COUNT], uint32_t* words) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if constexpr (sizeof(T) == 2) {
      if (i % 2 == 0) words[i / 2] = store_pair<T>(values[i], values[i + 1]);
    }
    if constexpr (sizeof(T) == 4) words[i] = __float_as_uint(values[i]);
    if constexpr (sizeof(T) == 8)
      words[2 * i] = __double2loint(values[i]), words[2 * i + 1] = __double2hiint(values[i]);
  }
}

}  // namespace dlkernels
