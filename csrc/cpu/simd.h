// Vectors as the compiler sees them: one text for SSE2, AVX2, AVX-512 and Arm; the width follows the compile flags.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dlkernels {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
inline Vector<T> load_vector(const T* from) {
  Vector<T> vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class T>
inline void store_vector(T* to, Vector<T> vector) {
  memcpy(to, &vector, sizeof vector);
}

// The first `count` < kLanes<T> elements at `from`, zeros behind them; and the way back. Memory further on is not
// touched.
template <class T>
inline Vector<T> load_first(const T* from, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_loadu_epi32(__mmask16((1u << count) - 1), from);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_maskz_loadu_epi64(__mmask8((1u << count) - 1), from);
#endif
  Vector<T> vector = {};
  memcpy(&vector, from, count * sizeof(T));
  return vector;
}

template <class T>
inline void store_first(T* to, int64_t count, Vector<T> vector) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_epi32(to, __mmask16((1u << count) - 1), (__m512i)vector);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_epi64(to, __mmask8((1u << count) - 1), (__m512i)vector);
#endif
  memcpy(to, &vector, count * sizeof(T));
}

// The sum of a vector's lanes, halves added to halves.
template <class T, int LANES = kLanes<T>>
inline T sum_of_lanes(const T (&lanes)[LANES]) {
  if constexpr (LANES == 1) {
    return lanes[0];
  } else {
    T halves[LANES / 2];
    for (int i = 0; i < LANES / 2; ++i) halves[i] = lanes[i] + lanes[i + LANES / 2];
    return sum_of_lanes<T, LANES / 2>(halves);
  }
}

template <class T>
inline T sum_of_lanes(Vector<T> vector) {
  T lanes[kLanes<T>];
  memcpy(lanes, &vector, sizeof vector);
  return sum_of_lanes<T, kLanes<T>>(lanes);
}

// While it lives, this thread reads denormals as zero and flushes results that would be denormal: one denormal operand
// can cost a hundred cycles. The caller's setting comes back at the end.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero | kDenormalsAreZero); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | kFlushToZero));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  static constexpr uint64_t kFlushToZero = uint64_t(1) << 24;
  uint64_t saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

// Uninitialised scratch memory, aligned to a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr size_t kLine = 64;
    const size_t bytes = (size_t(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    data_ = static_cast<T*>(std::aligned_alloc(kLine, bytes > 0 ? bytes : kLine));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace dlkernels
