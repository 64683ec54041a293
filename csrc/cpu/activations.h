// Sigmoid and tanh of whole vectors, to a few units in the last place.
//
// Both come from e^y - 1: with k = round(y / ln 2) and r = y - k ln 2, |r| <= ln(2)/2,
//   e^y - 1 = 2^k p(r) + (2^k - 1),     p(r) = e^r - 1 ~ r + r^2 (c_0 + c_1 r + ...).
// p keeps its digits where r is small, and for y >= 0 nothing cancels:
//   tanh(x)    = sign(x) * e / (e + 2)   with e = exp(2|x|) - 1
//   sigmoid(x) = 1 / (1 + exp(-x))
#pragma once

#include "simd.h"

namespace dlkernels {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr Bits kBias = 127, kSign = INT32_MIN;
  static constexpr float kLog2e = 0x1.715476p+0f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // k * high is exact
  static constexpr float kRound = 0x1.8p+23f;  // adding it rounds to integers, in the low bits of the sum
  static constexpr float kLargest = 88.0f;     // exp of it and of its negative are floats
  static constexpr float kTanhIsOne = 10.0f;   // from here on tanh rounds to 1
  // minimax, relative error of p 1.4e-8
  static constexpr float kPolynomial[] = {0.49999998f, 0.16666539f, 0.041667219f, 0.0083671778f, 0.0013882558f};
};

template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kBias = 1023, kSign = INT64_MIN;
  static constexpr double kLog2e = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kRound = 0x1.8p+52;
  static constexpr double kLargest = 708.0;
  static constexpr double kTanhIsOne = 20.0;
  // minimax, relative error of p 2.0e-17
  static constexpr double kPolynomial[] = {
      0.50000000000000057475,   0.16666666666666578305,    0.041666666666569186571,    0.0083333333333955021014,
      0.0013888888934197665974, 0.00019841269709070550624, 0.000024801501952076517653, 2.7557413107815407942e-6,
      2.7627411665421915708e-7, 2.5053224302742548608e-8};
};

// e^y = scale * (1 + p), |y| <= kLargest; p is NaN where y is.
template <class T>
inline void exp_parts(Vector<T> y, Vector<T>& p, Vector<T>& scale) {
  using C = ExpConstants<T>;
  using Bits = Vector<typename C::Bits>;
  const Vector<T> shifted = y * C::kLog2e + C::kRound;
  const Vector<T> k = shifted - C::kRound;
  const Vector<T> r = y - k * C::kLn2High - k * C::kLn2Low;
  constexpr int kTerms = sizeof C::kPolynomial / sizeof(T);
  Vector<T> q = Vector<T>{} + C::kPolynomial[kTerms - 1];
  for (int i = kTerms - 2; i >= 0; --i) q = q * r + C::kPolynomial[i];
  p = q * (r * r) + r;
  const Bits whole = (Bits)shifted - (Bits)(Vector<T>{} + C::kRound);
  scale = (Vector<T>)((whole + C::kBias) << C::kMantissa);
}

template <class T>
inline Vector<T> sigmoid(Vector<T> x) {
  using C = ExpConstants<T>;
  const Vector<T> limit = Vector<T>{} + C::kLargest;
  Vector<T> y = -x;
  y = y > limit ? limit : y;  // NaN compares false and stays
  y = y < -limit ? -limit : y;
  Vector<T> p, scale;
  exp_parts<T>(y, p, scale);
  return quotient<T>(Vector<T>{} + T(1), T(1) + (scale * p + scale));
}

template <class T>
inline Vector<T> tanh(Vector<T> x) {
  using C = ExpConstants<T>;
  using Bits = Vector<typename C::Bits>;
  const Vector<T> limit = Vector<T>{} + C::kTanhIsOne;
  const Bits sign = (Bits)x & C::kSign;
  Vector<T> y = (Vector<T>)((Bits)x ^ sign);
  y = y > limit ? limit : y;
  Vector<T> p, scale;
  exp_parts<T>(y + y, p, scale);
  const Vector<T> e = scale * p + (scale - T(1));
  return (Vector<T>)((Bits)quotient<T>(e, e + T(2)) | sign);
}

}  // namespace dlkernels
