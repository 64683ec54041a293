// Vectors as the compiler sees them: one text for SSE2, AVX2, AVX-512 and Arm; the width follows the compile flags.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common.h"
#include "blocks.h"

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
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lanes);
    return (Vector<T>)_mm256_maskload_epi32((const int*)from, mask);
  }
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

// ---- masks: all bits of a lane set, or none; with AVX-512 a bit for each lane, which the operation before takes along

#if defined(__AVX512BW__) && defined(__AVX512VL__)
template <class T>
struct MaskOf {
  typedef std::conditional_t<sizeof(T) == 8, __mmask8, __mmask16> type;
};
#else
template <class T>
struct MaskOf {
  typedef std::conditional_t<sizeof(T) == 8, int64_t, int32_t> type __attribute__((vector_size(kVectorBytes)));
};
#endif
template <class T>
using Mask = typename MaskOf<T>::type;

// The first `count` lanes.
template <class T>
inline Mask<T> first_lanes(int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return Mask<T>((1u << count) - 1);
#else
  Mask<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < int(count);
#endif
}

// From bytes that are 0 or -1.
template <class T>
inline Mask<T> load_mask(const int8_t* from) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 4) return _mm_movepi8_mask(_mm_loadu_si128((const __m128i*)from));
  if constexpr (sizeof(T) == 8) return Mask<T>(_mm_movepi8_mask(_mm_loadl_epi64((const __m128i*)from)));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Mask<T>)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
  if constexpr (sizeof(T) == 8) return (Mask<T>)_mm256_cvtepi8_epi64(_mm_loadu_si32(from));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Mask<T>);
#endif
}

// The vector's lanes that the mask has, and 0 in the others.
template <class T>
inline Vector<T> where(Mask<T> mask, Vector<T> vector) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_mov_ps(mask, (__m512)vector);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_maskz_mov_pd(mask, (__m512d)vector);
#else
  return (Vector<T>)((Mask<T>)vector & mask);
#endif
}

// ---- memory in one type, vectors in another: 16-bit numbers are computed with as floats ----------

// As many 16-bit patterns as a vector has floats.
typedef uint16_t Patterns __attribute__((vector_size(kVectorBytes / 2)));

inline Vector<float> widen(Patterns patterns, BFloat16) {
#if defined(__AVX512F__)  // GCC 12 widens halves and puts them together
  return (Vector<float>)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)patterns), 16);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)patterns), 16);
#else
  return (Vector<float>)(__builtin_convertvector(patterns, Vector<uint32_t>) << 16);
#endif
}

inline Patterns narrow(Vector<float> vector, BFloat16) {  // lane by lane as store<BFloat16>
#if defined(__AVX512BF16__)                               // one instruction, which takes denormals for 0
  return (Patterns)_mm512_cvtneps_pbh((__m512)vector);
#elif defined(__AVX512BW__)  // the same with lane masks, in 7 instructions instead of 9
  const __m512i pattern = (__m512i)vector;
  const __mmask16 odd = _mm512_test_epi32_mask(pattern, _mm512_set1_epi32(0x10000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)vector, (__m512)vector, _CMP_UNORD_Q);
  __m512i sum = _mm512_add_epi32(pattern, _mm512_set1_epi32(0x7fff));
  sum = _mm512_mask_add_epi32(sum, odd, sum, _mm512_set1_epi32(1));
  sum = _mm512_mask_or_epi32(sum, is_nan, pattern, _mm512_set1_epi32(0x400000));
  return __builtin_convertvector((Vector<uint32_t>)sum >> 16, Patterns);
#elif defined(__AVX2__)
  const __m256i pattern = (__m256i)vector, one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(pattern, 16), one);
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(pattern, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_or_si256(pattern, _mm256_set1_epi32(0x400000));
  const __m256 is_nan = _mm256_cmp_ps((__m256)vector, (__m256)vector, _CMP_UNORD_Q);
  const __m256i upper = _mm256_srli_epi32((__m256i)_mm256_blendv_ps((__m256)sum, (__m256)nan, is_nan), 16);
  return (Patterns)_mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
#else
  const Vector<uint32_t> bits = (Vector<uint32_t>)vector;
  const Vector<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vector<uint32_t> nan = (bits >> 16) | 0x40u;
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return __builtin_convertvector(is_nan ? nan : rounded, Patterns);
#endif
}

inline Vector<float> widen(Patterns patterns, Half) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)patterns);
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)patterns);
#else
  Vector<float> vector;
  for (int i = 0; i < kLanes<float>; ++i) vector[i] = load(Half{patterns[i]});
  return vector;
#endif
}

inline Patterns narrow(Vector<float> vector, Half) {
#if defined(__AVX512F__)
  return (Patterns)_mm512_maskz_cvtps_ph(0xffff, (__m512)vector, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Patterns)_mm256_cvtps_ph((__m256)vector, _MM_FROUND_TO_NEAREST_INT);
#else
  Patterns patterns;
  for (int i = 0; i < kLanes<float>; ++i) patterns[i] = store<Half>(vector[i]).bits;
  return patterns;
#endif
}

inline Patterns load_first_patterns(const void* from, int64_t count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (Patterns)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), from);
#else
  Patterns patterns = {};
  memcpy(&patterns, from, count * sizeof(uint16_t));
  return patterns;
#endif
}

inline void store_first_patterns(void* to, int64_t count, Patterns patterns) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  _mm256_mask_storeu_epi16(to, __mmask16((1u << count) - 1), (__m256i)patterns);
#else
  memcpy(to, &patterns, count * sizeof(uint16_t));
#endif
}

template <class A, class T>
inline Vector<A> load_as(const T* from) {
  if constexpr (std::is_same_v<A, T>) return load_vector(from);
  if constexpr (!std::is_same_v<A, T>) {
    Patterns patterns;
    memcpy(&patterns, from, sizeof patterns);
    return widen(patterns, T{});
  }
}

template <class A, class T>
inline void store_as(T* to, Vector<A> vector) {
  if constexpr (std::is_same_v<A, T>) return store_vector(to, vector);
  if constexpr (!std::is_same_v<A, T>) {
    const Patterns patterns = narrow(vector, T{});
    memcpy(to, &patterns, sizeof patterns);
  }
}

// What a store as T followed by a load would leave of the vector.
template <class T, class A>
inline Vector<A> rounded(Vector<A> vector) {
  if constexpr (std::is_same_v<A, T>) return vector;
  if constexpr (!std::is_same_v<A, T>) return widen(narrow(vector, T{}), T{});
}

inline void stream_vector(void* to, Vector<float> vector) {
#if defined(__AVX512F__)
  _mm512_stream_ps((float*)to, (__m512)vector);
#elif defined(__AVX2__)
  _mm256_stream_ps((float*)to, (__m256)vector);
#elif defined(__SSE2__)
  _mm_stream_ps((float*)to, (__m128)vector);
#else
  memcpy(to, &vector, sizeof vector);
#endif
}

// The lanes of the first, then those of the second: LANE = 0, 1, 2 ...
template <int... LANE>
inline Vector<float> beside(Patterns first, Patterns second, std::integer_sequence<int, LANE...>) {
  return (Vector<float>)__builtin_shufflevector(first, second, LANE...);
}

// The patterns of two vectors, one after the other.
template <class T>
inline Vector<float> narrow_two(Vector<float> first, Vector<float> second, T type) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    return (Vector<float>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
#endif
  return beside(narrow(first, type), narrow(second, type), std::make_integer_sequence<int, 2 * kLanes<float>>{});
}

// Two vectors, as store_as, past the caches: a result that is too large to stay there is not read into them first.
// Two, so that 16-bit numbers fill a whole line, too. `to` is aligned to kVectorBytes; write_streams() must follow
// before another thread reads.
template <class A, class T>
inline void stream_two(T* to, Vector<A> first, Vector<A> second) {
  if constexpr (std::is_same_v<A, T>) {
    stream_vector(to, (Vector<float>)first);
    stream_vector(to + kLanes<A>, (Vector<float>)second);
  } else {
    stream_vector(to, narrow_two(first, second, T{}));
  }
}

inline void write_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class A, class T>
inline Vector<A> load_first_as(const T* from, int64_t count) {
  if constexpr (std::is_same_v<A, T>) return load_first(from, count);
  if constexpr (!std::is_same_v<A, T>) {
    return widen(load_first_patterns(from, count), T{});
  }
}

template <class A, class T>
inline void store_first_as(T* to, int64_t count, Vector<A> vector) {
  if constexpr (std::is_same_v<A, T>) return store_first(to, count, vector);
  if constexpr (!std::is_same_v<A, T>) {
    store_first_patterns(to, count, narrow(vector, T{}));
  }
}

// All lanes or the first `count` <= kLanes<A> of them.
template <class A, class T>
inline Vector<A> load_as(const T* from, int64_t count) {
  return count < kLanes<A> ? load_first_as<A>(from, count) : load_as<A>(from);
}

template <class A, class T>
inline void store_as(T* to, int64_t count, Vector<A> vector) {
  count < kLanes<A> ? store_first_as<A>(to, count, vector) : store_as<A>(to, vector);
}

// to[i] = from[i] for i < count, from a storage type into the type that sums are made in, or back.
template <class From, class To>
inline void convert_row(const From* from, int64_t count, To* to) {
  using A = Accumulate<From>;
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int64_t left = std::min<int64_t>(kLanes<A>, count - i);
    store_as<A>(to + i, left, load_as<A>(from + i, left));
  }
}

// A row in the type that sums are made in: itself, or converted into the buffer.
template <class T>
inline const Accumulate<T>* as_sums(const T* row, int64_t count, Accumulate<T>* buffer) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) return row;
  convert_row(row, count, buffer);
  return buffer;
}

// a / b, to an ulp where 1 / b is a normal number. A processor makes one division of 16 floats in 16 cycles or so; what
// takes its place here, 1 / b to 14 bits and two steps of Newton's, is made every 4.
template <class T>
inline Vector<T> quotient(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    Vector<T> reciprocal = (Vector<T>)_mm512_maskz_rcp14_ps(0xffff, (__m512)b);
    reciprocal += reciprocal * (T(1) - b * reciprocal);
    const Vector<T> close = a * reciprocal;
    return close + reciprocal * (a - b * close);
  }
#endif
  return a / b;
}

// ---- sums ------------------------------------------------------------------------------------------

// Lane i takes what lane i ^ DISTANCE has.
template <int DISTANCE, class V, int... LANE>
inline V exchange_lanes(V vector, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(vector, vector, (LANE ^ DISTANCE)...);
}

// The sum of a vector's lanes, halves added to halves.
template <class T, int LANES = kLanes<T>>
inline T sum_of_lanes(Vector<T> vector) {
  if constexpr (LANES == 1) {
    return vector[0];
  } else {
    using AllLanes = std::make_integer_sequence<int, kLanes<T>>;
    return sum_of_lanes<T, LANES / 2>(vector + exchange_lanes<LANES / 2>(vector, AllLanes{}));
  }
}

template <class T, class V, int... LANE>
inline Vector<T> two_halves(V first, V second, std::integer_sequence<int, LANE...>) {
  return (Vector<T>)__builtin_shufflevector(first, second, LANE...);
}

// Half a vector from `first`, the other half from `second`.
template <class T>
inline Vector<T> load_two_halves(const T* first, const T* second) {
  typedef T HalfVector __attribute__((vector_size(kVectorBytes / 2)));
  HalfVector halves[2];
  memcpy(&halves[0], first, sizeof halves[0]);
  memcpy(&halves[1], second, sizeof halves[1]);
  return two_halves<T>(halves[0], halves[1], std::make_integer_sequence<int, kLanes<T>>{});
}

template <class T>
inline Vector<T> swap_halves(Vector<T> vector) {
  return exchange_lanes<kLanes<T> / 2>(vector, std::make_integer_sequence<int, kLanes<T>>{});
}

// Lanes 0, 2, 4, ... of the first and then of the second vector; with FIRST = 1, lanes 1, 3, 5, ...
template <int FIRST, class V, int... LANE>
inline V every_second(V first, V second, std::integer_sequence<int, LANE...>) {
  return __builtin_shufflevector(first, second, (2 * LANE + FIRST)...);
}

// `rows` becomes its transpose: in stage `distance` = 1, 2, 4, ... rows that far apart swap the lanes that far apart.
template <class T, int... LANE>
inline void swap_lanes(Vector<T>& upper, Vector<T>& lower, auto distance, std::integer_sequence<int, LANE...>) {
  constexpr int D = distance, L = sizeof...(LANE);
  const Vector<T> a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, ((LANE & D) ? L + LANE - D : LANE)...);
  lower = __builtin_shufflevector(a, b, ((LANE & D) ? L + LANE : LANE + D)...);
}

template <class T, int DISTANCE = 1>
inline void transpose(Vector<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  if constexpr (DISTANCE < L) {
    for (int i = 0; i < L; ++i) {
      if (i & DISTANCE) continue;
      swap_lanes<T>(rows[i], rows[i + DISTANCE], std::integral_constant<int, DISTANCE>{},
                    std::make_integer_sequence<int, L>{});
    }
    transpose<T, 2 * DISTANCE>(rows);
  }
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
  explicit Scratch(int64_t count) : bytes_(std::max<int64_t>(1, ceil_div(count * int64_t(sizeof(T)), kLine)) * kLine) {
    data_ = static_cast<T*>(bytes_ < kPooledBytes ? take_small_block(bytes_) : take_block(bytes_));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { bytes_ < kPooledBytes ? give_small_block(data_, bytes_) : give_block(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  static constexpr int64_t kLine = 64;
  const int64_t bytes_;
  T* data_;
};

}  // namespace dlkernels
