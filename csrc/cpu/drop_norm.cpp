// drop_norm on the CPU: rows in parallel, each normalised while it lies in cache.
//
// Who owns what: a task owns whole rows. A backward task owns a stretch of rows and one row of partial sums for the
// parameters' gradients; the number of stretches follows from the shape alone, and the partial rows are added in order.
// Passes over memory: forward reads x once and writes y once; backward reads x and dy once and writes grad_x once. The
// further sweeps over a row (statistics, result) find it in cache.
#include "../drop_norm.h"

#include <array>
#include <cmath>

#include "../tensor.h"
#include "parallel.h"
#include "pool.h"
#include "simd.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int64_t kTaskElements = 1 << 14;       // some 5 us of work, below which a second thread does not pay
constexpr int64_t kTaskParameters = 1 << 16;     // ... that are only read once and written
constexpr int64_t kSumBlock = 1024;              // features summed in float before their sum goes on in double
constexpr int64_t kPrefixBlock = 64;             // a row's prefix is a multiple of so many features
constexpr int64_t kPrefixKept = 16;              // ... of which at least so many are kept, where a row has them
constexpr int64_t kMostStretches = 16;           // partial rows of the parameters' gradients
constexpr int kGroupRows = 8;                    // rows whose share of a parameter's gradient is summed in a register
constexpr int64_t kGroupElements = 1 << 12;      // of rows normalised together: they stay in the first cache
constexpr int64_t kGradGroupElements = 1 << 15;  // of rows of a group, backward, which stay in the second cache
constexpr int64_t kStreamBytes = 8 << 20;        // of a result that, with what it is made of, leaves the last cache
constexpr int64_t kBlockRows = 64;  // rows summed before their sum goes on: long sums are made of short ones

// ---- kernels: the features, as the loops want them ---------------------------------------------------

// mask has all bits set where kept, none where dropped and behind the last feature, and exists only where a feature may
// be dropped. The first `prefix` features are those that a row's shift is made of. scale, once it has been made, is
// s*weight (M), 0 where dropped.
template <class A>
struct Features {
  int64_t M, kept, prefix, kept_in_prefix;
  A s = 1;
  const A* scale = nullptr;
  const int8_t* mask = nullptr;

  template <class T, class P>
  Features(const DropNormShape& shape, const DropNormInput<T, P>& in) : M(shape.M), kept(M) {
    if (in.keep != nullptr) {
      mask = own_mask_.emplace(M + kLanes<A>).data();
      kept = make_mask(in.keep, M, own_mask_->data());
      if (shape.rescale && kept > 0) s = A(double(M) / double(kept));
    }
    prefix = kept_in_prefix = 0;
    while (prefix < M && kept_in_prefix < std::min(kept, kPrefixKept)) {
      const int64_t end = std::min(M, prefix + kPrefixBlock);
      kept_in_prefix += mask == nullptr ? end - prefix : count_set(mask + prefix, end - prefix);
      prefix = end;
    }
  }

  template <class P>
  void make_scale(const P* weight) {
    scale = times_s(weight, A(1), own_scale_);
  }

  // result[i] = s * parameter[i], 0 where dropped, in `own`; the parameter itself where there is nothing to do.
  template <class P>
  const A* times_s(const P* parameter, A otherwise, std::optional<Scratch<A>>& own) const {
    if constexpr (std::is_same_v<P, A>) {
      if (parameter != nullptr && mask == nullptr) return parameter;
    }
    A* result = own.emplace(M).data();
    parallel_for(M, kTaskParameters, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kLanes<A>) {
        const int64_t count = std::min<int64_t>(kLanes<A>, end - i);
        Vector<A> value = Vector<A>{} + otherwise;
        if (parameter != nullptr) value = load_as<A>(parameter + i, count);
        value = value * s;
        if (mask != nullptr) value = where<A>(load_mask<A>(mask + i), value);
        store_as<A>(result + i, count, value);
      }
    });
    return result;
  }

 private:
  // How many of `count` <= 2^31 bytes, each 0 or -1, are -1.
  static int64_t count_set(const int8_t* bytes, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum -= bytes[i];
    return sum;
  }

  // Fills the mask; how many features are kept.
  static int64_t make_mask(const bool* keep, int64_t M, int8_t* mask) {
    for (int64_t i = 0; i < M; ++i) mask[i] = -int8_t(keep[i]);
    std::fill_n(mask + M, kLanes<A>, int8_t(0));
    return count_set(mask, M);
  }

  std::optional<Scratch<int8_t>> own_mask_;
  std::optional<Scratch<A>> own_scale_;
};

// How to reach a vector of features. Whole: straight from memory, in vectors of A whatever the memory holds; where
// nothing is dropped there is nothing to mask.
template <bool DROPS, class A>
struct Whole {
  const int8_t* mask;  // not the features: a store could be to them, and the mask would be looked up for each vector
  explicit Whole(const Features<A>& features) : mask(features.mask) {}
  template <class T>
  Vector<A> load(const T* row, int64_t i) const {
    return load_as<A>(row + i);
  }
  template <class T>
  void store(T* row, int64_t i, Vector<A> value) const {
    store_as<A>(row + i, value);
  }
  Vector<A> kept(Vector<A> x, int64_t i) const {
    if constexpr (DROPS) return where<A>(load_mask<A>(mask + i), x);
    return x;
  }
};

// The vector that the row ends in: filled up with zeros, and masked.
template <bool DROPS, class A>
struct Tail {
  const Features<A>& features;
  int64_t count;
  template <class T>
  Vector<A> load(const T* row, int64_t i) const {
    return load_first_as<A>(row + i, count);
  }
  template <class T>
  void store(T* row, int64_t i, Vector<A> value) const {
    store_first_as<A>(row + i, count, value);
  }
  Vector<A> kept(Vector<A> x, int64_t i) const {
    if constexpr (DROPS) return where<A>(load_mask<A>(features.mask + i), x);
    return where<A>(first_lanes<A>(count), x);
  }
};

// ---- kernels: a row ------------------------------------------------------------------------------------

// Calls run(i, at) for every vector of a row, from `begin` on, `at` being how to reach it.
template <bool DROPS, class A, class Run>
inline void for_each_vector(const Features<A>& features, int64_t begin, const Run& run) {
  const int64_t whole = features.M / kLanes<A> * kLanes<A>;
  for (int64_t i = begin; i < whole; i += kLanes<A>) run(i, Whole<DROPS, A>(features));
  if (whole < features.M) run(whole, Tail<DROPS, A>{features, features.M - whole});
}

// COUNT sums over the first `count` features of a row: calls term(i, at, sums) to add vector i to each of sums[COUNT];
// in A for kSumBlock features, then in double, so that long rows lose nothing.
template <bool DROPS, int COUNT, class A, class Term>
inline std::array<double, COUNT> sum(const Features<A>& features, int64_t count, const Term& term) {
  // Sums that do not wait for each other, as many as there are registers for.
  constexpr int kChains = COUNT < 4 ? 4 : 2;
  constexpr int64_t L = kLanes<A>;
  static_assert(kSumBlock % (kChains * L) == 0);
  const int64_t whole = count / L * L;
  std::array<double, COUNT> total = {};
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    const int64_t end = std::min(whole, begin + kSumBlock);
    Vector<A> sums[kChains][COUNT] = {};
    int64_t i = begin;
    for (; i + kChains * L <= end; i += kChains * L) {
      for (int chain = 0; chain < kChains; ++chain) term(i + chain * L, Whole<DROPS, A>(features), sums[chain]);
    }
    for (; i < end; i += L) term(i, Whole<DROPS, A>(features), sums[0]);
    if (end == whole && whole < count && count - begin <= kSumBlock) {
      term(whole, Tail<DROPS, A>{features, count - whole}, sums[1]);
    }
    for (int n = 0; n < COUNT; ++n) {
      Vector<A> all = sums[0][n];
      for (int chain = 1; chain < kChains; ++chain) all += sums[chain][n];
      total[n] += sum_of_lanes<A>(all);
    }
  }
  return total;
}

template <class T, class A>
struct Row {
  const T *x, *next_x;  // its features, and those of its next group's row in its place; null: they need not be fetched
  A mean = 0, rstd = 0;
};

// Where squares overflow A (rows of 1e30), or a row is not finite: the definition, in double.
template <class T, class A>
void statistics_in_double(Row<T, A>& row, const Features<A>& features, double eps) {
  const T* x = row.x;
  const auto kept = [&](int64_t i) { return features.mask == nullptr || features.mask[i] != 0; };
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < features.M; ++i) sum += kept(i) ? double(load(x[i])) : 0.0;
  const double mean = sum / features.kept;
  for (int64_t i = 0; i < features.M; ++i) {
    const double distance = kept(i) ? load(x[i]) - mean : 0.0;
    squares += distance * distance;
  }
  row.mean = A(mean);
  row.rstd = A(1 / std::sqrt(squares / features.kept + eps));
}

// The shift of each row's distances, in row.mean until the row's own is known: the mean of its prefix.
template <bool DROPS, class R, class A>
void begin_statistics(R* rows, int count, const Features<A>& features) {
  for (int n = 0; n < count; ++n) {
    const auto* x = rows[n].x;
    const auto [sum_x] = sum<DROPS, 1>(features, features.prefix, [&](int64_t i, const auto& at, Vector<A>* sums) {
      sums[0] += at.kept(at.load(x, i), i);
    });
    rows[n].mean = A(sum_x / std::max<int64_t>(1, features.kept_in_prefix));
  }
}

// mean = sum x / K;  var = sum (x - mean)^2 / K. From the distances d of all x from the shift:
//   mean = shift + sum d / K,   var = sum d^2 / K - (sum d / K)^2
// A row that goes on as it begins has its shift near its mean. In another the difference loses digits: where the shift
// is farther off than half the distances' root mean square, it becomes this mean (true), and the sums are made again.
template <class T, class A>
bool moved_shift(Row<T, A>& row, double mean_d, double mean_dd) {
  if (!(mean_d * mean_d > 0.25 * mean_dd)) return false;
  row.mean += A(mean_d);
  return true;
}

// False where squares overflow, or the row is not finite.
template <class T, class A>
bool end_statistics(Row<T, A>& row, double mean_d, double mean_dd, double eps) {
  const double variance = mean_dd - mean_d * mean_d;
  row.mean += A(mean_d);
  row.rstd = A(1 / std::sqrt(std::max(variance, 0.0) + eps));
  return std::isfinite(variance);
}

// sum d and sum d^2
template <bool DROPS, class T, class A>
std::array<double, 2> sums_of_distances(const Row<T, A>& row, const Features<A>& features) {
  return sum<DROPS, 2>(features, features.M, [x = row.x, shift = row.mean](int64_t i, const auto& at, auto* sums) {
    const Vector<A> d = at.kept(at.load(x, i) - shift, i);
    sums[0] += d;
    sums[1] += d * d;
  });
}

// Mean and rstd of each row of a group: step by step for all of them, so that one row's short sums need not wait for
// another's.
template <bool DROPS, class T, class A>
void statistics(Row<T, A>* rows, int count, const Features<A>& features, double eps) {
  if (features.kept == 0) return;
  const double per_kept = 1.0 / features.kept;
  std::array<double, 2> sums_of[kGroupRows];
  begin_statistics<DROPS>(rows, count, features);
  for (int n = 0; n < count; ++n) sums_of[n] = sums_of_distances<DROPS>(rows[n], features);
  for (int n = 0; n < count; ++n) {
    auto& [d, dd] = sums_of[n];
    if (moved_shift(rows[n], d * per_kept, dd * per_kept)) {
      sums_of[n] = sums_of_distances<DROPS>(rows[n], features);
    }
    if (!end_statistics(rows[n], d * per_kept, dd * per_kept, eps)) statistics_in_double(rows[n], features, eps);
  }
}

// y[i] = (x[i] - mean) * rstd * scale[i] + shift[i]
template <bool DROPS, class T, class A, class P>
void normalise(const Row<T, A> row, const Features<A>& features, const P* scale, const P* shift, T* y, bool stream) {
  const auto value = [row, scale, shift](int64_t i, const auto& at) {
    const Vector<A> h = (at.load(row.x, i) - row.mean) * row.rstd;
    return at.kept(h * at.load(scale, i) + at.load(shift, i), i);
  };
  constexpr int64_t L = kLanes<A>;
  const Whole<DROPS, A> whole(features);
  int64_t i = 0;
  for (; stream && i + 2 * L <= features.M; i += 2 * L) {
    __builtin_prefetch(row.next_x + i, 0, 2);
    if constexpr (sizeof(T) == sizeof(A)) __builtin_prefetch(row.next_x + i + L, 0, 2);
    stream_two<A>(y + i, value(i, whole), value(i + L, whole));
  }
  for_each_vector<DROPS>(features, i, [&](int64_t i, const auto& at) {
    if (row.next_x != nullptr) __builtin_prefetch(row.next_x + i, 0, 2);
    at.store(y, i, value(i, at));
  });
}

// ---- kernels: a group of rows, backward ----------------------------------------------------------------

// A row with its gradients, and what grad_x needs of the whole row.
template <class T, class A>
struct GradRow : Row<T, A> {
  const T* dy;
  const T* next_dy;
  T* grad_x;                  // null: not wanted
  A mean_g = 0, mean_gh = 0;  // sum g / K,  sum (g*h) / K
};

// mean_g and mean_gh by the definition, with g = scale*dy and h = (x - mean) * rstd: where their products overflow
// before they are multiplied by rstd.
template <bool DROPS, class T, class A>
void gradients_by_definition(GradRow<T, A>& row, const Features<A>& features) {
  const auto [g, gh] = sum<DROPS, 2>(features, features.M, [&](int64_t i, const auto& at, Vector<A>* sums) {
    const Vector<A> h = at.kept((at.load(row.x, i) - row.mean) * row.rstd, i);
    const Vector<A> g = at.kept(at.load(row.dy, i), i) * at.load(features.scale, i);
    sums[0] += g;
    sums[1] += g * h;
  });
  row.mean_g = A(g / features.kept);
  row.mean_gh = A(gh / features.kept);
}

// sum d, sum d^2, sum g and sum (g*d)
template <bool DROPS, class T, class A>
std::array<double, 4> sums_of_gradients(const GradRow<T, A> row, const Features<A>& features, bool fetch) {
  return sum<DROPS, 4>(features, features.M, [&](int64_t i, const auto& at, Vector<A>* sums) {
    const Vector<A> d = at.kept(at.load(row.x, i) - row.mean, i);
    const Vector<A> g = at.kept(at.load(row.dy, i), i) * at.load(features.scale, i);
    sums[0] += d;
    sums[1] += d * d;
    sums[2] += g;
    sums[3] += g * d;
    if (fetch) __builtin_prefetch(row.grad_x + i, 1);  // for grad_of_group, whose rows the processor cannot foresee
  });
}

// Mean and rstd of each row of a group, and in the same sweep, from the same distances d,
//   mean_g = sum g / K,   mean_gh = rstd * (sum (g*d) / K - (sum d / K) * mean_g)
template <bool DROPS, class T, class A>
void statistics_and_gradients(GradRow<T, A>* rows, int count, const Features<A>& features, double eps, bool fetch) {
  if (features.kept == 0) return;
  const double per_kept = 1.0 / features.kept;
  std::array<double, 4> sums_of[kGroupRows];
  begin_statistics<DROPS>(rows, count, features);
  for (int n = 0; n < count; ++n) sums_of[n] = sums_of_gradients<DROPS>(rows[n], features, fetch);
  for (int n = 0; n < count; ++n) {
    auto& [d, dd, g, gd] = sums_of[n];
    if (moved_shift(rows[n], d * per_kept, dd * per_kept)) {
      sums_of[n] = sums_of_gradients<DROPS>(rows[n], features, false);
    }
    const double mean_d = d * per_kept, mean_g = g * per_kept, product = gd * per_kept - mean_d * mean_g;
    const bool finite = end_statistics(rows[n], mean_d, dd * per_kept, eps);
    rows[n].mean_g = A(mean_g);
    rows[n].mean_gh = A(product * rows[n].rstd);
    if (!finite) statistics_in_double(rows[n], features, eps);
    if (!finite || !std::isfinite(product)) gradients_by_definition<DROPS>(rows[n], features);
  }
}

// Sums over rows, of the gradients of the parameters.
template <class A>
struct ParameterSums {
  A *weight, *bias;  // (M) each
  bool begun;        // whether there is something to add to; else it is overwritten
};

// For each row: grad_x[i] = rstd * (g[i] - mean g - h[i] * mean gh), 0 where dropped
//               sums.weight[i] += dy[i] * h[i],   sums.bias[i] += dy[i]
template <bool DROPS, int VECTORS, class T, class A, class At>
inline void grad_of_columns(const GradRow<T, A>* rows, int count, const Features<A>& features, int64_t i, const At& at,
                            const ParameterSums<A>& sums, bool stream) {
  constexpr int64_t L = kLanes<A>;
  Vector<A> weight_sum[VECTORS] = {}, bias_sum[VECTORS] = {}, scale[VECTORS];
  for (int v = 0; v < VECTORS; ++v) scale[v] = at.load(features.scale, i + v * L);
  for (int n = 0; n < count; ++n) {
    const GradRow<T, A> row = rows[n];
    Vector<A> grad_x[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t j = i + v * L;
      const Vector<A> h = (at.load(row.x, j) - row.mean) * row.rstd, dy = at.load(row.dy, j);
      if (stream) {
        __builtin_prefetch(row.next_x + j, 0, 2);
        __builtin_prefetch(row.next_dy + j, 0, 2);
      }
      weight_sum[v] += dy * h;
      bias_sum[v] += dy;
      if (row.grad_x == nullptr) continue;
      const Vector<A> grad_h = dy * scale[v] - (row.mean_g + h * row.mean_gh);
      grad_x[v] = at.kept(grad_h * row.rstd, j);
    }
    if (row.grad_x == nullptr) continue;
    if constexpr (VECTORS % 2 == 0) {
      for (int v = 0; stream && v < VECTORS; v += 2) stream_two<A>(row.grad_x + i + v * L, grad_x[v], grad_x[v + 1]);
      if (stream) continue;
    }
    for (int v = 0; v < VECTORS; ++v) at.store(row.grad_x, i + v * L, grad_x[v]);
  }
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t j = i + v * L;
    Vector<A> weight = at.kept(weight_sum[v], j), bias = at.kept(bias_sum[v], j);
    if (sums.begun) weight += at.load(sums.weight, j), bias += at.load(sums.bias, j);
    at.store(sums.weight, j, weight);
    at.store(sums.bias, j, bias);
  }
}

template <bool DROPS, class T, class A>
void grad_of_group(const GradRow<T, A>* rows, int count, const Features<A>& features, const ParameterSums<A>& sums,
                   bool stream) {
  constexpr int kWide = 4;  // vectors that share a row's numbers
  constexpr int64_t L = kLanes<A>;
  const int64_t M = features.M, whole = M / L * L;
  int64_t i = 0;
  for (; i + kWide * L <= whole; i += kWide * L) {
    grad_of_columns<DROPS, kWide>(rows, count, features, i, Whole<DROPS, A>(features), sums, stream);
  }
  for (; i < whole; i += L) {
    grad_of_columns<DROPS, 1>(rows, count, features, i, Whole<DROPS, A>(features), sums, stream);
  }
  if (i < M) {
    grad_of_columns<DROPS, 1>(rows, count, features, i, Tail<DROPS, A>{features, M - i}, sums, stream);
  }
}

// ---- launchers -----------------------------------------------------------------------------------

int64_t rows_of_group(int64_t elements, int64_t M) {
  return std::clamp<int64_t>(elements / std::max<int64_t>(1, M), 1, kGroupRows);
}

template <class T>
bool leaves_cache(const DropNormShape& shape) {
  return shape.N * shape.M * int64_t(sizeof(T)) >= kStreamBytes;
}

// Whether a result of the input's shape can be written past the caches: its rows are whole vectors.
template <class T>
bool is_in_vectors(const DropNormShape& shape, const T* result) {
  return shape.M * sizeof(T) % kVectorBytes == 0 && uintptr_t(result) % kVectorBytes == 0;
}

int64_t rows_of_task(int64_t M) { return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, M)); }

// output = the rows of `in`, normalised, times scale plus shift
template <bool DROPS, class T, class P, class A, class Q>
void normalise_rows(const DropNormShape& shape, const DropNormInput<T, P>& in, const Features<A>& features,
                    const Q* scale, const Q* shift, T* output) {
  const bool large = leaves_cache<T>(shape), stream = large && is_in_vectors(shape, output);
  parallel_for(shape.N, rows_of_task(shape.M), [&](int64_t begin, int64_t end) {
    const int64_t group = rows_of_group(kGroupElements, shape.M);
    for (int64_t n = begin; n < end; n += group) {
      Row<T, A> rows[kGroupRows];
      const int count = int(std::min(group, end - n));
      for (int i = 0; i < count; ++i) {
        rows[i].x = in.input + (n + i) * in.row_stride;
        rows[i].next_x = large ? rows[i].x + group * in.row_stride : nullptr;
      }
      statistics<DROPS>(rows, count, features, shape.eps);
      for (int i = 0; i < count; ++i) {
        normalise<DROPS>(rows[i], features, scale, shift, output + (n + i) * shape.M, stream);
      }
    }
    write_streams();
  });
}

// result[i] = s * (partial[0, i] + partial[1, i] + ...), in this order, of rows that are `stride` apart.
template <class P, class A>
void sum_rows(const A* partial, int64_t rows, int64_t stride, A s, P* result, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes<A>) {
    const int64_t count = std::min<int64_t>(kLanes<A>, end - i);
    Vector<A> sum = {};
    for (int64_t row = 0; row < rows; ++row) sum += load_as<A>(partial + row * stride + i, count);
    store_as<A>(result + i, count, sum * s);
  }
}

// The gradients of the parameters, each null where it is not wanted, from the sums of the stretches: (stretches, 2, M).
template <class P, class A>
void sum_stretches(const A* sums, int64_t stretches, int64_t M, A s, P* grad_weight, P* grad_bias) {
  parallel_for(M, kTaskParameters / stretches, [&](int64_t begin, int64_t end) {
    if (grad_weight != nullptr) sum_rows(sums, stretches, 2 * M, s, grad_weight, begin, end);
    if (grad_bias != nullptr) sum_rows(sums + M, stretches, 2 * M, s, grad_bias, begin, end);
  });
}

// Calls run(std::true_type) or run(std::false_type).
template <class Run>
void with_bool(bool value, const Run& run) {
  value ? run(std::true_type{}) : run(std::false_type{});
}

struct CpuDropNorm : CpuKernels {
  using CpuKernels::CpuKernels;

  template <class T, class P>
  void forward(const DropNormShape& shape, const DropNormInput<T, P>& in, T* output) const {
    using A = Accumulate<T>;
    Features<A> features(shape, in);
    // One row reads each parameter once, and converts it there; for more rows they are converted before.
    if (shape.N == 1 && in.keep == nullptr && in.weight != nullptr && in.bias != nullptr) {
      return normalise_rows<false>(shape, in, features, in.weight, in.bias, output);
    }
    features.make_scale(in.weight);
    std::optional<Scratch<A>> own_shift;
    const A* shift = features.times_s(in.bias, A(0), own_shift);
    with_bool(in.keep != nullptr,
              [&](auto drops) { normalise_rows<drops>(shape, in, features, features.scale, shift, output); });
  }

  // grad_input, grad_weight and grad_bias may be null: not wanted.
  template <class T, class P>
  void backward(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* grad, int64_t grad_row_stride,
                T* grad_input, P* grad_weight, P* grad_bias) const {
    using A = Accumulate<T>;
    Features<A> features(shape, in);
    features.make_scale(in.weight);
    const int64_t N = shape.N, M = shape.M;
    const bool stream = leaves_cache<T>(shape) && is_in_vectors(shape, grad_input);
    const int64_t stretches = std::clamp<int64_t>(std::min(N / kGroupRows, N * M / kTaskElements), 1, kMostStretches);
    Scratch<A> sums(2 * stretches * M);  // of the stretches: weight, bias, weight, bias ...
    const bool fetch = grad_input != nullptr && !stream;
    const int64_t group_rows = rows_of_group(kGradGroupElements, M);
    // The rows from `first` to before `last`, at most kBlockRows of them.
    const auto block = [&](auto drops, int64_t first, int64_t last, A* sums_of_block) {
      for (int64_t group = first; group < last; group += group_rows) {
        GradRow<T, A> rows[kGroupRows];
        const int count = int(std::min(group_rows, last - group));
        for (int i = 0; i < count; ++i) {
          const int64_t row = group + i;
          rows[i].x = in.input + row * in.row_stride;
          rows[i].dy = grad + row * grad_row_stride;
          rows[i].next_x = rows[i].x + group_rows * in.row_stride;
          rows[i].next_dy = rows[i].dy + group_rows * grad_row_stride;
          rows[i].grad_x = grad_input == nullptr ? nullptr : grad_input + row * M;
        }
        statistics_and_gradients<drops>(rows, count, features, shape.eps, fetch);
        grad_of_group<drops>(rows, count, features, {sums_of_block, sums_of_block + M, group > first}, stream);
      }
    };
    with_bool(in.keep != nullptr, [&](auto drops) {
      parallel_for(stretches, 1, [&](int64_t begin, int64_t end) {
        std::optional<Scratch<A>> block_sums;
        for (int64_t stretch = begin; stretch < end; ++stretch) {
          const int64_t first = N * stretch / stretches, last = N * (stretch + 1) / stretches;
          A* sums_of_stretch = sums.data() + 2 * stretch * M;
          if (first == last) std::fill_n(sums_of_stretch, 2 * M, A(0));  // no rows at all
          for (int64_t n = first; n < last; n += kBlockRows) {
            const int64_t stop = std::min(last, n + kBlockRows);
            if (n == first) {
              block(drops, n, stop, sums_of_stretch);
              continue;
            }
            if (!block_sums) block_sums.emplace(2 * M);
            block(drops, n, stop, block_sums->data());
            for (int64_t i = 0; i < 2 * M; ++i) sums_of_stretch[i] += block_sums->data()[i];
          }
        }
        write_streams();
      });
    });
    sum_stretches(sums.data(), stretches, M, features.s, grad_weight, grad_bias);
  }

  // Counts keys by their upper bits, so that only the keys of one bin need sorting out.
  void select(int64_t M, int64_t dropped, const int32_t* keys, bool* keep) const {
    constexpr int kShift = 24, kBins = 256;
    const auto bin_of = [&](int64_t i) { return (uint32_t(keys[i]) ^ (uint32_t(1) << 31)) >> kShift; };
    int64_t counts[kBins] = {};
    for (int64_t i = 0; i < M; ++i) ++counts[bin_of(i)];
    uint32_t bin = 0;
    int64_t below = 0;
    while (bin < kBins - 1 && below + counts[bin] < dropped) below += counts[bin++];
    for (int64_t i = 0; i < M; ++i) keep[i] = bin_of(i) >= bin;
    std::vector<int64_t> candidates;
    candidates.reserve(counts[bin]);
    for (int64_t i = 0; i < M; ++i) {
      if (bin_of(i) == bin) candidates.push_back(i);
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
