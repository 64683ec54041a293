// Shared by every operator on every device: checks, integer helpers, 16-bit storage types.
// Knows no operator and includes no torch header, so that kernels can be compiled alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#ifdef __CUDACC__
#define DLKERNELS_HOST_DEVICE __host__ __device__
#else
#define DLKERNELS_HOST_DEVICE
#endif

namespace dlkernels {

// ---- checks -------------------------------------------------------------------------------------

// Throws std::runtime_error (RuntimeError in Python) with the parts joined to one sentence.
template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// "[2, 3, 5]", as Python prints a list; made only when it is printed, since most checks hold.
template <class Sizes>
struct ListText {
  const Sizes& sizes;

  friend std::ostream& operator<<(std::ostream& stream, const ListText& text) {
    stream << '[';
    for (size_t i = 0; i < text.sizes.size(); ++i) stream << (i > 0 ? ", " : "") << text.sizes[i];
    return stream << ']';
  }
};

template <class Sizes>
ListText<Sizes> to_text(const Sizes& sizes) {
  return {sizes};
}

// `tensor` must have the dtype and the device of `input`; the error names both arguments.
template <class Tensor>
void check_like_input(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  check(tensor.scalar_type() == input.scalar_type(), op, ": ", name, " must have the dtype of input (",
        input.scalar_type(), "), got ", tensor.scalar_type());
  check(tensor.device() == input.device(), op, ": ", name, " must be on the device of input, got another device");
}

// ---- tensors: defined in tensor.h, declared here so that contracts can be written without torch ----

using Ints = std::vector<int64_t>;

// The tensor itself where it is contiguous, else a contiguous copy.
template <class Tensor>
Tensor to_contiguous(const Tensor& tensor);

template <class Tensor>
std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(to_contiguous(*tensor)) : std::nullopt;
}

template <class T, class Tensor>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? (const T*)tensor->const_data_ptr() : nullptr;
}

// Whether the tensor's dtype is stored as T: double, float, BFloat16, Half, int64_t, int32_t or bool.
template <class T, class Tensor>
bool has_type(const Tensor& tensor);

// An uninitialised contiguous tensor of T on input's device.
template <class T, class Tensor>
Tensor empty_of(const Tensor& input, const Ints& sizes);

// An uninitialised tensor with input's dtype and device.
template <class Tensor>
Tensor empty_strided(const Tensor& input, const Ints& sizes, const Ints& strides);

inline Ints contiguous_strides(const Ints& sizes) {
  Ints strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= sizes[dim] > 1 ? sizes[dim] : 1;
  }
  return strides;
}

// Calls run(T{}) with the storage type T of the tensor's dtype: double, float, BFloat16 or Half; others are an error.
template <class Tensor, class Run>
void for_floating_type(const char* op, const Tensor& input, const Run& run);

// ---- integers -----------------------------------------------------------------------------------

DLKERNELS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a / b rounded towards minus infinity, and its remainder in [0, b).
DLKERNELS_HOST_DEVICE constexpr int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
DLKERNELS_HOST_DEVICE constexpr int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

// ---- 16-bit storage: kernels read and write it, and compute in float ----------------------------

struct Half {
  uint16_t bits;  // 1 sign, 5 exponent, 10 mantissa
};

struct BFloat16 {
  uint16_t bits;  // 1 sign, 8 exponent, 7 mantissa: the upper half of a float
};

// The type a kernel sums in: float for everything but double.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateType<T>::type;

DLKERNELS_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DLKERNELS_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DLKERNELS_HOST_DEVICE inline double load(double value) { return value; }
DLKERNELS_HOST_DEVICE inline float load(float value) { return value; }
DLKERNELS_HOST_DEVICE inline float load(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

// Rebase the exponent from bias 15 to bias 127. A denormal half is m * 2^-24: put m below a leading one at 2^-14 and
// subtract that one again, so that no denormal float occurs on the way (kernels may run with those flushed to zero).
DLKERNELS_HOST_DEVICE inline float load(Half value) {
#ifdef __CUDA_ARCH__  // has an instruction for it
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = value.bits & 0x7c00u;
  const uint32_t normal = magnitude + ((exponent == 0x7c00u ? 255u - 31u : 127u - 15u) << 23);
  const float denormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
  return float_of(sign | (exponent == 0 ? bits_of(denormal) : normal));
#endif
}

template <class T>
DLKERNELS_HOST_DEVICE inline T store(Accumulate<T> value) {
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
DLKERNELS_HOST_DEVICE inline BFloat16 store<BFloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // have an instruction for it
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(nan ? (bits >> 16) | 0x40u : rounded)};
#endif
}

// Round to nearest, ties to even; beyond 65520 becomes infinity; below 2^-14 the sum with 0.5 rounds to steps of 2^-24,
// which are the denormal halves.
template <>
DLKERNELS_HOST_DEVICE inline Half store<Half>(float value) {
#ifdef __CUDA_ARCH__
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t bits = bits_of(value) & 0x7fffffffu;
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const uint32_t denormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = bits < (113u << 23) ? denormal : normal;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {uint16_t(sign | (bits >= 0x47800000u ? special : finite))};
#endif
}

}  // namespace dlkernels
