// A row's mean and variance, and what the backward sums beside them, merged from what a team's threads have found.
//
// A team of blockDim.x threads, a multiple of a warp, owns a row; a block has blockDim.y teams, more than one only
// where a team is a warp.
#pragma once

#include "../reduce.cuh"

namespace dlkernels {

constexpr int kMostThreads = 512;  // of a team, which leaves them 128 registers each

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
  static constexpr int kShare = kWarp / ROWS, kLevels = 5, kThreadBytes = kLevels * sizeof(Merge<A>);
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

// Squares of a row of 1e30 or of 1e-30 are no ordinary floats: they are summed again, in double.
template <class A>
__device__ bool is_ordinary(A squares) {
  return sizeof(A) == sizeof(double) || (squares > A(1e-25) && squares < A(1e37));
}

}  // namespace dlkernels
