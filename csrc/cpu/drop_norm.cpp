// drop_norm on the CPU: rows in parallel, each normalised while it lies in cache.
//
// Who owns what: a task owns whole rows. A backward task owns a stretch of rows and one row of partial sums for the
// parameters' gradients; the number of stretches follows from the shape alone, and the partial rows are added in order.
// Passes over memory: forward reads x once and writes y once; backward reads x and dy once and writes grad_x once. The
// further sweeps over a row (statistics, result) find it in cache.
#include "../drop_norm.h"

#include <cmath>

#include "../tensor.h"
#include "parallel.h"
#include "pool.h"
#include "simd.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kTaskElements = 1 << 15;  // some 5 us of work, below which a second thread does not pay
constexpr int64_t kSumBlock = 4096;         // features summed in float before their sum goes on in double
constexpr int64_t kMostStretches = 16;      // partial rows of the parameters' gradients
constexpr int64_t kRowBlock = 64;           // rows summed before their sum goes on: long sums are made of short ones

// ---- kernels: the features, as the loops want them ---------------------------------------------------

template <class A>
struct LaneMask;
template <>
struct LaneMask<float> {
  using type = int32_t;
};
template <>
struct LaneMask<double> {
  using type = int64_t;
};

// The parameters padded to whole vectors: scale = s*weight, shift = s*bias, both 0 where dropped; mask has all bits set
// where kept, none where dropped and in the padding.
template <class A>
struct Features {
  using Bits = typename LaneMask<A>::type;

  int64_t M, kept;
  A s;
  Scratch<A> scale, shift;
  Scratch<Bits> mask;

  static int64_t padded(int64_t M) { return ceil_div(M, kLanes<A>) * kLanes<A>; }

  template <class T, class P>
  Features(const DropNormShape& shape, const DropNormInput<T, P>& in)
      : M(shape.M), kept(shape.M), s(1), scale(padded(M)), shift(padded(M)), mask(padded(M)) {
    if (in.keep != nullptr) {
      kept = 0;
      for (int64_t i = 0; i < M; ++i) kept += in.keep[i];
      if (shape.rescale && kept > 0) s = A(double(M) / double(kept));
    }
    for (int64_t i = 0; i < M; ++i) mask.data()[i] = in.keep == nullptr || in.keep[i] ? -1 : 0;
    for (int64_t i = 0; i < M; ++i) {
      scale.data()[i] = mask.data()[i] ? (in.weight == nullptr ? s : s * A(load(in.weight[i]))) : A(0);
    }
    for (int64_t i = 0; i < M; ++i)
      shift.data()[i] = mask.data()[i] && in.bias != nullptr ? s * A(load(in.bias[i])) : 0;
    std::fill(mask.data() + M, mask.data() + padded(M), 0);
    std::fill(scale.data() + M, scale.data() + padded(M), A(0));
    std::fill(shift.data() + M, shift.data() + padded(M), A(0));
  }

  // x[i] where feature i is kept, else 0: dropped features may be NaN
  Vector<A> keep_only(Vector<A> x, int64_t i) const {
    return (Vector<A>)((Vector<Bits>)x & load_vector(mask.data() + i));
  }
};

// A whole vector of features: straight from memory; where nothing is dropped there is nothing to mask.
template <bool DROPS, class A>
struct Whole {
  const Features<A>& features;
  Vector<A> load(const A* row, int64_t i) const { return load_vector(row + i); }
  void store(A* row, int64_t i, Vector<A> value) const { store_vector(row + i, value); }
  Vector<A> kept(Vector<A> x, int64_t i) const {
    if constexpr (DROPS) return features.keep_only(x, i);
    return x;
  }
};

// The vector that the row ends in: filled up with zeros, and masked.
template <class A>
struct Tail {
  const Features<A>& features;
  Vector<A> load(const A* row, int64_t i) const { return load_first(row + i, features.M - i); }
  void store(A* row, int64_t i, Vector<A> value) const { store_first(row + i, features.M - i, value); }
  Vector<A> kept(Vector<A> x, int64_t i) const { return features.keep_only(x, i); }
};

// ---- kernels: one row in the type that sums are made in -----------------------------------------------

// Calls run(i, at) for every vector of a row, `at` being how to reach it.
template <bool DROPS, class A, class Run>
inline void for_each_vector(const Features<A>& features, const Run& run) {
  const int64_t whole = features.M / kLanes<A> * kLanes<A>;
  for (int64_t i = 0; i < whole; i += kLanes<A>) run(i, Whole<DROPS, A>{features});
  if (whole < features.M) run(whole, Tail<A>{features});
}

// Two sums over a row: calls term(i, at, first, second) to add vector i to both; in A for kSumBlock features, then in
// double, so that long rows lose nothing.
template <bool DROPS, class A, class Term>
inline void sum_twice(const Features<A>& features, const Term& term, double& first, double& second) {
  constexpr int kChains = 4;  // sums that do not wait for each other
  constexpr int64_t L = kLanes<A>;
  static_assert(kSumBlock % (kChains * L) == 0);
  const int64_t whole = features.M / L * L;
  first = second = 0;
  for (int64_t begin = 0; begin < features.M; begin += kSumBlock) {
    const int64_t end = std::min(whole, begin + kSumBlock);
    Vector<A> a[kChains] = {}, b[kChains] = {};
    int64_t i = begin;
    for (; i + kChains * L <= end; i += kChains * L) {
      for (int chain = 0; chain < kChains; ++chain) term(i + chain * L, Whole<DROPS, A>{features}, a[chain], b[chain]);
    }
    for (; i < end; i += L) term(i, Whole<DROPS, A>{features}, a[0], b[0]);
    if (end == whole && whole < features.M && features.M - begin <= kSumBlock) {
      term(whole, Tail<A>{features}, a[1], b[1]);
    }
    first += sum_of_lanes<A>((a[0] + a[1]) + (a[2] + a[3]));
    second += sum_of_lanes<A>((b[0] + b[1]) + (b[2] + b[3]));
  }
}

template <class A>
struct Statistics {
  A mean, rstd;
};

// Where squares overflow A (rows of 1e30), or a row is not finite: the definition, in double.
template <class A>
Statistics<A> statistics_in_double(const A* x, const Features<A>& features, double eps) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < features.M; ++i) sum += features.mask.data()[i] ? double(x[i]) : 0.0;
  const double mean = sum / features.kept;
  for (int64_t i = 0; i < features.M; ++i) {
    const double distance = features.mask.data()[i] ? x[i] - mean : 0.0;
    squares += distance * distance;
  }
  return {A(mean), A(1 / std::sqrt(squares / features.kept + eps))};
}

// mean = sum x / K;  var = sum (x - mean)^2 / K, with what rounding left of sum (x - mean) taken out of both
template <bool DROPS, class A>
Statistics<A> statistics(const A* x, const Features<A>& features, double eps) {
  const double per_kept = 1.0 / features.kept;
  double sum, unused, rest, squares;
  sum_twice<DROPS>(
      features, [&](int64_t i, const auto& at, Vector<A>& a, Vector<A>&) { a += at.kept(at.load(x, i), i); }, sum,
      unused);
  const A mean = A(sum * per_kept);
  sum_twice<DROPS>(
      features,
      [&](int64_t i, const auto& at, Vector<A>& a, Vector<A>& b) {
        const Vector<A> distance = at.kept(at.load(x, i) - mean, i);
        a += distance;
        b += distance * distance;
      },
      rest, squares);
  rest *= per_kept;
  const double variance = squares * per_kept - rest * rest;
  if (!std::isfinite(variance)) return statistics_in_double(x, features, eps);
  return {A(mean + rest), A(1 / std::sqrt(std::max(variance, 0.0) + eps))};
}

// y[i] = (x[i] - mean) * rstd * scale[i] + shift[i]
template <bool DROPS, class A>
void normalise(const A* x, const Features<A>& features, const Statistics<A>& of, A* y) {
  for_each_vector<DROPS>(features, [&](int64_t i, const auto& at) {
    const Vector<A> h = (at.load(x, i) - of.mean) * of.rstd;
    const Vector<A> value = h * load_vector(features.scale.data() + i) + load_vector(features.shift.data() + i);
    at.store(y, i, at.kept(value, i));
  });
}

// The row's two sums for grad_x, sum g and sum g*h with g = scale*dy; adds dy*h and dy to the partial sums on the way.
template <bool DROPS, class A>
void sum_gradients(const A* x, const A* dy, const Features<A>& features, const Statistics<A>& of, A* weight_sums,
                   A* bias_sums, double& sum_g, double& sum_gh) {
  sum_twice<DROPS>(
      features,
      [&](int64_t i, const auto& at, Vector<A>& a, Vector<A>& b) {
        const Vector<A> h = at.kept((at.load(x, i) - of.mean) * of.rstd, i);
        const Vector<A> d = at.kept(at.load(dy, i), i);
        const Vector<A> g = d * load_vector(features.scale.data() + i);
        a += g;
        b += g * h;
        store_vector(weight_sums + i, load_vector(weight_sums + i) + d * h);
        store_vector(bias_sums + i, load_vector(bias_sums + i) + d);
      },
      sum_g, sum_gh);
}

// grad_x[i] = rstd * (g[i] - mean_g - h[i] * mean_gh), 0 where dropped
template <bool DROPS, class A>
void grad_of_row(const A* x, const A* dy, const Features<A>& features, const Statistics<A>& of, A mean_g, A mean_gh,
                 A* grad_x) {
  for_each_vector<DROPS>(features, [&](int64_t i, const auto& at) {
    const Vector<A> h = (at.load(x, i) - of.mean) * of.rstd;
    const Vector<A> g = at.load(dy, i) * load_vector(features.scale.data() + i);
    at.store(grad_x, i, at.kept((g - mean_g - h * mean_gh) * of.rstd, i));
  });
}

// ---- kernels: 16-bit rows go through a row of float ------------------------------------------------

template <class T>
const Accumulate<T>* as_sums(const T* row, int64_t M, Accumulate<T>* buffer) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    return row;
  } else {
    for (int64_t i = 0; i < M; ++i) buffer[i] = load(row[i]);
    return buffer;
  }
}

// Where a row's results are computed: in place, or in the buffer that `finish` then rounds.
template <class T>
Accumulate<T>* result_row(T* row, Accumulate<T>* buffer) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) return row;
  return buffer;
}

template <class T>
void finish(T* row, int64_t M, const Accumulate<T>* buffer) {
  if constexpr (!std::is_same_v<T, Accumulate<T>>) {
    for (int64_t i = 0; i < M; ++i) row[i] = store<T>(buffer[i]);
  }
}

template <class T>
int64_t buffer_size(int64_t M) {
  return std::is_same_v<T, Accumulate<T>> ? 0 : M;
}

// ---- launchers -----------------------------------------------------------------------------------

int64_t rows_of_task(int64_t M) { return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, M)); }

// Adds the partial rows (stretches, padded) in order, times s.
template <class P, class A>
void sum_stretches(const A* partial, int64_t stretches, int64_t padded, int64_t M, A s, P* sums) {
  if (sums == nullptr) return;
  parallel_for(M, kTaskElements / stretches, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A sum = 0;
      for (int64_t stretch = 0; stretch < stretches; ++stretch) sum += partial[stretch * padded + i];
      sums[i] = store<P>(sum * s);
    }
  });
}

// Calls run(std::true_type) or run(std::false_type).
template <class Run>
void with_bool(bool value, const Run& run) {
  value ? run(std::true_type{}) : run(std::false_type{});
}

struct CpuDropNorm : CpuKernels {
  using CpuKernels::CpuKernels;

  template <class T, class P, class A>
  void forward(const DropNormShape& shape, const DropNormInput<T, P>& in, T* output, A* mean, A* rstd) const {
    const Features<A> features(shape, in);
    with_bool(in.keep != nullptr, [&](auto drops) {
      parallel_for(shape.N, rows_of_task(shape.M), [&](int64_t begin, int64_t end) {
        Scratch<A> buffer(buffer_size<T>(shape.M));
        for (int64_t n = begin; n < end; ++n) {
          T* y = output + n * shape.M;
          const A* x = as_sums(in.input + n * in.row_stride, shape.M, buffer.data());
          Statistics<A> of{0, 0};
          if (features.kept > 0) of = statistics<drops>(x, features, shape.eps);
          normalise<drops>(x, features, of, result_row(y, buffer.data()));
          finish(y, shape.M, buffer.data());
          mean[n] = of.mean;
          rstd[n] = of.rstd;
        }
      });
    });
  }

  // grad_input, grad_weight and grad_bias may be null: not wanted. allocate(count) is a tensor of A.
  template <class T, class P, class A, class Allocate>
  void backward(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* grad, int64_t grad_row_stride,
                const A* mean, const A* rstd, T* grad_input, P* grad_weight, P* grad_bias,
                const Allocate& allocate) const {
    const Features<A> features(shape, in);
    const int64_t N = shape.N, M = shape.M, padded = Features<A>::padded(M);
    const int64_t stretches = std::clamp<int64_t>(std::min(N, N * M / kTaskElements), 1, kMostStretches);
    const auto sums = allocate(2 * stretches * padded);
    A* weight_sums = (A*)sums.mutable_data_ptr();
    A* bias_sums = weight_sums + stretches * padded;
    const A per_kept = A(1.0 / std::max<int64_t>(1, features.kept));
    with_bool(in.keep != nullptr, [&](auto drops) {
      parallel_for(stretches, 1, [&](int64_t begin, int64_t end) {
        Scratch<A> x_buffer(buffer_size<T>(M)), dy_buffer(buffer_size<T>(M)), block_sums(2 * padded);
        A* weight_block = block_sums.data();
        A* bias_block = weight_block + padded;
        const auto grad_of = [&](int64_t n) {
          const A* x = as_sums(in.input + n * in.row_stride, M, x_buffer.data());
          const A* dy = as_sums(grad + n * grad_row_stride, M, dy_buffer.data());
          const Statistics<A> of{mean[n], rstd[n]};
          double sum_g, sum_gh;
          sum_gradients<drops>(x, dy, features, of, weight_block, bias_block, sum_g, sum_gh);
          if (grad_input == nullptr) return;
          T* grad_x = grad_input + n * M;
          grad_of_row<drops>(x, dy, features, of, A(sum_g) * per_kept, A(sum_gh) * per_kept,
                             result_row(grad_x, x_buffer.data()));
          finish(grad_x, M, x_buffer.data());
        };
        for (int64_t stretch = begin; stretch < end; ++stretch) {
          A* weight_row = weight_sums + stretch * padded;
          A* bias_row = bias_sums + stretch * padded;
          std::fill_n(weight_row, padded, A(0));
          std::fill_n(bias_row, padded, A(0));
          const int64_t last = N * (stretch + 1) / stretches;
          for (int64_t n = N * stretch / stretches; n < last;) {
            std::fill_n(weight_block, 2 * padded, A(0));
            for (const int64_t stop = std::min(last, n + kRowBlock); n < stop; ++n) grad_of(n);
            for (int64_t i = 0; i < padded; ++i) weight_row[i] += weight_block[i];
            for (int64_t i = 0; i < padded; ++i) bias_row[i] += bias_block[i];
          }
        }
      });
    });
    sum_stretches(weight_sums, stretches, padded, M, features.s, grad_weight);
    sum_stretches(bias_sums, stretches, padded, M, features.s, grad_bias);
  }

  // Counts keys by their upper bits, so that only the keys of one bin need sorting out.
  void select(int64_t M, int64_t dropped, const int64_t* keys, bool* keep) const {
    constexpr int kShift = 56, kBins = 256;
    const auto bin_of = [&](int64_t i) { return (uint64_t(keys[i]) ^ (uint64_t(1) << 63)) >> kShift; };
    int64_t counts[kBins] = {};
    for (int64_t i = 0; i < M; ++i) ++counts[bin_of(i)];
    uint64_t bin = 0;
    int64_t below = 0;
    while (bin < kBins - 1 && below + counts[bin] < dropped) below += counts[bin++];
    std::vector<int64_t> candidates;
    candidates.reserve(counts[bin]);
    for (int64_t i = 0; i < M; ++i) {
      const uint64_t own = bin_of(i);
      keep[i] = own >= bin;
      if (own == bin) candidates.push_back(i);
    }
    const auto smaller = [&](int64_t i, int64_t j) { return keys[i] < keys[j] || (keys[i] == keys[j] && i < j); };
    const auto cut = candidates.begin() + (dropped - below);
    if (cut != candidates.end()) std::nth_element(candidates.begin(), cut, candidates.end(), smaller);
    std::for_each(candidates.begin(), cut, [&](int64_t i) { keep[i] = false; });
  }
};

}  // namespace

// ---- registration --------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CPU, library) {
  using torch::stable::Tensor;
  library.impl("drop_mask", TORCH_BOX((&drop_mask<CpuDropNorm, Tensor>)));
  library.impl("drop_norm", TORCH_BOX((&drop_norm<CpuDropNorm, Tensor>)));
  library.impl("drop_norm_backward", TORCH_BOX((&drop_norm_backward<CpuDropNorm, Tensor>)));
}

}  // namespace dlkernels
