// Rows held on the chip: in shared memory, each read and written once.
//
// Mask, parameters and the sums for the parameters' gradients stay with the threads that own the features. Rows of a
// team are fetched ahead, and several worked on side by side: what does not belong to a single row then counts less,
// and while one row waits for its sums another goes on.
#pragma once

#include <algorithm>

#include "../convert.cuh"
#include "../launch.cuh"
#include "moments.cuh"
#include "packs.cuh"

namespace dlkernels {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int kTeams = 8;          // of one warp each in a block, where a warp is enough for a row
constexpr int kFewFeatures = 8;    // of a thread, where rows are short ...
constexpr int kMostFeatures = 16;  // ... and where they are long
constexpr int64_t kHeldFeatures = int64_t(kMostThreads) * kMostFeatures;  // of the longest row that is held
constexpr int kStages = 2;        // of rows in shared memory: those that are worked on and those on their way there
constexpr int kStageBytes = 128;  // of a thread in a stage, which makes up to 4 rows
constexpr int kMostShared = 128 << 10;  // of a block for rows in more than one stage
constexpr int kOwnShared = 16 << 10;    // at most, of the kernels' own variables
constexpr int kFreeShared = 48 << 10;   // of a block, need not be asked for

// ---- who owns what -------------------------------------------------------------------------------

// The features that a thread of a team owns: packs of WIDTH that lie side by side, as the threads do.
template <int WIDTH_, int FEATURES_>
struct Owned {
  static constexpr int WIDTH = WIDTH_, FEATURES = FEATURES_, PACKS = FEATURES / WIDTH;

  int M;  // a multiple of WIDTH

  __device__ int first(int pack) const { return (pack * int(blockDim.x) + int(threadIdx.x)) * WIDTH; }
  __device__ int operator[](int i) const { return first(i / WIDTH) + i % WIDTH; }
  __device__ bool has(int i) const { return first(i / WIDTH) < M; }
};

// The threads of a team and the teams of a block.
struct Teams {
  int threads, count;

  int block() const { return threads * count; }
};

// Calls run(Owned<...>{}, Teams): who owns what follows from the row's length and type.
template <class T, class Run>
void for_ownership(int64_t M, const Run& run) {
  for_width<T>(M, [&](auto width) {
    const auto with_features = [&](auto features) {
      const int64_t threads = ceil_div(ceil_div(M, features()), kWarp) * kWarp;
      run(Owned<width(), features()>{int(M)}, Teams{int(threads), threads == kWarp ? kTeams : 1});
    };
    if (M <= kWarp * kFewFeatures) return with_features(std::integral_constant<int, kFewFeatures>());
    with_features(std::integral_constant<int, kMostFeatures>());
  });
}

// ---- rows in shared memory -----------------------------------------------------------------------

// A thread's part of a row, in words of 32 bits; what lies beyond the row's end is arbitrary.
template <class T, class Own>
struct HeldRow {
  static constexpr int WORDS = Own::FEATURES * sizeof(T) / sizeof(uint32_t);
  uint32_t words[WORDS];

  __device__ Accumulate<T> operator[](int i) const { return load(from_words<T>(words, i)); }

  // 0 where the mask's bits are 0, whatever was there.
  __device__ HeldRow operator&(const HeldRow& mask) const {
    HeldRow result;
#pragma unroll
    for (int word = 0; word < WORDS; ++word) result.words[word] = words[word] & mask.words[word];
    return result;
  }

  __device__ void write(const Own& own, T* row) const {
#pragma unroll
    for (int pack = 0; pack < Own::PACKS; ++pack) {
      if (own.first(pack) >= own.M) continue;
      if constexpr (Own::WIDTH > 1) {
        const uint32_t* from = words + pack * WORDS / Own::PACKS;
        *(uint4*)(row + own.first(pack)) = {from[0], from[1], from[2], from[3]};
      } else {
        row[own.first(pack)] = from_words<T>(words, pack);
      }
    }
  }
};

// Rows of each of TENSORS in shared memory: ROWS that are worked on and as many that are on their way there. Every
// thread fetches what it owns itself, and so need not wait for others. It reads them again for every sweep over a row:
// in registers they would leave no room for a second block beside this one.
template <class T, class Own, int TENSORS>
struct Fetch {
  using Row = HeldRow<T, Own>;
  using Pack = dlkernels::Pack<T, Own::WIDTH>;
  static constexpr int ROWS = std::clamp<int>(kStageBytes / (TENSORS * sizeof(Row)), 1, 4);
  static constexpr int STAGES = kMostThreads * TENSORS * ROWS * sizeof(Row) * kStages <= kMostShared ? kStages : 1;
  static constexpr int kThreadBytes = STAGES * ROWS * TENSORS * sizeof(Row);

  const Own& own;
  bool aligned;  // all rows, to their packs
  int64_t N;
  const T* data[TENSORS];       // rows (N, M) of each
  int64_t row_stride[TENSORS];  // apart

  // A team's rows: first, first + step(), ...
  static __device__ int64_t step() { return int64_t(gridDim.x) * blockDim.y; }

  // Sends rows first, first + step(), ... of all tensors on their way into a stage.
  __device__ void start(int stage, int64_t first) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t n = first + r * step();
      if (n >= N) continue;
#pragma unroll
      for (int tensor = 0; tensor < TENSORS; ++tensor) {
        start_row(stage * ROWS + r, tensor, data[tensor] + n * row_stride[tensor]);
      }
    }
    commit_copies();
  }

  static __device__ unsigned char* begin() {
    extern __shared__ __align__(kCopyBytes) unsigned char memory[];
    return memory;
  }
  static __device__ unsigned char* end() { return begin() + kThreadBytes * blockDim.x * blockDim.y; }

  __device__ Pack& slot(int place, int tensor, int pack) const {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    return ((Pack*)begin())[((place * TENSORS + tensor) * Own::PACKS + pack) * threads + thread];
  }

  __device__ void start_row(int place, int tensor, const T* row) const {
#pragma unroll
    for (int pack = 0; pack < Own::PACKS; ++pack) {
      if (own.first(pack) >= own.M) continue;
      const T* from = row + own.first(pack);
      Pack& to = slot(place, tensor, pack);
      if (sizeof(Pack) == kCopyBytes && aligned) {
        copy_async(&to, from);
      } else {
        to.read(from, false);
      }
    }
  }

  __device__ Row row(int place, int tensor) const {
    Row row;
#pragma unroll
    for (int pack = 0; pack < Own::PACKS; ++pack) {
      if constexpr (Own::WIDTH > 1) {
        const uint4 from = *(const uint4*)&slot(place, tensor, pack);
        uint32_t* to = row.words + pack * Row::WORDS / Own::PACKS;
        to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
      } else if constexpr (sizeof(T) == 2) {
        const uint32_t bits = slot(place, tensor, pack).values[0].bits;
        row.words[pack / 2] = pack % 2 == 0 ? bits : row.words[pack / 2] | bits << 16;
      } else {
        const uint32_t* from = (const uint32_t*)&slot(place, tensor, pack);
        for (int word = 0; word < sizeof(T) / 4; ++word) row.words[pack * sizeof(T) / 4 + word] = from[word];
      }
    }
    return row;
  }

  // Own feature i, which need not be a constant as it must for a row in registers.
  __device__ Accumulate<T> at(int place, int tensor, int i) const {
    return load(slot(place, tensor, i / Own::WIDTH).values[i % Own::WIDTH]);
  }
};

// A number of a thread's for every feature it owns, in shared memory: registers are scarce in the backward.
template <class A, class Own>
struct SharedNumbers {
  struct alignas(kCopyBytes) Quad {
    A values[4];
  };
  static constexpr int QUADS = Own::FEATURES / 4;
  static constexpr int kThreadBytes = QUADS * sizeof(Quad);

  Quad* memory;  // of the block

  __device__ Quad& slot(int quad) const {
    return memory[quad * blockDim.x * blockDim.y + threadIdx.y * blockDim.x + threadIdx.x];
  }

  __device__ A& at(int i) const { return slot(i / 4).values[i % 4]; }

  __device__ void* end() const { return memory + QUADS * blockDim.x * blockDim.y; }

  __device__ void write(const A (&values)[Own::FEATURES]) const {
#pragma unroll
    for (int i = 0; i < Own::FEATURES; ++i) at(i) = values[i];
  }

  __device__ void read(A (&values)[Own::FEATURES]) const {
#pragma unroll
    for (int quad = 0; quad < QUADS; ++quad) {
      const Quad from = slot(quad);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[4 * quad + i] = from.values[i];
    }
  }
};

// ---- the mask ------------------------------------------------------------------------------------

template <class Own>
__device__ bool is_kept(const Own& own, const bool* keep, int i) {
  return own.has(i) && (keep == nullptr || keep[own[i]]);
}

// values[i] = row[own[i]]; `otherwise` without a row and beyond its end.
template <class Own, class V>
__device__ void read_features(const Own& own, const V* row, V otherwise, V (&values)[Own::FEATURES]) {
#pragma unroll
  for (int pack = 0; pack < Own::PACKS; ++pack) {
    const int first = own.first(pack);
    const auto from = pack_at<Own::WIDTH>(first < own.M ? row : nullptr, first, otherwise);
#pragma unroll
    for (int i = 0; i < Own::WIDTH; ++i) values[pack * Own::WIDTH + i] = from.values[i];
  }
}

// The mask at a thread's features.
template <class T, class Own>
struct HeldKeep {
  using A = Accumulate<T>;

  HeldRow<T, Own> mask;      // all bits of what is kept; nothing beyond the row's end is
  A is_kept[Own::FEATURES];  // 1 or 0
  int first = 0;             // of the own features that is kept
  A count = 0;               // of the own features that are

  __device__ HeldKeep(const Own& own, const bool* keep) {
    constexpr int WORDS = HeldRow<T, Own>::WORDS;
    bool flags[Own::FEATURES];
    read_features(own, keep, true, flags);
#pragma unroll
    for (int word = 0; word < WORDS; ++word) mask.words[word] = 0;
#pragma unroll
    for (int i = Own::FEATURES - 1; i >= 0; --i) {
      const bool is = own.has(i) && flags[i];
      is_kept[i] = is ? A(1) : A(0);
      count += is_kept[i];
      if (is) first = i;
      if constexpr (sizeof(T) == 2) mask.words[i / 2] |= is ? 0xffffu << (i % 2 * 16) : 0u;
      if constexpr (sizeof(T) == 4) mask.words[i] = is ? ~0u : 0u;
      if constexpr (sizeof(T) == 8) mask.words[2 * i] = mask.words[2 * i + 1] = is ? ~0u : 0u;
    }
  }

  // values[i] = s * parameter[own[i]], or s * otherwise without a parameter; 0 where dropped
  template <class P>
  __device__ void scaled(const Own& own, A s, const P* parameter, P otherwise, A (&values)[Own::FEATURES]) const {
    P own_values[Own::FEATURES];
    read_features(own, parameter, otherwise, own_values);
#pragma unroll
    for (int i = 0; i < Own::FEATURES; ++i) values[i] = is_kept[i] > 0 ? s * A(load(own_values[i])) : A(0);
  }
};

// ---- kernels -------------------------------------------------------------------------------------

// values[r], and values[r] = value, for an r that is no constant: registers have no addresses.
template <class V, int COUNT>
__device__ V pick(int r, const V (&values)[COUNT]) {
  V value = values[0];
#pragma unroll
  for (int i = 1; i < COUNT; ++i) {
    if (i == r) value = values[i];
  }
  return value;
}

template <class V, int COUNT>
__device__ void put(int r, V value, V (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (i == r) values[i] = value;
  }
}

// y[i] = s * (weight[i] * (x[i] - mean) * rstd + bias[i]) where kept, else 0
// in: rows x (N, M) -> output (N, M); a team per row
template <class Own, class T, class P>
__global__ void __launch_bounds__(kMostThreads)
    drop_norm_forward(DropNormShape shape, DropNormInput<T, P> in, bool aligned, T* output) {
  using A = Accumulate<T>;
  using Rows = Fetch<T, Own, 1>;
  constexpr int FEATURES = Own::FEATURES;
  constexpr int ROWS = Rows::ROWS, STAGES = Rows::STAGES;
  const Own own{int(shape.M)};
  const Rows rows{own, aligned, shape.N, {in.input}, {in.row_stride}};
  const int64_t step = rows.step();
  int64_t base = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;  // of rows base, base + step, ...
  for (int stage = 0; stage < STAGES; ++stage) rows.start(stage, base + stage * ROWS * step);
  const HeldKeep<T, Own> keep(own, in.keep);
  const TeamMerges<A, ROWS> team(keep.count, rows.end());
  const A s = scale_of(shape, in.keep, team.count), kept = max(team.count, A(1)), eps = A(shape.eps);
  const A one_of_own = 1 / max(keep.count, A(1)), one_of_kept = 1 / kept;
  A scale[FEATURES], shift[FEATURES];
  keep.scaled(own, s, in.weight, store<P>(1), scale);
  keep.scaled(own, s, in.bias, store<P>(0), shift);
  for (int turn = 0; base < shape.N; base += ROWS * step, turn ^= 1) {
    const int stage = STAGES > 1 ? turn : 0;
    wait_for_copies<STAGES - 1>();
    Moments<A, false> moments[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const HeldRow<T, Own> x = rows.row(stage * ROWS + r, 0) & keep.mask;
      const A pivot = keep.count > 0 ? rows.at(stage * ROWS + r, 0, keep.first) : A(0);
      A sum = 0, squares = 0;  // of x - pivot: few, and the pivot is one of them
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) {
        const A d = x[i] - pivot * keep.is_kept[i];
        sum += d, squares += d * d;
      }
      const A offset = sum * one_of_own;
      squares -= sum * offset;
      moments[r] = {pivot + offset, squares < 0 ? A(0) : squares, 0, 0};
    }
    team.merge(moments, turn);
    A rstd[ROWS];
    bool ordinary = true;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      rstd[r] = rsqrt(moments[r].squares * one_of_kept + eps);
      ordinary = ordinary && (base + r * step >= shape.N || is_ordinary(moments[r].squares));
    }
    if (!ordinary) {  // the same for the whole team
#pragma unroll 1
      for (int r = 0; r < ROWS; ++r) {
        const A mean = pick(r, moments).mean;
        if (base + r * step >= shape.N || is_ordinary(pick(r, moments).squares)) continue;
        double squares = 0;
#pragma unroll 1
        for (int i = 0; i < FEATURES; ++i) {
          const double d = is_kept(own, in.keep, i) ? rows.at(stage * ROWS + r, 0, i) - mean : A(0);
          squares += d * d;
        }
        put(r, A(1 / sqrt(team_sum(squares) / kept + shape.eps)), rstd);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t n = base + r * step;
      if (n >= shape.N) break;
      const A mean = moments[r].mean;
      HeldRow<T, Own> x = rows.row(stage * ROWS + r, 0) & keep.mask;
      A y[FEATURES];
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) y[i] = (x[i] - mean) * (rstd[r] * scale[i]) + shift[i];
      to_words<T>(y, x.words);
      x = x & keep.mask;
      x.write(own, output + n * shape.M);
    }
    rows.start(stage, base + STAGES * ROWS * step);
  }
}

// A block's row of sums for a parameter's gradient: its teams' values added in order, sums[own[i]] = sum of values[i].
template <class Own, class A, int FEATURES>
__device__ void write_part(const Own& own, const A (&values)[FEATURES], A* sums) {
  __shared__ A shared[FEATURES][kWarp];  // used only where teams are warps
  const int last = blockDim.y - 1;
  for (int team = 0; team < last; ++team) {
    if (threadIdx.y == team) {
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) {
        shared[i][threadIdx.x] = values[i] + (team > 0 ? shared[i][threadIdx.x] : A(0));
      }
    }
    __syncthreads();
  }
  if (threadIdx.y == last) {
#pragma unroll
    for (int i = 0; i < FEATURES; ++i) {
      if (own.has(i)) sums[own[i]] = values[i] + (last > 0 ? shared[i][threadIdx.x] : A(0));
    }
  }
  __syncthreads();
}

// grad_input[i] = rstd * (g[i] - mean_g - h[i] * mean_gh) where kept, else 0; g = s*weight*dy, h = (x - mean) * rstd
// weight_parts[block][i] = s * sum over the block's rows of dy[i] * h[i], bias_parts alike of dy[i]; 0 where dropped
// in: rows x (N, M), grad (N, M) -> grad_input (N, M) or null, the parts (blocks, M) or null; a team per row
template <class Own, class T, class P, class A>
__global__ void __launch_bounds__(kMostThreads)
    drop_norm_backward(DropNormShape shape, DropNormInput<T, P> in, const T* grad, int64_t grad_row_stride,
                       bool aligned, T* grad_input, A* weight_parts, A* bias_parts) {
  using Rows = Fetch<T, Own, 2>;
  constexpr int FEATURES = Own::FEATURES, X = 0, DY = 1;
  constexpr int ROWS = Rows::ROWS, STAGES = Rows::STAGES;
  const Own own{int(shape.M)};
  const Rows rows{own, aligned, shape.N, {in.input, grad}, {in.row_stride, grad_row_stride}};
  const int64_t step = rows.step();
  int64_t base = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;  // of rows base, base + step, ...
  for (int stage = 0; stage < STAGES; ++stage) rows.start(stage, base + stage * ROWS * step);
  const HeldKeep<T, Own> keep(own, in.keep);
  const SharedNumbers<A, Own> scales{(typename SharedNumbers<A, Own>::Quad*)rows.end()};
  const TeamMerges<A, ROWS> team(keep.count, scales.end());
  const A s = scale_of(shape, in.keep, team.count), kept = max(team.count, A(1)), eps = A(shape.eps);
  const A one_of_own = 1 / max(keep.count, A(1)), one_of_kept = 1 / kept;
  A weight_sums[FEATURES] = {}, bias_sums[FEATURES] = {};
  {
    A scale[FEATURES];
    keep.scaled(own, s, in.weight, store<P>(1), scale);
    scales.write(scale);
  }
  for (int turn = 0; base < shape.N; base += ROWS * step, turn ^= 1) {
    const int stage = STAGES > 1 ? turn : 0;
    wait_for_copies<STAGES - 1>();
    Moments<A, true> moments[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const HeldRow<T, Own> x = rows.row(stage * ROWS + r, X) & keep.mask;
      const HeldRow<T, Own> dy = rows.row(stage * ROWS + r, DY) & keep.mask;
      const A pivot = keep.count > 0 ? rows.at(stage * ROWS + r, X, keep.first) : A(0);
      A scale[FEATURES], sum = 0, squares = 0, sum_g = 0, product = 0;  // x - pivot: few, and the pivot is one of them
      scales.read(scale);
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) {
        const A d = x[i] - pivot * keep.is_kept[i], g = scale[i] * dy[i];
        sum += d, squares += d * d, sum_g += g, product += g * d;
      }
      const A offset = sum * one_of_own;
      squares -= sum * offset;
      moments[r] = {pivot + offset, squares < 0 ? A(0) : squares, sum_g, product - sum_g * offset};
    }
    team.merge(moments, turn);
    A rstd[ROWS], mean_gh[ROWS];
    bool ordinary = true;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      rstd[r] = rsqrt(moments[r].squares * one_of_kept + eps);
      mean_gh[r] = moments[r].product * one_of_kept * rstd[r];
      ordinary = ordinary && (base + r * step >= shape.N || is_ordinary(moments[r].squares));
    }
    if (!ordinary) {  // the same for the whole team
#pragma unroll 1
      for (int r = 0; r < ROWS; ++r) {
        const A mean = pick(r, moments).mean;
        if (base + r * step >= shape.N || is_ordinary(pick(r, moments).squares)) continue;
        double squares = 0, products = 0;
#pragma unroll 1
        for (int i = 0; i < FEATURES; ++i) {
          if (!is_kept(own, in.keep, i)) continue;
          const double d = rows.at(stage * ROWS + r, X, i) - mean;
          squares += d * d, products += scales.at(i) * rows.at(stage * ROWS + r, DY, i) * d;
        }
        const double exact = 1 / sqrt(team_sum(squares) / kept + shape.eps);
        put(r, A(exact), rstd);
        put(r, A(team_sum(products) * exact / kept), mean_gh);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t n = base + r * step;
      if (n >= shape.N) break;
      const A mean = moments[r].mean;
      const A by_one = rstd[r] * moments[r].sum * one_of_kept, by_h = rstd[r] * mean_gh[r];
      HeldRow<T, Own> x = rows.row(stage * ROWS + r, X) & keep.mask;
      const HeldRow<T, Own> dy = rows.row(stage * ROWS + r, DY) & keep.mask;
      A scale[FEATURES], dx[FEATURES];
      scales.read(scale);
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) {
        const A h = (x[i] - mean) * rstd[r];
        dx[i] = scale[i] * (rstd[r] * dy[i]) - (by_one + h * by_h);
        weight_sums[i] += dy[i] * h;
        bias_sums[i] += dy[i];
      }
      to_words<T>(dx, x.words);
      x = x & keep.mask;
      if (grad_input != nullptr) x.write(own, grad_input + n * shape.M);
    }
    rows.start(stage, base + STAGES * ROWS * step);
  }
  if (weight_parts == nullptr) return;
#pragma unroll
  for (int i = 0; i < FEATURES; ++i) {
    weight_sums[i] = keep.is_kept[i] > 0 ? s * weight_sums[i] : A(0);
    bias_sums[i] = keep.is_kept[i] > 0 ? s * bias_sums[i] : A(0);
  }
  write_part(own, weight_sums, weight_parts + blockIdx.x * shape.M);
  write_part(own, bias_sums, bias_parts + blockIdx.x * shape.M);
}

// Shared memory of a thread of a kernel that holds rows of TENSORS: 1 forward, 2 backward.
template <class T, class Own, int TENSORS>
constexpr int kHeldBytes =
    Fetch<T, Own, TENSORS>::kThreadBytes + TeamMerges<Accumulate<T>, Fetch<T, Own, TENSORS>::ROWS>::kThreadBytes +
    (TENSORS > 1 ? SharedNumbers<Accumulate<T>, Own>::kThreadBytes : 0);

}  // namespace dlkernels
