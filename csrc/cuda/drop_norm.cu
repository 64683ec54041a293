// drop_norm on CUDA: the sums of drop_norm.h, with rows held on the chip.
//
// Who owns what: a team of threads owns a row at a time, each of them up to 16 of its features; a warp where that is
// enough, then a block has eight teams, else the whole block. Mask, parameters and, in the backward, the sums for the
// parameters' gradients stay with the threads that own the features, from the first row of a block to its last; every
// block leaves one partial row of those sums behind, and a last kernel adds these in order. The number of partial rows
// follows from the shape alone, and there are no atomics on floats: the same bits on every run.
// Passes over memory: forward reads x and writes y; backward reads x and dy and writes grad_x. Rows wait in shared
// memory, fetched ahead. Those of more features than a block can hold are swept over twice, the second time in the L2
// cache, and once more for the parameters' gradients.
#include "../drop_norm.h"

#include <map>
#include <unordered_map>

#include "../tensor.h"
#include "async_copy.cuh"
#include "convert.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "stream.h"

namespace dlkernels {
namespace {

// ---- tuning constants ----------------------------------------------------------------------------

constexpr int kTeams = 8;          // of one warp each in a block, where a warp is enough for a row
constexpr int kMostThreads = 512;  // of a team, which leaves them 128 registers each
constexpr int kFewFeatures = 8;    // of a thread, where rows are short ...
constexpr int kMostFeatures = 16;  // ... and where they are long
constexpr int64_t kHeldFeatures = int64_t(kMostThreads) * kMostFeatures;  // of the longest row that is held
constexpr int kStages = 2;        // of rows in shared memory: those that are worked on and those on their way there
constexpr int kStageBytes = 128;  // of a thread in a stage, which makes up to 4 rows: what does not belong to a single
                                  // row then counts less, and while one row waits for its sums another goes on
constexpr int kMostShared = 128 << 10;         // of a block for these rows
constexpr int kFreeShared = 32 << 10;          // need not be asked for, beside the kernels' own variables
constexpr int64_t kProcessors = 132;           // of an H100; more or fewer only change how evenly the parts fill them
constexpr int64_t kThreadsPerProcessor = 512;  // with 128 registers each
constexpr int64_t kPartRows = 2;               // at least, of a team
constexpr int64_t kSweptParts = 64;            // of the rows that are not held
constexpr int kSelectThreads = 1024;           // of the one block that selects
constexpr int kDigitBits = 8;                  // of a key, sorted out in one pass over the keys
constexpr int kDigits = 1 << kDigitBits;

// ---- kernels: rows held in registers -----------------------------------------------------------------
//
// A team of blockDim.x threads, a multiple of a warp, owns a row; a block has blockDim.y teams, more than one only
// where a team is a warp.

// The features that a thread of a team owns: packs of WIDTH that lie side by side, as the threads do.
template <int WIDTH_, int FEATURES_>
struct Owned {
  static constexpr int WIDTH = WIDTH_, FEATURES = FEATURES_, PACKS = FEATURES / WIDTH;

  int M;  // a multiple of WIDTH

  __device__ int first(int pack) const { return (pack * int(blockDim.x) + int(threadIdx.x)) * WIDTH; }
  __device__ int operator[](int i) const { return first(i / WIDTH) + i % WIDTH; }
  __device__ bool has(int i) const { return first(i / WIDTH) < M; }
};

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

  static __device__ unsigned char* begin() {
    extern __shared__ __align__(kCopyBytes) unsigned char memory[];
    return memory;
  }
  static __device__ unsigned char* end() { return begin() + kThreadBytes * blockDim.x * blockDim.y; }

  __device__ Pack& slot(int place, int tensor, int pack) const {
    const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
    return ((Pack*)begin())[((place * TENSORS + tensor) * Own::PACKS + pack) * threads + thread];
  }

  __device__ void start(int place, int tensor, const T* row) const {
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

// A thread's own numbers, one for every feature, in shared memory: registers are scarce in the backward.
template <class A, class Own>
struct Kept {
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

template <class T>
bool is_aligned(const T* rows, int64_t row_stride) {
  return uintptr_t(rows) % kCopyBytes == 0 && uintptr_t(row_stride) * sizeof(T) % kCopyBytes == 0;
}

constexpr unsigned kAllLanes = 0xffffffffu;

// How two sets of n and m features become one: what their sizes say.
template <class A>
struct Merge {
  A ratio = 0, weight = 0;  // m / (n + m), n m / (n + m)

  Merge() = default;
  __device__ Merge(A n, A m) : ratio(n + m > 0 ? m / (n + m) : A(0)), weight(n * ratio) {}
};

// Of a set of features, of which every one has a second value g: the mean of x, the sum of (x - mean)^2 and, with
// GRADS, the sums of g and of g (x - mean). Sums around the mean of few features stay exact where sums of all would
// not: the mean of equal numbers is that number.
template <class A, bool GRADS>
struct Moments {
  A mean, squares, sum, product;

  // With those of `other`, which are the second of the merge, or the first; the result's bits are the same.
  __device__ void add(const Moments& other, const Merge<A>& merge, bool other_first = false) {
    const A away = other.mean - mean, distance = other_first ? -away : away, shift = distance * merge.ratio;
    if constexpr (GRADS) {
      const A first = other_first ? other.sum : sum, second = other_first ? sum : other.sum;
      product = product + other.product + (second * (distance - shift) - first * shift);
      sum += other.sum;
    }
    mean = (other_first ? other.mean : mean) + shift;
    squares = squares + other.squares + distance * distance * merge.weight;
  }

  template <class Shuffle>
  __device__ Moments shuffled(const Shuffle& shuffle) const {
    if constexpr (GRADS) return {shuffle(mean), shuffle(squares), shuffle(sum), shuffle(product)};
    return {shuffle(mean), shuffle(squares), A(0), A(0)};
  }

  // With `given` of the lane `half` further or before.
  __device__ void add_across(int half, const Moments& given, const Merge<A>& merge) {
    const auto exchange = [&](A value) { return __shfl_xor_sync(kAllLanes, value, half); };
    add(given.shuffled(exchange), merge, threadIdx.x & half);
  }
};

// How the moments of a team's threads are merged, for ROWS rows at a time: what the number of features of every thread
// says, once for all rows.
//
// In a warp, halves exchange: of ROWS rows every lane gives the other half's away and keeps its own, then the same in
// quarters, until a lane has one row left, which is summed over the lanes that share it. Of the warps then, for every
// row kShare lanes take the results.
template <class A, int ROWS>
struct TeamMerges {
  static constexpr int kShare = kWarp / ROWS, kLevels = 5;
  static_assert(1 << kLevels == kWarp && kMostThreads / kWarp <= 2 * kShare);

  Merge<A>* of_lanes;        // [level][thread]
  const Merge<A>* of_warps;  // [level][lane], the first for a second warp of the same lane
  A count;                   // of all features

  // memory: room for kLevels merges of every thread
  __device__ TeamMerges(A own_count, void* memory) : of_lanes((Merge<A>*)memory) {
    __shared__ Merge<A> across[kLevels + 1][kWarp];
    __shared__ A counts[kMostThreads / kWarp];
    of_warps = across[0];
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    count = merges_of_levels(own_count, kWarp / 2, [&](int level, Merge<A> merge) { of_lane(level) = merge; });
    if (warps == 1) return;
    if (lane == 0) counts[threadIdx.x / kWarp] = count;
    __syncthreads();
    const int warp = lane % kShare;
    const A first = warp < warps ? counts[warp] : A(0), second = warp + kShare < warps ? counts[warp + kShare] : A(0);
    if (threadIdx.x < kWarp) across[0][lane] = Merge<A>(first, second);
    count = merges_of_levels(first + second, kShare / 2, [&](int level, Merge<A> merge) {
      if (threadIdx.x < kWarp) across[level + 1][lane] = merge;
    });
    __syncthreads();
  }

  // The moments of the rows, in all threads of the team. `turn` must be 0 and 1 in turns: with two places in memory for
  // what the warps have found, one barrier is enough.
  template <bool GRADS>
  __device__ void merge(Moments<A, GRADS> (&rows)[ROWS], int turn) const {
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    int level = 0, half = kWarp / 2;
#pragma unroll
    for (int left = ROWS; left > 1; left /= 2, half /= 2, ++level) {
      const bool upper = lane & half;
#pragma unroll
      for (int r = 0; r < left / 2; ++r) {
        const Moments<A, GRADS> given = upper ? rows[r] : rows[r + left / 2];
        if (upper) rows[r] = rows[r + left / 2];
        rows[r].add_across(half, given, of_lane(level));
      }
    }
#pragma unroll
    for (; half > 0; half /= 2, ++level) rows[0].add_across(half, rows[0], of_lane(level));
    if (warps > 1) rows[0] = merge_warps(rows[0], turn);
    const auto sum = rows[0];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      rows[r] = sum.shuffled([&](A value) { return __shfl_sync(kAllLanes, value, r * kShare); });
    }
  }

 private:
  __device__ Merge<A>& of_lane(int level) const {
    return of_lanes[(level * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x];
  }

  // Calls set(level, merge) for count, and for the sums of counts over ever more lanes; returns that of all.
  template <class Set>
  __device__ static A merges_of_levels(A count, int half, const Set& set) {
    for (int level = 0; half > 0; half /= 2, ++level) {
      const A other = __shfl_xor_sync(kAllLanes, count, half);
      const bool upper = threadIdx.x & half;
      set(level, upper ? Merge<A>(other, count) : Merge<A>(count, other));
      count += other;
    }
    return count;
  }

  // Lanes r * kShare and on of every warp have row r of their warp; they get that of all warps.
  template <bool GRADS>
  __device__ Moments<A, GRADS> merge_warps(const Moments<A, GRADS>& own, int turn) const {
    __shared__ Moments<A, GRADS> found[2][ROWS][kMostThreads / kWarp];
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, row = lane / kShare, warp = lane % kShare;
    if (warp == 0) found[turn][row][threadIdx.x / kWarp] = own;
    __syncthreads();
    Moments<A, GRADS> all = {};
    if (warp < warps) all = found[turn][row][warp];
    if (warp + kShare < warps) all.add(found[turn][row][warp + kShare], of_warps[lane]);
#pragma unroll
    for (int half = kShare / 2, level = 1; half > 0; half /= 2, ++level) {
      all.add_across(half, all, of_warps[level * kWarp + lane]);
    }
    return all;
  }
};

// Of a thread, for its merges.
template <class A>
constexpr int kMergeBytes = sizeof(Merge<A>) * TeamMerges<A, 1>::kLevels;

template <class Own>
__device__ bool is_kept(const Own& own, const bool* keep, int i) {
  return own.has(i) && (keep == nullptr || keep[own[i]]);
}

// s = M / kept when rescale, else 1
template <class A>
__device__ A scale_of(const DropNormShape& shape, const bool* keep, A kept) {
  return shape.rescale && keep != nullptr && kept > 0 ? A(shape.M) / kept : A(1);
}

// values[i] = row[own[i]]; `otherwise` without a row and beyond its end.
template <class Own, class V>
__device__ void read_features(const Own& own, const V* row, V otherwise, V (&values)[Own::FEATURES]) {
  const bool aligned = uintptr_t(row) % sizeof(Pack<V, Own::WIDTH>) == 0;
#pragma unroll
  for (int pack = 0; pack < Own::PACKS; ++pack) {
    Pack<V, Own::WIDTH> from;
#pragma unroll
    for (int i = 0; i < Own::WIDTH; ++i) from.values[i] = otherwise;
    if (row != nullptr && own.first(pack) < own.M) from.read(row + own.first(pack), aligned);
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
      if (sizeof(T) == 2) mask.words[i / 2] |= is ? 0xffffu << (i % 2 * 16) : 0u;
      if (sizeof(T) == 4) mask.words[i] = is ? ~0u : 0u;
      if (sizeof(T) == 8) mask.words[2 * i % WORDS] = mask.words[(2 * i + 1) % WORDS] = is ? ~0u : 0u;
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

// The sum of `value` over a team, in all its threads.
__device__ inline double team_sum(double value) {
  __shared__ double of_warps[kMostThreads / kWarp];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  if (blockDim.x == kWarp) return value;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < blockDim.x / kWarp; ++warp) value += of_warps[warp];
  return value;
}

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

// Squares of a row of 1e30 or of 1e-30 are no ordinary floats: they are summed again, in double.
template <class A>
__device__ bool is_ordinary(A squares) {
  return sizeof(A) == sizeof(double) || (squares > A(1e-25) && squares < A(1e37));
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
  const Rows rows{own, aligned};
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  int64_t base = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;  // of rows base, base + step, ...
  const auto start = [&](int stage, int64_t first) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t n = first + r * step;
      if (n < shape.N) rows.start(stage * ROWS + r, 0, in.input + n * in.row_stride);
    }
    commit_copies();
  };
  for (int stage = 0; stage < STAGES; ++stage) start(stage, base + stage * ROWS * step);
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
    start(stage, base + STAGES * ROWS * step);
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
  const Rows rows{own, aligned};
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  int64_t base = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;  // of rows base, base + step, ...
  const auto start = [&](int stage, int64_t first) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t n = first + r * step;
      if (n >= shape.N) continue;
      rows.start(stage * ROWS + r, X, in.input + n * in.row_stride);
      rows.start(stage * ROWS + r, DY, grad + n * grad_row_stride);
    }
    commit_copies();
  };
  for (int stage = 0; stage < STAGES; ++stage) start(stage, base + stage * ROWS * step);
  const HeldKeep<T, Own> keep(own, in.keep);
  const Kept<A, Own> scales{(typename Kept<A, Own>::Quad*)rows.end()};
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
    start(stage, base + STAGES * ROWS * step);
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

// grad_weight[i] = sum over parts of weight_parts[part][i], grad_bias alike; either may be null
// count = M columns, a block for some of them
template <class P, class A>
__global__ void drop_norm_sum_parts(int64_t count, int64_t parts, const A* weight_parts, const A* bias_parts,
                                    P* grad_weight, P* grad_bias) {
  const int64_t i = own_column();
  const A weight_sum = column_sum<A>(parts, count, weight_parts, count),
          bias_sum = column_sum<A>(parts, count, bias_parts, count);
  if (threadIdx.y > 0 || i >= count) return;
  if (grad_weight != nullptr) grad_weight[i] = store<P>(weight_sum);
  if (grad_bias != nullptr) grad_bias[i] = store<P>(bias_sum);
}

// ---- kernels: longer rows, swept over in every step ----------------------------------------------------

// A thread's packs of a row lie blockDim.x packs from each other.
template <int WIDTH, class Use>
__device__ void for_packs(const DropNormShape& shape, const Use& use) {
  for (int64_t i = int64_t(threadIdx.x) * WIDTH; i < shape.M; i += int64_t(blockDim.x) * WIDTH) use(i);
}

// How many of a thread's features are kept.
template <int WIDTH>
__device__ double count_kept(const DropNormShape& shape, const bool* keep) {
  double count = 0;
  for_packs<WIDTH>(shape, [&](int64_t i) {
    for (int j = 0; j < WIDTH; ++j) count += keep == nullptr || keep[i + j];
  });
  return count;
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

// The moments of a thread's kept features of rows x and dy (M), with g = s * weight * dy: kMostFeatures at a time
// around one of them, and these then merged in double.
template <bool GRADS, int WIDTH, class T, class P, class A>
__device__ Moments<double, GRADS> own_moments(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* x,
                                              const T* dy, bool aligned, A s) {
  constexpr int PACKS = kMostFeatures / WIDTH;
  const int64_t across = int64_t(blockDim.x) * WIDTH;
  Moments<double, GRADS> all = {};
  double count = 0;
  for (int64_t first = int64_t(threadIdx.x) * WIDTH; first < shape.M; first += across * PACKS) {
    A kept = 0, pivot = 0, sum = 0, squares = 0, sum_g = 0, product = 0;
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      const int64_t i = first + p * across;
      if (i >= shape.M) break;
      Pack<T, WIDTH> x_pack, dy_pack;
      x_pack.read(x + i, aligned);
      if constexpr (GRADS) dy_pack.read(dy + i, aligned);
      const auto keeps = pack_at<WIDTH>(in.keep, i, true);
      const auto weights = pack_at<WIDTH>(in.weight, i, store<P>(1));
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const A value = load(x_pack.values[j]);
        if (keeps.values[j] && kept == 0) pivot = value;
        const A d = keeps.values[j] ? value - pivot : A(0);
        kept += keeps.values[j], sum += d, squares += d * d;
        if constexpr (GRADS) {
          const A g = keeps.values[j] ? s * A(load(weights.values[j])) * load(dy_pack.values[j]) : A(0);
          sum_g += g, product += g * d;
        }
      }
    }
    if (kept == 0) continue;
    const A offset = sum / kept, around_mean = squares - sum * offset;
    all.add({double(pivot) + offset, around_mean < 0 ? A(0) : around_mean, sum_g, product - sum_g * offset},
            Merge<double>(count, kept));
    count += kept;
  }
  return all;
}

// sums of (x - mean)^2 and of g * (x - mean) over the team, in double
template <bool GRADS, int WIDTH, class T, class P, class A>
__device__ double2 sums_in_double(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* x, const T* dy,
                                  A mean, A s) {
  double squares = 0, products = 0;
  for_packs<WIDTH>(shape, [&](int64_t i) {
    for (int j = 0; j < WIDTH; ++j) {
      if (in.keep != nullptr && !in.keep[i + j]) continue;
      const double d = load(x[i + j]) - mean;
      squares += d * d;
      if constexpr (GRADS)
        products += s * A(load(pack_at<1>(in.weight, i + j, store<P>(1)).values[0])) * load(dy[i + j]) * d;
    }
  });
  return {team_sum(squares), GRADS ? team_sum(products) : 0.0};
}

// drop_norm_forward for rows of any length; a block per row, count = N
template <int WIDTH, class T, class P, class A>
__global__ void __launch_bounds__(kMostThreads)
    drop_norm_forward_swept(int64_t count, DropNormShape shape, DropNormInput<T, P> in, bool aligned, T* output) {
  __shared__ Merge<double> memory[kMostThreads * TeamMerges<double, 1>::kLevels];
  const TeamMerges<double, 1> team(count_kept<WIDTH>(shape, in.keep), memory);
  const A s = scale_of(shape, in.keep, A(team.count)), kept = max(A(team.count), A(1));
  int turn = 0;
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x, turn ^= 1) {
    const T* x = in.input + n * in.row_stride;
    Moments<double, false> moments[1] = {own_moments<false, WIDTH>(shape, in, x, x, aligned, s)};
    team.merge(moments, turn);
    const A mean = A(moments[0].mean), squares = A(moments[0].squares);
    A rstd = rsqrt(squares / kept + A(shape.eps));
    if (!is_ordinary(squares)) {
      rstd = A(1 / sqrt(sums_in_double<false, WIDTH>(shape, in, x, x, mean, s).x / kept + shape.eps));
    }
    for_packs<WIDTH>(shape, [&](int64_t i) {
      Pack<T, WIDTH> pack;
      pack.read(x + i, aligned);
      const auto keeps = pack_at<WIDTH>(in.keep, i, true);
      const auto weights = pack_at<WIDTH>(in.weight, i, store<P>(1)), biases = pack_at<WIDTH>(in.bias, i, store<P>(0));
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const A h = (load(pack.values[j]) - mean) * rstd;
        const A y = s * (A(load(weights.values[j])) * h + A(load(biases.values[j])));
        pack.values[j] = store<T>(keeps.values[j] ? y : A(0));
      }
      *(Pack<T, WIDTH>*)(output + n * shape.M + i) = pack;
    });
  }
}

// drop_norm_backward's grad_input for rows of any length, and every row's mean and rstd for the parameters' gradients
// in: rows x (N, M), grad (N, M) -> mean (N), rstd (N), grad_input (N, M) or null; a block per row, count = N
template <int WIDTH, class T, class P, class A>
__global__ void __launch_bounds__(kMostThreads)
    drop_norm_grad_input_swept(int64_t count, DropNormShape shape, DropNormInput<T, P> in, const T* grad,
                               int64_t grad_row_stride, bool aligned, A* means, A* rstds, T* grad_input) {
  __shared__ Merge<double> memory[kMostThreads * TeamMerges<double, 1>::kLevels];
  const TeamMerges<double, 1> team(count_kept<WIDTH>(shape, in.keep), memory);
  const A s = scale_of(shape, in.keep, A(team.count)), kept = max(A(team.count), A(1));
  int turn = 0;
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x, turn ^= 1) {
    const T* x = in.input + n * in.row_stride;
    const T* dy = grad + n * grad_row_stride;
    Moments<double, true> moments[1] = {own_moments<true, WIDTH>(shape, in, x, dy, aligned, s)};
    team.merge(moments, turn);
    const A mean = A(moments[0].mean), squares = A(moments[0].squares), mean_g = A(moments[0].sum) / kept;
    A rstd = rsqrt(squares / kept + A(shape.eps)), mean_gh = A(moments[0].product) / kept * rstd;
    if (!is_ordinary(squares)) {
      const double2 sums = sums_in_double<true, WIDTH>(shape, in, x, dy, mean, s);
      const double r = 1 / sqrt(sums.x / kept + shape.eps);
      rstd = A(r), mean_gh = A(sums.y * r / kept);
    }
    if (threadIdx.x == 0) means[n] = mean, rstds[n] = rstd;
    if (grad_input == nullptr) continue;  // the same for the whole block
    for_packs<WIDTH>(shape, [&](int64_t i) {
      Pack<T, WIDTH> x_pack, dy_pack;
      x_pack.read(x + i, aligned), dy_pack.read(dy + i, aligned);
      const auto keeps = pack_at<WIDTH>(in.keep, i, true);
      const auto weights = pack_at<WIDTH>(in.weight, i, store<P>(1));
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const A g = s * A(load(weights.values[j])) * load(dy_pack.values[j]);
        const A h = (load(x_pack.values[j]) - mean) * rstd;
        x_pack.values[j] = store<T>(keeps.values[j] ? rstd * (g - mean_g - h * mean_gh) : A(0));
      }
      *(Pack<T, WIDTH>*)(grad_input + n * shape.M + i) = x_pack;
    });
  }
}

// weight_parts[part][i] = s * sum over the part's rows of dy[i] * h[i], bias_parts alike of dy[i]; 0 where dropped
// count = parts * M, a thread for each
template <class T, class P, class A>
__global__ void drop_norm_sum_rows_swept(int64_t count, DropNormShape shape, DropNormInput<T, P> in, const T* grad,
                                         int64_t grad_row_stride, const A* mean, const A* rstd, int64_t parts,
                                         A* weight_parts, A* bias_parts) {
  const A s = scale_of(shape, in.keep, A(team_sum(count_kept<1>(shape, in.keep))));
  for (int64_t item = first_item(); item < count; item += item_stride()) {
    const int64_t i = item % shape.M, part = item / shape.M;
    A weight_sum = 0, bias_sum = 0;
    if (in.keep == nullptr || in.keep[i]) {
      for (int64_t n = shape.N * part / parts; n < shape.N * (part + 1) / parts; ++n) {
        const A dy = load(grad[n * grad_row_stride + i]);
        weight_sum += dy * ((load(in.input[n * in.row_stride + i]) - mean[n]) * rstd[n]);
        bias_sum += dy;
      }
    }
    weight_parts[item] = s * weight_sum;
    bias_parts[item] = s * bias_sum;
  }
}

// ---- kernels: selection ----------------------------------------------------------------------------

// Key order as unsigned order.
__device__ inline uint32_t ordered(int32_t key) { return uint32_t(key) ^ (uint32_t(1) << 31); }

// The digit at which the running sum of counts reaches `rest` (1 or more), and the sum in front of it: in lane 0. By a
// warp, every lane of which owns a run of digits.
__device__ inline void find_digit(const int* counts, int rest, int& digit, int& below) {
  constexpr int kRun = kDigits / kWarp;
  const int lane = threadIdx.x % kWarp;
  int own = 0;
  for (int i = 0; i < kRun; ++i) own += counts[lane * kRun + i];
  int up_to = own;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, up_to, distance);
    if (lane >= distance) up_to += other;
  }
  digit = lane * kRun, below = up_to - own;
  if (below < rest && rest <= up_to) {
    while (below + counts[digit] < rest) below += counts[digit++];
  }
  const int owner = __ffs(__ballot_sync(0xffffffffu, up_to >= rest)) - 1;
  digit = __shfl_sync(0xffffffffu, digit, owner);
  below = __shfl_sync(0xffffffffu, below, owner);
}

// keep[i] = whether key i is not among the `dropped` smallest, of equal keys the lower index being smaller. One block:
// digit by digit from the top, it finds the key at the border and how many of its equals are still dropped.
__global__ void drop_mask_select(int64_t count, int dropped, const int32_t* keys, bool* keep) {
  __shared__ int counts[kDigits], shared_digit, shared_below;
  __shared__ int warp_counts[kSelectThreads / kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint32_t border = 0;  // the upper digits of the border key, as far as they are known
  int rest = dropped;   // how many keys with these upper digits are dropped
  for (int shift = 32 - kDigitBits; shift >= 0 && dropped > 0; shift -= kDigitBits) {
    for (int digit = threadIdx.x; digit < kDigits; digit += kSelectThreads) counts[digit] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kSelectThreads) {
      const uint32_t key = ordered(keys[i]);
      const bool same_above = shift + kDigitBits == 32 || key >> (shift + kDigitBits) == border;
      if (same_above) atomicAdd(&counts[(key >> shift) & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (warp == 0) {
      int digit, below;
      find_digit(counts, rest, digit, below);
      if (lane == 0) shared_digit = digit, shared_below = below;
    }
    __syncthreads();
    border = border << kDigitBits | uint32_t(shared_digit);
    rest -= shared_below;
  }
  // equals of the border key are dropped in order of index until `rest` is used up
  int equals_before = 0;  // in front of this sweep of kSelectThreads keys
  for (int64_t base = 0; base < count; base += kSelectThreads) {
    const int64_t i = base + threadIdx.x;
    const uint32_t key = i < count ? ordered(keys[i]) : ~uint32_t(0);
    const bool equal = i < count && key == border;
    const unsigned votes = __ballot_sync(0xffffffffu, equal);
    if (lane == 0) warp_counts[warp] = __popc(votes);
    __syncthreads();
    int before = equals_before + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kSelectThreads / kWarp; ++w) {
      if (w < warp) before += warp_counts[w];
      equals_before += warp_counts[w];
    }
    if (i < count) keep[i] = equal ? before >= rest : key > border;
    __syncthreads();
  }
}

// ---- launchers -----------------------------------------------------------------------------------

// The threads of a team and the teams of a block.
struct Teams {
  int threads, count;

  int block() const { return threads * count; }
};

// Calls run(width) with the features of a pack, a constant: 16 bytes of them where the row is made of such packs.
template <class T, class Run>
void for_width(int64_t M, const Run& run) {
  constexpr int kWide = kCopyBytes / sizeof(T);
  if (M % kWide == 0) return run(std::integral_constant<int, kWide>());
  run(std::integral_constant<int, 1>());
}

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

struct CudaDropNorm : CudaKernels {
  using CudaKernels::CudaKernels;

  template <class T, class P>
  void forward(const DropNormShape& shape, const DropNormInput<T, P>& in, T* output) const {
    if (shape.N == 0 || shape.M == 0) return;
    if (shape.M > kHeldFeatures) {
      for_width<T>(shape.M, [&](auto width) {
        launch_swept("drop_norm", shape.N, drop_norm_forward_swept<width(), T, P, Accumulate<T>>, shape, in,
                     is_aligned(in.input, in.row_stride), output);
      });
      return;
    }
    for_ownership<T>(shape.M, [&](auto own, Teams teams) {
      using Own = decltype(own);
      const int64_t most = processors() * std::max<int64_t>(1, kThreadsPerProcessor / teams.block());
      launch_with_memory<Fetch<T, Own, 1>::kThreadBytes + kMergeBytes<Accumulate<T>>>(
          "drop_norm", std::min(ceil_div(shape.N, teams.count), most), teams, drop_norm_forward<Own, T, P>, shape, in,
          is_aligned(in.input, in.row_stride), output);
    });
  }

  // grad_input, grad_weight and grad_bias may be null: not wanted.
  template <class T, class P>
  void backward(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* grad, int64_t grad_row_stride,
                T* grad_input, P* grad_weight, P* grad_bias) const {
    using A = Accumulate<T>;
    if (shape.M == 0) return;
    const bool wants_sums = grad_weight != nullptr || grad_bias != nullptr;
    const int64_t parts = count_parts<T>(shape);
    const auto memory = workspace<A>(wants_sums ? 2 * parts * shape.M : 0);
    A* weight_parts = wants_sums ? (A*)memory.mutable_data_ptr() : nullptr;
    A* bias_parts = wants_sums ? weight_parts + parts * shape.M : nullptr;
    if (shape.M > kHeldFeatures) {
      backward_swept(shape, in, grad, grad_row_stride, grad_input, parts, weight_parts, bias_parts);
    } else {
      for_ownership<T>(shape.M, [&](auto own, Teams teams) {
        using Own = decltype(own);
        const bool aligned = is_aligned(in.input, in.row_stride) && is_aligned(grad, grad_row_stride);
        launch_with_memory<Fetch<T, Own, 2>::kThreadBytes + Kept<A, Own>::kThreadBytes + kMergeBytes<A>>(
            "drop_norm_backward", parts, teams, drop_norm_backward<Own, T, P, A>, shape, in, grad, grad_row_stride,
            aligned, grad_input, weight_parts, bias_parts);
      });
    }
    if (!wants_sums) return;
    launch_for_columns(stream(), "drop_norm_backward", shape.M, drop_norm_sum_parts<P, A>, parts,
                       (const A*)weight_parts, (const A*)bias_parts, grad_weight, grad_bias);
  }

  // From the shape alone, so that the order of the sums does not depend on the machine.
  template <class T>
  static int64_t count_parts(const DropNormShape& shape) {
    int64_t parts = kSweptParts;
    if (shape.M <= kHeldFeatures) {
      for_ownership<T>(shape.M, [&](auto, Teams teams) {
        const int64_t most = kProcessors * std::max<int64_t>(1, kThreadsPerProcessor / teams.block());
        parts = std::min(ceil_div(shape.N, kPartRows * teams.count), most);
      });
    }
    return std::max<int64_t>(1, std::min(parts, shape.N));
  }

  // More shared memory than a kernel may have unasked. Asking takes longer than launching: once for a kernel and
  // device.
  void allow_memory(const char* name, const void* kernel, int bytes) const {
    thread_local std::unordered_map<const void*, std::map<int, int>> allowed;
    int& most = allowed[kernel][device()];
    if (bytes <= most) return;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
    most = bytes;
  }

  // kernel(rows, args...) with a block for every row, as far as the grid goes.
  template <class... Params, class... Args>
  void launch_swept(const char* name, int64_t rows, void (*kernel)(int64_t, Params...), const Args&... args) const {
    if (rows == 0) return;
    kernel<<<std::min(rows, kMostBlocks), kMostThreads, 0, stream()>>>(rows, args...);
    check_cuda(cudaGetLastError(), name);
  }

  template <int THREAD_BYTES, class... Params, class... Args>
  void launch_with_memory(const char* name, int64_t blocks, Teams teams, void (*kernel)(Params...),
                          const Args&... args) const {
    const int bytes = THREAD_BYTES * teams.block();
    if (bytes > kFreeShared) allow_memory(name, (const void*)kernel, bytes);
    kernel<<<blocks, dim3(teams.threads, teams.count), bytes, stream()>>>(args...);
    check_cuda(cudaGetLastError(), name);
  }

  template <class T, class P, class A>
  void backward_swept(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* grad, int64_t grad_row_stride,
                      T* grad_input, int64_t parts, A* weight_parts, A* bias_parts) const {
    const auto memory = workspace<A>(2 * shape.N);
    A* mean = (A*)memory.mutable_data_ptr();
    A* rstd = mean + shape.N;
    for_width<T>(shape.M, [&](auto width) {
      const bool aligned = is_aligned(in.input, in.row_stride) && is_aligned(grad, grad_row_stride);
      launch_swept("drop_norm_backward", shape.N, drop_norm_grad_input_swept<width(), T, P, A>, shape, in, grad,
                   grad_row_stride, aligned, mean, rstd, grad_input);
    });
    if (weight_parts == nullptr) return;
    launch_for_items(stream(), "drop_norm_backward", parts * shape.M, drop_norm_sum_rows_swept<T, P, A>, shape, in,
                     grad, grad_row_stride, (const A*)mean, (const A*)rstd, parts, weight_parts, bias_parts);
  }

  void select(int64_t M, int64_t dropped, const int32_t* keys, bool* keep) const {
    if (M == 0) return;
    drop_mask_select<<<1, kSelectThreads, 0, stream()>>>(M, int(dropped), keys, keep);
    check_cuda(cudaGetLastError(), "drop_mask");
  }
};

}  // namespace

// ---- registration --------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY_IMPL(dlkernels, CUDA, library) {
  using torch::stable::Tensor;
  library.impl("drop_mask", TORCH_BOX((&drop_mask<CudaDropNorm, Tensor>)));
  library.impl("drop_norm", TORCH_BOX((&drop_norm<CudaDropNorm, Tensor>)));
  library.impl("drop_norm_backward", TORCH_BOX((&drop_norm_backward<CudaDropNorm, Tensor>)));
}

}  // namespace dlkernels
