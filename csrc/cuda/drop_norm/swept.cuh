// Rows that are too long to be held: swept over twice, the second time in the L2 cache, and once more for the
// parameters' gradients. A block owns a row.
#pragma once

#include "../launch.cuh"
#include "moments.cuh"
#include "packs.cuh"

namespace dlkernels {

constexpr int kGroupFeatures = 16;  // of a thread, summed around one of them before their moments are merged

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

// The moments of a thread's kept features of rows x and dy (M), with g = s * weight * dy: kGroupFeatures at a time
// around one of them, and these then merged in double.
template <bool GRADS, int WIDTH, class T, class P, class A>
__device__ Moments<double, GRADS> own_moments(const DropNormShape& shape, const DropNormInput<T, P>& in, const T* x,
                                              const T* dy, bool aligned, A s) {
  constexpr int PACKS = kGroupFeatures / WIDTH;
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

}  // namespace dlkernels
